"""Every method in one evaluation: what each needs, what is kept, and that each image is encoded once."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_evaluation
from helpers import write_images, write_noise

import clipn.evaluation.evaluate
from clipn.config.loading import load_config
from clipn.data.image_sets import ImageSet
from clipn.evaluation.evaluate import evaluate, score_features
from clipn.methods import from_images
from clipn.methods.registry import METHOD_NAMES
from clipn.model.head import Head
from clipn.pipeline import run_eval
from clipn.scores import SCORES


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """8 cats and dogs, 5 others, 80 training images, words, a model and a config of them."""
    folder = tmp_path_factory.mktemp("material")
    write_images(folder / "id", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(4)))
    write_noise(folder / "train", *(f"{'cat' if number % 2 else 'dog'}/{number}.png" for number in range(80)))
    write_images(folder / "ood", *(f"{n}.png" for n in range(5)))
    (folder / "words.txt").write_text("noun\tship\nnoun\tviolin\nnoun\tcloud\nadj\tred\nadj\tquiet\n")
    sections = f"""
features: {{part_size: 3}}
tagood: {{width: 8, heads: 2, layers: 1, epochs: 1}}
eval:
  {{id: {folder}/id, ood: {folder}/ood, templates: simple, train: {folder}/train, words: {folder}/words.txt}}
"""
    write_evaluation(folder, sections)
    return folder


@pytest.fixture
def evaluated(material, tmp_path):
    """(overrides) -> the evaluation of the 8 cats and dogs against the 5 others."""
    return lambda *words: evaluate(load_config(material / "config.yaml", [f"run.dir={tmp_path}/run", *words]))


def test_every_method_comes_from_one_pass(evaluated, tmp_path, encoded):
    methods = [method for method in METHOD_NAMES if method != "ODIN"]  # which encodes each image twice more
    first = evaluated(f"eval.methods=[{','.join(methods)}]")
    assert first.results["method"].tolist() == methods and list(first.set_scores["ood"].scores) == methods
    assert sum(encoded) == 2 * (8 + 5 + 80) + (8 + 5), "GL-MCM encodes each image once more, TagOOD training images too"
    names = [line.split("\t")[1] for line in (tmp_path / "run/negatives_NegLabel.tsv").read_text().splitlines()]
    assert names and set(names) <= {"ship", "violin", "cloud", "red", "quiet"}
    encoded.clear()
    again = evaluated(f"eval.methods=[{','.join(reversed(methods))}]")
    assert encoded == []
    for name, scores in again.set_scores["id"].scores.items():
        np.testing.assert_allclose(scores, first.set_scores["id"].scores[name], rtol=1e-5, err_msg=name)


def test_scores_of_images_are_computed_again_for_another_head_or_constant(evaluated, monkeypatch, encoded):
    def scores(*words):
        encoded.clear()
        return evaluated("eval.methods=[GL-MCM,ODIN]", *words).set_scores["id"].scores

    first = scores()
    assert encoded != []
    assert scores()["ODIN"].tolist() == first["ODIN"].tolist() and encoded == []
    assert scores("eval.class_names=[boat,tree]")["GL-MCM"].tolist() != first["GL-MCM"].tolist() and encoded != []
    changes = {"LOCAL_WEIGHT": (3.0, "GL-MCM"), "ODIN_TEMPERATURE": (10.0, "ODIN"), "ODIN_NOISE": (0.1, "ODIN")}
    for constant, (value, method) in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(from_images, constant, value)
            assert scores()[method].tolist() != first[method].tolist() and encoded != [], constant


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.methods=[kNN]", "eval.train=null"], r"kNN needs in-distribution training images.*eval\.train"),
        (["eval.methods=[CSP]", "eval.words=null"], r"CSP needs candidate words.*eval\.words"),
        (["eval.methods=[kNN,Nothing]"], "unknown score 'Nothing'; the scores are: MSP, .*NegLabel, .*kNN, .*ODIN"),
        (["eval.methods=[NegLabel]", "eval.words=nowhere.txt"], r"eval\.words: nowhere\.txt: no such word list"),
        (["eval.methods=[MSP,MSP]"], r"eval\.methods=.*named twice"),
    ],
)
def test_what_a_method_lacks_is_reported_before_any_image_is_encoded(evaluated, encoded, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluated(*words)
    assert encoded == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_scores_of_images_apart(evaluated, precision):
    scores = evaluated("eval.methods=[GL-MCM,ODIN]", f"eval.precision={precision}").set_scores["id"].scores
    assert all(len(set(values.tolist())) >= 6 for values in scores.values()), "8 different images"


def test_a_checkpoint_that_is_named_twice_is_evaluated_once_without_training_images_for_msp(
    evaluated, material, encoded
):
    names = f"eval.checkpoints=[{material}/clipn.pt,{material}/cl*.pt]"
    assert len(evaluated("eval.methods=[MSP]", names).results) == 1 and sum(encoded) == 8 + 5


def test_the_report_is_written_with_intervals_and_any_file_name(material, tmp_path):
    ood, run = write_images(tmp_path / "ood", "1.png", "2.png"), tmp_path / "run"
    for number, name in ((1, b"/caf\xe9.png"), (2, b"/\xff.png")):
        (ood / f"{number}.png").rename(os.fsdecode(os.fsencode(ood) + name))
    words = [f"run.dir={run}", f"eval.ood={ood}", "eval.bootstrap=50", "eval.methods=[MSP,NegLabel+CLIPN]"]
    run_eval(str(material / "config.yaml"), words)
    assert "</html>" in (run / "report.html").read_text() and (run / "intervals.csv").is_file()
    assert all((run / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("histograms", "samples"))
    assert "NegLabel+CLIPN" in (run / "results.md").read_text()


def test_features_are_scored_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    yes, no, features = torch.nn.functional.normalize(torch.randn(3, 11, 8, generator=generator), dim=2)
    head, images = Head(yes[:4], no[:4]), ImageSet("id", Path(), [Path()] * 11, [], [])
    arguments = head, images, features, [*SCORES, "mean"], 10.0, {"mean": lambda block: block.mean(dim=1)}
    whole = score_features(*arguments)
    np.testing.assert_allclose(whole.scores["mean"], features.mean(dim=1).numpy(), rtol=1e-6)
    monkeypatch.setattr(clipn.evaluation.evaluate, "_ROWS", 3)
    parts = score_features(*arguments)
    assert list(parts.scores) == [*SCORES, "mean"] and parts.predicted.tolist() == whole.predicted.tolist()
    for name, scores in whole.scores.items():
        np.testing.assert_allclose(parts.scores[name], scores, rtol=1e-4, atol=1e-6, err_msg=name)
