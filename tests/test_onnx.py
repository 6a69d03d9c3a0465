"""The ONNX export against torch: small models, any batch size, real photos."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import write_clipn
from helpers import files, write_images

import clipn
from clipn.cli import main
from clipn.data.images import open_image
from clipn.deploy import onnx as onnx_export
from clipn.deploy.onnx import OUTPUTS, OnnxModel, compare, export_onnx
from clipn.deploy.sharing import share_weights

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package)
onnxruntime = pytest.importorskip("onnxruntime")

PHOTOS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "photos"
NAMES = ["Käfer", "犬", "dog"]
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def torch_outputs(detector, images):
    with torch.no_grad():
        return OnnxModel(detector)(images)


def detector_of(checkpoint, names=NAMES, **options):
    return clipn.Detector.from_pretrained(checkpoint, names, templates=["a photo of a {}."], device="cpu", **options)


def by_name(outputs):
    return dict(zip(OUTPUTS, outputs, strict=True))


def close(actual, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), **tolerance)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return detector_of(write_clipn(tmp_path_factory.mktemp("model") / "a.pt"))


@pytest.fixture(scope="module", params=[("vit", {}, 2), ("resnet", RESNET, 0)], ids=lambda param: param[0])
def exported(request, tmp_path_factory):
    """A detector, its file's session and torch's program; the ResNet is the hand-crafted variant."""
    name, vision, num_prompts = request.param
    folder = tmp_path_factory.mktemp(name)
    detector = detector_of(write_clipn(folder / "a.pt", num_prompts=num_prompts, vision=vision))
    programs, export = [], torch.onnx.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.onnx, "export", lambda *args, **options: programs.append(export(*args, **options)) or programs[0]
        )
        differences = export_onnx(detector, folder / "a.onnx")
    assert max(differences.values()) < 1e-5 and files(folder) == ["a.onnx", "a.pt"]
    return detector, session_of(folder / "a.onnx"), programs[0]


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_size_gives_torchs_outputs_and_the_packages_scores(exported, batch):
    detector, session, _ = exported
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    outputs = by_name(session.run(None, {"images": images.numpy()}))
    for name, expected in by_name(torch_outputs(detector, images)).items():
        assert outputs[name].shape == (expected.shape if name.startswith("logits") else (batch,)), name
        close(outputs[name], expected, rtol=1e-4, atol=1e-4, msg=name)
    logits = detector.head(detector.model.encode_image(images))
    for name in ("CTW", "ATD"):
        close(outputs[f"score_{name}"], clipn.scores.SCORES[name](*logits).detach(), rtol=1e-4, atol=1e-5)


def test_each_output_is_what_its_name_says(detector):
    image, module = torch.randn(1, 3, 32, 32), OnnxModel(detector)
    feature = detector.model.encode_image(image).detach()
    module.head = clipn.Head(feature * torch.tensor([[0.99], [1.0], [1.0]]), 0.98 * feature.expand(3, -1))
    outputs = by_name(module(image))
    close(outputs["logits_yes"], torch.tensor([[99.0, 100.0, 100.0]]))
    close(outputs["logits_no"], torch.full((1, 3), 98.0))
    yes = torch.tensor([1.0, 2.0, 2.0]).sigmoid()
    close(outputs["score_CTW"], yes[1:2])
    close(outputs["score_ATD"], (yes * torch.tensor([-1.0, 0, 0]).softmax(0)).sum()[None])
    assert outputs["label"].item() in (1, 2) and not outputs["is_ood_CTW"] and not outputs["is_ood_ATD"]
    module.head = clipn.Head(feature.expand(3, -1), 0.99 * feature.expand(3, -1))  # yes for all classes alike
    outputs = by_name(module(image))
    assert not outputs["is_ood_CTW"] and outputs["is_ood_ATD"]


def test_the_metadata_describe_the_file(exported):
    detector, session, _ = exported
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["clipn_class_names"] == NAMES and metadata["clipn_scale"] == 100.0
    assert metadata["clipn_preprocess"]["mean"] == list(detector.model.preprocess["mean"])
    assert [output.name for output in session.get_outputs()] == list(OUTPUTS)


def test_the_comparison_detects_what_differs(exported):
    detector, session, _ = exported
    images = torch.randn(20, 3, 32, 32)
    assert max(compare(session, OnnxModel(detector), images, batch_size=8).values()) < 1e-5
    other = detector.with_classes(["Käfer", "犬", "cat"])
    assert compare(session, OnnxModel(other), images)["cosine"] > 1e-3
    assert compare(session, OnnxModel(detector), images * torch.nan)["cosine"] == torch.inf

    def changed(name, change):
        class Changed:
            def run(self, names, feed):
                values = by_name(session.run(names, feed))
                return list((values | {name: change(values[name])}).values())

        return compare(Changed(), OnnxModel(detector), images)["score"]

    assert changed("label", lambda label: (label + 1) % 3) == torch.inf
    assert changed("score_CTW", lambda score: score + 0.25) == pytest.approx(0.25, abs=1e-5)
    assert changed("score_ATD", lambda score: score * torch.nan) == torch.inf


def test_a_file_that_differs_is_not_written(exported, tmp_path, monkeypatch):
    detector, _, program = exported
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: program)
    with pytest.raises(ValueError, match=r"a\.onnx: not written: onnxruntime differs from torch by"):
        export_onnx(detector.with_classes(["Käfer", "犬", "cat"]), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(detector, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("unsupported operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match="cannot export this image tower: unsupported operator$"):
        export_onnx(detector, tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="onnxscript is missing: pip install onnx onnxscript onnxruntime"):
        export_onnx(detector, tmp_path / "a.onnx")


def test_the_command_on_a_shared_file_with_large_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "LARGEST", 0)  # as if the weights had 2 GB
    write_clipn(tmp_path / "a.pt")
    share_weights(tmp_path / "a.pt", tmp_path / "shared")
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    photos = write_images(tmp_path / "photos", *(f"a/{n}.png" for n in range(100)))
    source, base, out = tmp_path / "shared", tmp_path / "a.pt", tmp_path / "new" / "a.onnx"
    words = f"export onnx {source} --base {base} --classes {tmp_path}/names.txt --out {out}".split()
    main([*words, "--check", str(photos)])
    printed = capsys.readouterr().out
    assert "on 50 images of" in printed and f"done: {out}" in printed
    assert files(out.parent) == ["a.onnx", "a.onnx.data"]
    expected = OnnxModel(clipn.Detector.from_pretrained(base, NAMES, device="cpu"))
    assert max(compare(session_of(out), expected, torch.randn(3, 3, 32, 32)).values()) < 1e-5
    for option, value, message in (
        ("check", "nowhere", "no such folder, or no image in it"),
        ("scale", "0", "positive"),
    ):
        with pytest.raises(SystemExit):
            main([*words, f"--{option}={value}"])
        error = capsys.readouterr().err
        assert "error: " in error and f"{option}=" in error and value in error and message in error


def test_real_photos(golden, tmp_path):
    archive = PHOTOS / "cifar10_test.tar"
    if not archive.is_file():
        pytest.skip("shared/data/photos is not beside the project")
    detector = clipn.Detector.from_pretrained(
        golden["checkpoint"], golden["classes"], golden["config"], golden["prompts"], device="cpu"
    )
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()][::40]
        images = torch.stack([detector.preprocess(open_image(tar.extractfile(member).read())) for member in members])
    assert len(images) >= 50
    differences = export_onnx(detector, tmp_path / "a.onnx", images)
    assert max(differences.values()) < 1e-5
    outputs = by_name(session_of(tmp_path / "a.onnx").run(None, {"images": images.numpy()}))
    expected = by_name(torch_outputs(detector, images))
    best, second = expected["logits_yes"].topk(2, dim=1).values.T
    clear = best - second > 1e-2  # near-tied classes may swap
    assert clear.sum() >= 40 and torch.equal(torch.from_numpy(outputs["label"])[clear], expected["label"][clear])
