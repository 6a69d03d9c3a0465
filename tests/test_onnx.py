"""The ONNX export against torch: small models, any batch size, real photos."""

import contextlib
import io
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

PHOTOS = Path(__file__).resolve().parents[2] / "shared/data/photos/cifar10_test.tar"  # optional, beside the project
NAMES = ["Käfer", "犬", "dog"]
TEMPLATES = ["a photo of a {}."]
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def by_name(outputs):
    return dict(zip(OUTPUTS, outputs, strict=True))


def torch_outputs(module, images):
    with torch.no_grad():
        return by_name(module(images))


def close(actual, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), **tolerance)


@pytest.fixture(scope="module")
def by_function(golden, tmp_path_factory):
    """The golden model's detector, its file's session and torch's program."""
    path, programs, export = tmp_path_factory.mktemp("golden") / "a.onnx", [], torch.onnx.export
    detector = clipn.Detector.from_pretrained(golden["checkpoint"], NAMES, golden["config"], TEMPLATES, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.onnx, "export", lambda *args, **named: programs.append(export(*args, **named)) or programs[0]
        )
        differences = export_onnx(detector, path)
    assert max(differences.values()) < 1e-5 and files(path.parent) == ["a.onnx"]
    return detector, session_of(path), programs[0]


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    """A ResNet without prompts as a shared file, exported by the command as if its weights had 2 GB."""
    folder = tmp_path_factory.mktemp("command")
    base, out = write_clipn(folder / "a.pt", num_prompts=0, vision=RESNET), folder / "new" / "a.onnx"
    share_weights(base, folder / "shared")
    (folder / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    (folder / "templates.txt").write_text(TEMPLATES[0])
    write_images(folder / "photos", *(f"a/{n}.png" for n in range(100)))
    words = f"export onnx {folder}/shared --base {base} --classes {folder}/names.txt --out {out} "
    words += f"--templates {folder}/templates.txt --check {folder}/photos"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(onnx_export, "LARGEST", 0)
        main(words.split())
    assert "on 50 images of" in printed.getvalue() and f"done: {out}" in printed.getvalue()
    assert files(out.parent) == ["a.onnx", "a.onnx.data"]
    return clipn.Detector.from_pretrained(base, NAMES, templates=TEMPLATES, device="cpu"), session_of(out)


@pytest.fixture(params=["by_function", "by_command"])
def exported(request):
    return request.getfixturevalue(request.param)[:2]


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_size_gives_torchs_outputs_and_the_detectors_scores(exported, batch):
    detector, session = exported
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    outputs = by_name(session.run(None, {"images": images.numpy()}))
    for name, expected in torch_outputs(OnnxModel(detector), images).items():
        assert outputs[name].shape == (expected.shape if name.startswith("logits") else (batch,)), name
        close(outputs[name], expected, rtol=1e-4, atol=1e-4, msg=name)
    for n, result in enumerate(detector.predict(torch.unbind(images))):
        for name in ("CTW", "ATD"):
            close(outputs[f"score_{name}"][n], result.scores[name], rtol=1e-4, atol=1e-5, check_dtype=False)


def test_each_output_is_what_its_name_says(by_command):
    image, module = torch.randn(1, 3, 32, 32), OnnxModel(by_command[0])
    feature = module.model.encode_image(image).detach()
    module.head = clipn.Head(feature * torch.tensor([[0.99], [1.0], [1.0]]), 0.98 * feature.expand(3, -1))
    outputs = torch_outputs(module, image)
    close(outputs["logits_yes"], torch.tensor([[99.0, 100.0, 100.0]]))
    close(outputs["logits_no"], torch.full((1, 3), 98.0))
    yes = torch.tensor([1.0, 2.0, 2.0]).sigmoid()
    close(outputs["score_CTW"], yes[1:2])
    close(outputs["score_ATD"], (yes * torch.tensor([-1.0, 0, 0]).softmax(0)).sum()[None])
    assert outputs["label"].item() in (1, 2) and not outputs["is_ood_CTW"] and not outputs["is_ood_ATD"]
    module.head = clipn.Head(feature.expand(3, -1), 0.99 * feature.expand(3, -1))  # yes for all classes alike
    outputs = torch_outputs(module, image)
    assert not outputs["is_ood_CTW"] and outputs["is_ood_ATD"]


def test_the_metadata_describe_the_file(exported):
    detector, session = exported
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["clipn_class_names"] == NAMES and metadata["clipn_scale"] == 100.0
    assert metadata["clipn_preprocess"]["mean"] == list(detector.model.preprocess["mean"])
    assert [output.name for output in session.get_outputs()] == list(OUTPUTS)


def test_the_comparison_detects_what_differs(exported):
    detector, session = exported
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


def test_a_file_that_differs_is_not_written(by_function, tmp_path, monkeypatch):
    detector, _, program = by_function
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: program)
    with pytest.raises(ValueError, match=r"a\.onnx: not written: onnxruntime differs from torch by"):
        export_onnx(detector.with_classes(["Käfer", "犬", "cat"]), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(by_command, tmp_path, monkeypatch):
    detector = by_command[0]

    def fail(*arguments, **options):
        raise RuntimeError("unsupported operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match="cannot export this image tower: unsupported operator$"):
        export_onnx(detector, tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="onnxscript is missing: pip install onnx onnxscript onnxruntime"):
        export_onnx(detector, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("option", "message"),
    [("--check=nowhere", "--check='nowhere': no such folder, or no image in it"), ("--scale=0", "scale=0")],
)
def test_bad_options_are_one_line(tmp_path, capsys, option, message):
    source = write_clipn(tmp_path / "a.pt")
    with pytest.raises(SystemExit):
        main(["export", "onnx", str(source), "--classes", "a,b", "--out", str(tmp_path / "a.onnx"), option])
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.skipif(not PHOTOS.is_file(), reason="shared/data/photos is not beside the project")
def test_real_photos(by_function):
    detector, session, _ = by_function
    with tarfile.open(PHOTOS) as tar:
        members = [member for member in tar.getmembers() if member.isfile()][::40]
        images = [detector.preprocess(open_image(tar.extractfile(member).read())) for member in members]
    images = torch.stack(images)
    assert len(images) >= 50 and max(compare(session, OnnxModel(detector), images).values()) < 1e-5
    outputs = by_name(session.run(None, {"images": images.numpy()}))
    expected = torch_outputs(OnnxModel(detector), images)
    best, second, *_ = expected["logits_yes"].topk(2, dim=1).values.T
    clear = best - second > 1e-2  # near-tied classes may swap
    assert clear.sum() >= 40 and torch.equal(torch.from_numpy(outputs["label"])[clear], expected["label"][clear])
