"""Every score in one evaluation: what each needs, and that each image is still encoded once."""

import json
import os

import numpy as np
import pytest
from conftest import architecture, write_clipn
from helpers import write_images
from PIL import Image

from clipn.config.loading import load_config
from clipn.evaluation.evaluate import evaluate
from clipn.methods.registry import METHODS

WORDS = "noun\tship\nnoun\tviolin\nnoun\tcloud\nadj\tred\nadj\tquiet\n"


@pytest.fixture
def judge(tmp_path):
    """(words) -> the evaluation of 8 cats and dogs against 5 others; 40 training images of each class."""
    write_images(tmp_path / "id", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(4)))
    noise = np.random.default_rng(0)
    for number in range(80):  # of one colour each they would all lie in a few directions
        path = tmp_path / "train" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    write_images(tmp_path / "ood", *(f"{n}.png" for n in range(5)))
    (tmp_path / "words.txt").write_text(WORDS)
    (tmp_path / "model.json").write_text(json.dumps(architecture()))
    write_clipn(tmp_path / "clipn.pt")
    (tmp_path / "config.yaml").write_text(
        f"""
run: {{dir: {tmp_path}/run, device: cpu}}
model: {{name: {tmp_path}/model.json, pretrained: {tmp_path}/clipn.pt}}
data: {{workers: 0}}
features: {{part_size: 3}}
eval:
  {{id: {tmp_path}/id, ood: {tmp_path}/ood, templates: simple, train: {tmp_path}/train, words: {tmp_path}/words.txt}}
"""
    )
    return lambda *words: evaluate(load_config(tmp_path / "config.yaml", words))


def test_every_score_comes_from_one_pass(judge, tmp_path, encoded):
    methods = [method for method in METHODS if method != "ODIN"]  # which encodes twice more
    found = judge(f"eval.methods=[{','.join(methods)}]")
    assert found.results["method"].tolist() == methods
    assert sum(encoded) == 8 + 5 + 80 + (8 + 5), "GL-MCM looks at each image it is for a second time"
    assert "NegLabel+CLIPN" in (tmp_path / "run/results.md").read_text()
    names = [line.split("\t")[1] for line in (tmp_path / "run/negatives_NegLabel.tsv").read_text().splitlines()]
    assert names and set(names) <= {"ship", "violin", "cloud", "red", "quiet"}
    encoded.clear()
    again = judge(f"eval.methods=[{','.join(reversed(methods))}]").results.set_index("method")
    same = found.results.set_index("method").loc[again.index]
    assert again["AUROC"].tolist() == pytest.approx(same["AUROC"].tolist()) and encoded == []


def test_a_score_of_the_image_is_taken_again_for_another_head(judge, encoded):
    first = judge("eval.methods=[GL-MCM,ODIN]").found["id"].scores
    encoded.clear()
    assert judge("eval.methods=[GL-MCM,ODIN]").found["id"].scores["ODIN"].tolist() == first["ODIN"].tolist()
    assert encoded == []
    other = judge("eval.methods=[GL-MCM,ODIN]", "eval.class_names=[boat,tree]").found["id"].scores
    assert other["GL-MCM"].tolist() != first["GL-MCM"].tolist() and encoded != []


def test_what_a_score_lacks_is_told_before_any_image_is_read(judge, tmp_path, encoded):
    for words, message in [
        (["eval.methods=[kNN]", "eval.train=null"], "kNN needs in-distribution training images.*eval.train"),
        (["eval.methods=[CSP]", "eval.words=null"], "CSP needs candidate words.*eval.words"),
        (["eval.methods=[kNN,Nothing]"], "unknown score 'Nothing'; the scores are: MSP, .*NegLabel, .*kNN, .*ODIN"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge(*words)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        judge("eval.methods=[NegLabel]", f"eval.words={tmp_path}/nowhere.txt")
    with pytest.raises(ValueError, match="one is named twice"):
        judge("eval.methods=[MSP,MSP]")
    with pytest.raises(ValueError, match=r"eval\.train: its class folders \(cat, owl"):
        (tmp_path / "train/dog").rename(tmp_path / "train/owl")
        judge("eval.methods=[kNN]")
    assert encoded == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_rounds_no_scores_together(judge, precision):
    found = judge("eval.methods=[GL-MCM,ODIN,MCM]", f"eval.precision={precision}").found["id"].scores
    assert all(len(set(scores.tolist())) == len(set(found["MCM"].tolist())) for scores in found.values())


def test_training_images_are_read_only_for_a_score_that_needs_them(judge, encoded):
    judge("eval.methods=[MSP]")
    assert sum(encoded) == 8 + 5


def test_a_checkpoint_that_is_named_twice_counts_once(judge, tmp_path):
    results = judge("eval.methods=[MSP]", f"eval.checkpoints=[{tmp_path}/clipn.pt,{tmp_path}/cl*.pt]").results
    assert len(results) == 1


def test_an_image_of_any_name_comes_into_the_report(judge, tmp_path):
    strange = os.fsencode(tmp_path / "ood") + b"/caf\xe9.png"
    os.rename(tmp_path / "ood/1.png", strange)
    (tmp_path / "ood/2.png").rename(os.fsdecode(os.fsencode(tmp_path / "ood") + b"/\xff.png"))
    judge("eval.methods=[MSP]")
    assert "</html>" in (tmp_path / "run/report.html").read_text()


def test_intervals_on_request(judge, tmp_path):
    judge("eval.bootstrap=50", "eval.methods=[MSP]")
    assert (tmp_path / "run/intervals.csv").is_file()
