"""Features of image sets: encoded once, kept, and encoded again only where images, base or scores have changed."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import architecture, write_clipn, write_evaluation
from helpers import files, write_images
from PIL import Image

import clipn.data.storage
from clipn.config.loading import load_config
from clipn.data.image_sets import open_image_sets
from clipn.features.image_sets import image_set_features
from clipn.model.clipn import configured_model, create_model_and_transforms
from clipn.model.hashing import weights_hash
from clipn.pipeline import run_eval


@pytest.fixture
def config_path(tmp_path):
    """An evaluation on 4 images of cats and dogs against 3 others; features are kept 2 to a part."""
    write_images(tmp_path / "id", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    write_images(tmp_path / "ood", "1.png", "2.png", "3.png")
    sections = f"""
features: {{dir: {tmp_path}/features, part_size: 2}}
eval: {{id: {tmp_path}/id, ood: {tmp_path}/ood, templates: simple, methods: [MSP, ATD]}}
"""
    return write_evaluation(tmp_path, sections)


@pytest.fixture
def encode(config_path):
    """(key=value overrides, scores and scores_of) -> by set: the readable images, their features and scores."""

    def _encode(*overrides, **scores):
        config = load_config(config_path, overrides)
        model = configured_model(config.model, "cpu")
        image_sets = open_image_sets(config.eval.id, "eval.id") + open_image_sets(config.eval.ood, "eval.ood")
        return {result[0].name: result for result in image_set_features(config, model, image_sets, **scores)}

    return _encode


def equal(first, second) -> bool:
    return all(torch.equal(first[name][1], second[name][1]) for name in ("id", "ood"))


def test_images_are_encoded_once_for_all_checkpoints_of_a_base(encode, tmp_path, encoded):
    first = encode()
    assert sum(encoded) == 7 and [len(features) for _, features, _ in first.values()] == [4, 3]
    write_clipn(tmp_path / "no.pt", no_seed=5), write_clipn(tmp_path / "base.pt", base_seed=5)
    assert equal(encode(), first) and equal(encode(f"model.pretrained={tmp_path}/no.pt", "eval.scale=20"), first)
    assert sum(encoded) == 7
    assert not equal(encode(f"model.pretrained={tmp_path}/base.pt"), first)
    assert sum(encoded) == 14


def test_another_way_to_encode_encodes_again(encode, tmp_path, encoded):
    encode()
    activation = f"model.pretrained={write_clipn(tmp_path / 'gelu.pt', quick_gelu=True)}"  # of the same weights
    for number, change in enumerate(("eval.precision=bf16", "model.image_mean=[0,0,0]", activation), start=2):
        encode(change)
        assert sum(encoded) == 7 * number, change


def test_changed_images_are_encoded_again(encode, tmp_path, encoded):
    before = encode()
    Image.new("RGB", (13, 13), (250, 0, 0)).save(tmp_path / "ood/2.png")
    after = encode()
    assert sum(encoded) == 10
    changed = (before["ood"][1] - after["ood"][1]).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == [False, True, False]


def test_scores_of_images_are_computed_in_the_same_pass_and_kept(encode, encoded):
    calls = []

    def brightness(pixels):
        calls.append(len(pixels))
        return pixels.mean(dim=(1, 2, 3))

    first = encode(scores={"brightness": brightness}, scores_of="scale 1")
    assert sum(encoded) == sum(calls) == 7 and first["ood"][2]["brightness"].shape == (3,)
    again = encode(scores={"brightness": brightness}, scores_of="scale 1")
    assert sum(calls) == 7 and torch.equal(again["id"][2]["brightness"], first["id"][2]["brightness"])
    encode(scores={"brightness": brightness}, scores_of="scale 2")
    assert sum(calls) == 14


def test_the_towers_output_is_kept_where_a_method_asks_for_it(encode, tmp_path, encoded):
    plain = encode()
    asked = encode(tower=True)
    assert sum(encoded) == 14 and equal(asked, plain)
    assert all(
        result[2]["tower"].dtype == torch.float16 and "tower" not in plain[name][2] for name, result in asked.items()
    )
    assert [tuple(asked[name][2]["tower"].shape) for name in ("id", "ood")] == [(4, 64), (3, 64)]
    assert equal(encode(), plain) and equal(encode(tower=True), plain) and sum(encoded) == 14, "both are kept"
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "features").rglob("manifest.json")]
    assert sorted(manifest.get("tower", "") for manifest in manifests) == ["", "", "float16", "float16"]
    encode("features.dtype=float32", tower=True)
    assert sum(encoded) == 21


def test_features_with_the_towers_output_serve_other_methods(encode, tmp_path, encoded):
    asked = encode(tower=True)
    again = encode()
    assert sum(encoded) == 7 and equal(again, asked) and "tower" not in again["id"][2]


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
NARROW = {"attentional_pool": True, "attn_pooler_heads": 2}


@pytest.mark.parametrize(
    ("vision", "width"), [({}, 64), (NARROW, 32), (RESNET, 32), (TIMM, 32)], ids=["ViT", "pooling", "ResNet", "timm"]
)
def test_the_projected_and_normalised_output_is_the_feature(vision, width):
    if vision is TIMM:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model, _, _ = create_model_and_transforms(architecture(vision))
    size = model.preprocess["size"]
    images = torch.randn(3, 3, *((size, size) if isinstance(size, int) else size))
    visual = model.base.visual
    weights = weights_hash(visual)
    with torch.inference_mode():
        features, tower = model.encode_image_with_tower(images)
        assert torch.equal(features, model.encode_image(images)) and weights_hash(visual) == weights
    assert tower.shape == (3, width) and (tower.norm(dim=1) - 1).abs().min() > 1e-3, "not normalised"
    projection = getattr(visual, "proj", None)
    assert (projection is None) == (vision in (RESNET, TIMM))
    projected = tower if projection is None else tower @ projection
    torch.testing.assert_close(F.normalize(projected, dim=1), features)


def test_features_need_not_be_kept(encode, tmp_path):
    kept = encode(f"features.dir={tmp_path}/kept")
    assert equal(encode("eval.keep_features=false"), kept)
    assert files(tmp_path / "features") == [] and files(tmp_path / "kept")


def test_an_image_that_could_not_be_read_is_tried_again(encode, tmp_path, monkeypatch):
    read, broken = Path.read_bytes, tmp_path / "ood/2.png"
    monkeypatch.setattr(clipn.data.storage, "FIRST_PAUSE", 0.0)

    def failing(path):
        if path == broken:
            raise OSError("Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert encode()["ood"][0].left_out == [broken]
    monkeypatch.setattr(Path, "read_bytes", read)
    images, features, _ = encode()["ood"]
    assert images.left_out == [] and len(features) == 3


def test_an_unreadable_image_is_left_out(encode, tmp_path):
    broken = tmp_path / "id/cat/2.png"
    broken.write_bytes(b"no image")
    images, features, _ = encode()["id"]
    assert images.left_out == [broken] and images.labels == [0, 1, 1]
    kept, kept_features, _ = encode()["id"]  # read from the store
    assert kept == images and torch.equal(kept_features, features)
    broken.unlink()
    alone, alone_features, _ = encode()["id"]
    assert alone.paths == images.paths and alone.left_out == []
    torch.testing.assert_close(alone_features, features, rtol=1e-4, atol=1e-5)  # encoded in other batches
    for path in (tmp_path / "ood").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"'ood': none of the 3 images in {tmp_path}/ood is readable"):
        encode()


def test_an_evaluation_reports_unreadable_images(config_path, tmp_path, no_figures):
    (tmp_path / "id/cat/2.png").write_bytes(b"no image")
    for _ in range(2):  # the second time from the kept features
        run_eval(str(config_path), [])
        report = (tmp_path / "run/results.md").read_text()
        assert "Unreadable images were left out: 1 of 4 in id." in report and f"- {tmp_path}/id/cat/2.png\n" in report
    (tmp_path / "id/cat/2.png").unlink()
    run_eval(str(config_path), [])
    assert "Unreadable" not in (tmp_path / "run/results.md").read_text()
