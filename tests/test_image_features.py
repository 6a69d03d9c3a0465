"""Evaluation: images are encoded once, kept, and encoded again only where they or the base have changed."""

import json
import os
from pathlib import Path

import pytest
from conftest import architecture, write_clipn
from helpers import files, write_images
from PIL import Image

import clipn.data.storage
import clipn.evaluation.evaluate
from clipn.config.loading import load_config
from clipn.evaluation.evaluate import evaluate


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """(words) -> results of an evaluation on 4 cats and dogs against 3 others, without the pictures."""
    write_images(tmp_path / "id", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    write_images(tmp_path / "ood", "1.png", "2.png", "3.png")
    (tmp_path / "model.json").write_text(json.dumps(architecture()))
    write_clipn(tmp_path / "clipn.pt")
    (tmp_path / "config.yaml").write_text(
        f"""
run: {{dir: {tmp_path}/run, device: cpu}}
model: {{name: {tmp_path}/model.json, pretrained: {tmp_path}/clipn.pt}}
data: {{workers: 0}}
features: {{dir: {tmp_path}/features, part_size: 2}}
eval: {{id: {tmp_path}/id, ood: {tmp_path}/ood, templates: simple, methods: [MSP, ATD]}}
"""
    )
    monkeypatch.setattr(clipn.evaluation.evaluate, "write_report", lambda *arguments, **more: None)
    return lambda *words: evaluate(load_config(tmp_path / "config.yaml", words)).results


def test_images_are_encoded_once_for_all_checkpoints_of_a_base(judge, tmp_path, encoded):
    first = judge()
    assert sum(encoded) == 7
    write_clipn(tmp_path / "no.pt", no_seed=5), write_clipn(tmp_path / "base.pt", base_seed=5)
    encoded.clear()
    assert judge("eval.scale=100").equals(first)
    other = judge(f"eval.checkpoints={tmp_path}/no.pt")
    assert encoded == [] and not other.equals(first)
    assert judge(f"eval.checkpoints={tmp_path}/no.pt", f"features.dir={tmp_path}/fresh").equals(other)
    encoded.clear()
    judge(f"eval.checkpoints={tmp_path}/base.pt")
    assert sum(encoded) == 7
    judge("eval.precision=bf16"), judge("model.image_mean=[0,0,0]")
    assert sum(encoded) == 21


def test_the_same_weights_in_another_architecture_are_encoded_anew(judge, tmp_path, encoded):
    judge()
    write_clipn(tmp_path / "gelu.pt", quick_gelu=True)
    judge(f"eval.checkpoints={tmp_path}/gelu.pt")
    assert sum(encoded) == 14


def test_changed_images_are_encoded_again(judge, tmp_path, encoded):
    judge()
    encoded.clear()
    Image.new("RGB", (13, 13), (250, 0, 0)).save(tmp_path / "ood/2.png")
    again = judge()
    assert sum(encoded) == 3
    assert again.equals(judge(f"features.dir={tmp_path}/fresh"))


def test_features_need_not_be_kept(judge, tmp_path):
    kept = judge(f"features.dir={tmp_path}/fresh")
    assert judge("eval.keep_features=false").equals(kept)
    assert files(tmp_path / "features") == [] and files(tmp_path / "fresh")


def test_an_image_that_cannot_be_read_today_may_be_tomorrow(judge, tmp_path, monkeypatch):
    first, broken = judge(), tmp_path / "ood/2.png"
    (tmp_path / "features").rename(tmp_path / "before")
    read = Path.read_bytes
    monkeypatch.setattr(clipn.data.storage, "FIRST_PAUSE", 0.0)

    def failing(path):
        if path == broken:
            raise OSError("Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert not judge().equals(first)
    monkeypatch.setattr(Path, "read_bytes", read)
    assert judge().equals(first)


def test_an_unreadable_image_is_left_out_and_told(judge, tmp_path, monkeypatch):
    monkeypatch.undo()  # with the pictures
    (tmp_path / "id/cat/2.png").write_bytes(b"no image")
    for _ in range(2):  # the second time from what is kept
        found = judge()
        report = (tmp_path / "run/results.md").read_text()
        assert "Unreadable images were left out: 1 of 4 in id." in report and f"- {tmp_path}/id/cat/2.png\n" in report
    os.remove(tmp_path / "id/cat/2.png")
    assert found.equals(judge()) and found["id_accuracy"].notna().all()
    assert "Unreadable" not in (tmp_path / "run/results.md").read_text()
    for path in (tmp_path / "ood").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"'ood': none of the 3 images in {tmp_path}/ood is readable"):
        judge()
