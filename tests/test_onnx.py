"""The ONNX export against torch: small models, any batch, real photos."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import architecture, write_clipn
from helpers import files, write_images

import clipn
from clipn import onnx_export
from clipn.data.images import open_image, val_transform
from clipn.deploy.onnx import OUTPUTS, OnnxModel, compare, export_onnx
from clipn.deploy.sharing import share_weights
from clipn.model.weights import open_model
from scripts import export

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package)
onnxruntime = pytest.importorskip("onnxruntime")

PHOTOS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "photos"
NAMES = ["Käfer", "犬", "dog"]
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def head_of(model, names=NAMES):
    return clipn.build_head(model, clipn.get_tokenizer(model.architecture), names, ["a photo of a {}."])


def torchs(model, head, images):
    with torch.no_grad():
        return OnnxModel(model, head)(images)


@pytest.fixture(scope="module", params=[("vit", {}, 2), ("resnet", RESNET, 0)], ids=lambda param: param[0])
def exported(request, tmp_path_factory):
    """A model, its head, and the session of its file; the ResNet is the hand-crafted variant without prompts."""
    name, vision, num_prompts = request.param
    folder = tmp_path_factory.mktemp(name)
    write_clipn(folder / "a.pt", num_prompts=num_prompts, vision=vision)
    model = open_model(folder / "a.pt")
    head = head_of(model)
    found = export_onnx(model, head, NAMES, folder / "a.onnx", scale=100.0)
    assert max(found.values()) < 1e-5 and files(folder) == ["a.onnx", "a.pt"]
    return model, head, session_of(folder / "a.onnx")


@pytest.mark.parametrize("batch", [1, 5])
def test_any_number_of_images_at_once(exported, batch):
    model, head, session = exported
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    for name, found, expected in zip(
        OUTPUTS, session.run(None, {"images": images.numpy()}), torchs(model, head, images), strict=True
    ):
        assert found.shape == (expected.shape if name.startswith("logits") else (batch,)), name
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4, msg=name)


def test_the_scores_are_those_of_the_package(exported):
    model, head, session = exported
    images = torch.randn(4, 3, 32, 32)
    found = dict(zip(OUTPUTS, session.run(None, {"images": images.numpy()}), strict=True))
    logits = head(model.encode_image(images))
    for name in ("CTW", "ATD"):
        expected = clipn.scores.SCORES[name](*logits).detach()
        torch.testing.assert_close(torch.from_numpy(found[f"score_{name}"]), expected, rtol=1e-4, atol=1e-5)


def test_each_output_is_what_its_name_says(tmp_path):
    model = open_model(write_clipn(tmp_path / "a.pt"))
    image = torch.randn(1, 3, 32, 32)
    feature = model.encode_image(image).detach()
    head = clipn.Head(feature * torch.tensor([[0.99], [1.0], [1.0]]), 0.98 * feature.expand(3, -1))
    found = dict(zip(OUTPUTS, torchs(model, head, image), strict=True))
    torch.testing.assert_close(found["logits_yes"], torch.tensor([[99.0, 100.0, 100.0]]))
    torch.testing.assert_close(found["logits_no"], torch.full((1, 3), 98.0))
    yes = torch.tensor([1.0, 2.0, 2.0]).sigmoid()
    torch.testing.assert_close(found["score_CTW"], yes[1:2])
    torch.testing.assert_close(found["score_ATD"], (yes * torch.tensor([-1.0, 0, 0]).softmax(0)).sum()[None])
    assert found["label"].item() in (1, 2) and not found["is_ood_CTW"] and not found["is_ood_ATD"]
    unsure = clipn.Head(
        feature.expand(3, -1), 0.99 * feature.expand(3, -1)
    )  # "yes" wins, for no class more than others
    found = dict(zip(OUTPUTS, torchs(model, unsure, image), strict=True))
    assert not found["is_ood_CTW"] and found["is_ood_ATD"]


def test_the_file_says_what_its_user_needs(exported):
    model, _, session = exported
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert told["clipn_class_names"] == NAMES and told["clipn_scale"] == 100.0
    assert told["clipn_preprocess"]["mean"] == list(model.preprocess["mean"])
    assert [output.name for output in session.get_outputs()] == list(OUTPUTS)


def test_the_check_finds_what_differs(exported):
    model, head, session = exported
    images = torch.randn(20, 3, 32, 32)
    assert max(compare(session, OnnxModel(model, head), images, batch_size=8).values()) < 1e-5
    other = head_of(model, ["Käfer", "犬", "cat"])
    assert compare(session, OnnxModel(model, other), images)["cosine"] > 1e-3
    assert compare(session, OnnxModel(model, head), images * torch.nan)["cosine"] == torch.inf

    def changed(name, change):
        class Changed:
            def run(self, names, feed):
                values = dict(zip(OUTPUTS, session.run(names, feed), strict=True))
                return list((values | {name: change(values[name])}).values())

        return compare(Changed(), OnnxModel(model, head), images)["score"]

    assert changed("label", lambda label: (label + 1) % 3) == torch.inf
    assert changed("score_CTW", lambda score: score + 0.25) == pytest.approx(0.25, abs=1e-5)
    assert changed("score_ATD", lambda score: score * torch.nan) == torch.inf


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    model = open_model(write_clipn(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"a\.onnx: not written: onnxruntime differs from torch by"):
        export_onnx(model, head_of(model), NAMES, tmp_path / "a.onnx")
    assert files(tmp_path) == ["a.pt"] and [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch):
    model = open_model(write_clipn(tmp_path / "a.pt"))
    head = head_of(model)
    with pytest.raises(ValueError, match="scale=0: expected a positive number"):
        export_onnx(model, head, NAMES, tmp_path / "a.onnx", scale=0)

    def fail(*arguments, **more):
        raise RuntimeError("unheard-of operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match="cannot export this image tower: unheard-of operator$"):
        export_onnx(model, head, NAMES, tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="onnxscript is missing: pip install onnx onnxscript onnxruntime"):
        export_onnx(model, head, NAMES, tmp_path / "a.onnx")


def test_the_command_on_a_shared_file_with_large_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "LARGEST", 0)  # as if they were 2 GB
    write_clipn(tmp_path / "a.pt")
    share_weights(tmp_path / "a.pt", tmp_path / "shared")
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    photos = write_images(tmp_path / "photos", *(f"a/{n}.png" for n in range(100)))
    words = f"onnx {tmp_path}/shared --base {tmp_path}/a.pt --classes {tmp_path}/names.txt --out {tmp_path}/new/a.onnx"
    export.main([*words.split(), "--check", str(photos)])
    told = capsys.readouterr().out
    assert "on 50 images of" in told and f"done: {tmp_path}/new/a.onnx" in told
    assert files(tmp_path / "new") == ["a.onnx", "a.onnx.data"]
    model = open_model(tmp_path / "a.pt")
    head = clipn.build_head(model, clipn.get_tokenizer(architecture()), NAMES, clipn.data.prompts.simple_templates())
    images = torch.randn(3, 3, 32, 32)
    assert max(compare(session_of(tmp_path / "new" / "a.onnx"), OnnxModel(model, head), images).values()) < 1e-5
    with pytest.raises(FileNotFoundError, match="--check='nowhere': no such folder, or no image in it"):
        export.main([*words.split(), "--check", "nowhere"])


def test_real_photos(golden, tmp_path):
    archive = PHOTOS / "cifar10_test.tar"
    if not archive.is_file():
        pytest.skip("the photos (shared/data/photos beside the project) are not here")
    model = open_model(golden["checkpoint"], golden["config"])
    head = clipn.build_head(model, clipn.get_tokenizer(golden["config"]), golden["classes"], golden["prompts"])
    transform = val_transform(model.preprocess)
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()][::40]
        images = torch.stack([transform(open_image(tar.extractfile(member).read())) for member in members])
    assert len(images) >= 50
    found = export_onnx(model, head, golden["classes"], tmp_path / "a.onnx", images=images)
    assert max(found.values()) < 1e-5
    values = session_of(tmp_path / "a.onnx").run(None, {"images": images.numpy()})
    for name, value, expected in zip(OUTPUTS, values, torchs(model, head, images), strict=True):
        if name.startswith(("label", "is_ood")):
            assert torch.equal(torch.from_numpy(value), expected), name
