"""scripts/ablate.py: every combination once, and what they share made once."""

import pandas as pd
import pytest
from helpers import write_images

from scripts import ablate


@pytest.fixture
def judged(config_file, tmp_path):
    write_images(tmp_path / "id", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    write_images(tmp_path / "ood", *(f"{n}.png" for n in range(4)))
    eval_words = f"\neval: {{id: {tmp_path}/id, ood: {tmp_path}/ood, templates: simple, methods: [CTW, ATD, MSP]}}\n"
    config_file.write_text(config_file.read_text() + eval_words)
    return config_file


def test_words_become_every_combination():
    fixed, variants = ablate.parse(["run.seeds=[0,1]", "train.lr=1,2", "model.num_prompts=3,4"])
    assert fixed == ["run.seeds=[0,1]"]
    assert variants == [[f"train.lr={a}", f"model.num_prompts={b}"] for a in (1, 2) for b in (3, 4)]
    assert ablate.parse(["tso"])[1] == [["train.tso_kind=l2"], ["train.tso_kind=cosine"], ["train.tso_weight=0"]]
    assert ablate.split("[a {},the {}],{a: {b: 1, c: 2}},x") == ["[a {},the {}]", "{a: {b: 1, c: 2}}", "x"]
    with pytest.raises(ValueError, match="one setting is varied twice"):
        ablate.parse(["loss", "tso"])
    assert ablate.name_of(["a=x/c.pt"]) != ablate.name_of(["a=y/c.pt"])
    for words in (["train.lr=1"], ["nothing"], ["train.lr=1,2", "nothing"]):
        with pytest.raises(ValueError, match="loss, tso, prompts"):
            ablate.parse(words)


def test_a_table_has_every_combination(judged, tmp_path, capsys):
    ablate.main([str(judged), "train.tso_kind=l2,cosine", "eval.scale=100,50", "run.seeds=[0,1]"])
    results = pd.read_csv(tmp_path / "run/ablations.csv")
    assert results.groupby(["setting", "seed", "method"]).size().tolist() == [1] * (4 * 2 * 3)
    table = (tmp_path / "run/ablations.md").read_text()
    assert table in capsys.readouterr().out and table.count("train.tso_kind=cosine eval.scale=50") == 1
    trainings = [path.parent.name for path in (tmp_path / "run/ablations").rglob("checkpoints")]
    assert len(trainings) == 4, "two kinds, two seeds; another scale needs no other training"


def test_a_mistake_is_told_before_anything_is_trained(judged, tmp_path):
    for words in (["train.tso_kind=l2,cosin"], ["eval.methods=[MSP],[Nothing]"]):
        with pytest.raises(ValueError, match="cosin|Nothing"):
            ablate.main([str(judged), *words])
    assert not (tmp_path / "run/ablations").exists()


def test_a_base_that_all_have_in_common_is_trained_once(judged, tmp_path):
    stages = "\nbase: {model: {pretrained: null}, train: {objective: clip}}\n"
    text = judged.read_text().replace(f"{tmp_path}/clip.pt", "'${run.dir}/base/checkpoints/last.pt'")
    judged.write_text(text + stages)
    ablate.main([str(judged), "train.tso_weight=0,1"])
    assert len(list((tmp_path / "run/ablations").rglob("base/checkpoints"))) == 1
    ablate.main([str(judged), "train.lr=1e-3,2e-3", f"run.dir={tmp_path}/other"])
    assert len(list((tmp_path / "other/ablations").rglob("base/checkpoints"))) == 2
