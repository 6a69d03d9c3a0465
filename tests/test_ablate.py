"""`clipn ablate`: every combination is run once, and what combinations share is made once."""

import pandas as pd
import pytest
from helpers import write_images

from clipn import ablation


@pytest.fixture
def evaluated_config(config_file, tmp_path):
    """The config of a tiny training that is evaluated on two folders."""
    write_images(tmp_path / "id", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    write_images(tmp_path / "ood", *(f"{n}.png" for n in range(4)))
    section = f"\neval: {{id: {tmp_path}/id, ood: {tmp_path}/ood, templates: simple, methods: [CTW, MSP]}}\n"
    config_file.write_text(config_file.read_text().replace("epochs: 2", "epochs: 1") + section)
    return config_file


@pytest.fixture(autouse=True)
def no_reports(monkeypatch):
    """Reports of single runs are tested elsewhere, and their figures take most of the time."""
    monkeypatch.setattr("clipn.pipeline.write_report", lambda *arguments, **options: None)


def test_words_become_every_combination():
    fixed, variants = ablation.parse(["run.seeds=[0,1]", "train.lr=1,2", "model.num_prompts=3,4"])
    assert fixed == ["run.seeds=[0,1]"]
    assert variants == [[f"train.lr={a}", f"model.num_prompts={b}"] for a in (1, 2) for b in (3, 4)]
    assert ablation.parse(["tso"])[1] == [["train.tso_kind=l2"], ["train.tso_kind=cosine"], ["train.tso_weight=0"]]
    assert ablation.split("[a {},the {}],{a: {b: 1, c: 2}},x") == ["[a {},the {}]", "{a: {b: 1, c: 2}}", "x"]
    with pytest.raises(ValueError, match="one setting is varied twice"):
        ablation.parse(["loss", "tso"])
    assert ablation.folder_name(["a=x/c.pt"]) != ablation.folder_name(["a=y/c.pt"])
    for words in (["train.lr=1"], ["nothing"], ["train.lr=1,2", "nothing"]):
        with pytest.raises(ValueError, match="loss, tso, prompts"):
            ablation.parse(words)


def test_table_has_every_combination_and_trainings_are_shared(evaluated_config, tmp_path, capsys):
    ablation.run_ablation(str(evaluated_config), ["eval.scale=100,50", "run.seeds=[0,1]"])
    results = pd.read_csv(tmp_path / "run/ablations.csv")
    assert results.groupby(["setting", "seed", "method"]).size().tolist() == [1] * (2 * 2 * 2)
    table = (tmp_path / "run/ablations.md").read_text()
    assert table in capsys.readouterr().out and table.count("eval.scale=50") == 1
    trainings = [path.parent.name for path in (tmp_path / "run/ablations").rglob("checkpoints")]
    assert sorted(trainings) == ["seed_0", "seed_1"], "another scale needs no other training"


def test_errors_are_reported_before_training(evaluated_config, tmp_path):
    for word, message in (("train.tso_kind=l2,cosin", "'cosin'"), ("eval.methods=[MSP],[Nothing]", "'Nothing'")):
        with pytest.raises(ValueError, match=message):
            ablation.run_ablation(str(evaluated_config), [word])
    assert not (tmp_path / "run/ablations").exists()


def test_a_base_is_trained_once_for_all_unless_it_differs(evaluated_config, tmp_path):
    text = evaluated_config.read_text().replace(f"{tmp_path}/clip.pt", "'${run.dir}/base/checkpoints/last.pt'")
    evaluated_config.write_text(text + "\nbase: {model: {pretrained: null}, train: {objective: clip}}\n")
    for words, bases in (["train.tso_weight=0,1"], 1), (["train.lr=1e-3,2e-3"], 2):
        folder = tmp_path / f"{bases}_bases"
        ablation.run_ablation(str(evaluated_config), [*words, f"run.dir={folder}"])
        assert len(list((folder / "ablations").rglob("base/checkpoints"))) == bases
        assert len(pd.read_csv(folder / "ablations.csv")) == 2 * 2
