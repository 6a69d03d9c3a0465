"""Checkpoint files: layouts, errors that name keys, safety, atomic writing."""

import pickle

import open_clip
import pytest
import torch
from conftest import architecture, write_clipn
from safetensors.torch import save_file

import clipn
from clipn.model.base import build_base
from clipn.model.checkpoint import read_checkpoint, write_checkpoint
from clipn.model.clipn import load_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The content of a CLIPN checkpoint."""
    return torch.load(write_clipn(tmp_path_factory.mktemp("clipn") / "clipn.pt"), weights_only=True)


def load(path):
    return clipn.create_model_and_transforms(architecture(), path)[0]


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_our_file_has_exactly_the_published_keys_and_shapes(golden, tmp_path):
    published = torch.load(golden["checkpoint"], weights_only=True)
    model, _, _ = clipn.create_model_and_transforms(golden["config"], golden["checkpoint"])
    content = {"epoch": 1, "name": "ours", "state_dict": model.published_state()}
    write_checkpoint(content, tmp_path / "epoch_1.pt")
    ours = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    assert ours.keys() == published.keys()
    expected = {key.removeprefix("module."): value.float() for key, value in published["state_dict"].items()}
    assert_equal(ours["state_dict"], expected)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", ["wrapped", "bare", "safetensors"])
def test_layouts_of_a_file(written, tmp_path, prefix, layout):
    state = {prefix + key: value.clone() for key, value in written["state_dict"].items()}
    if layout == "safetensors":
        save_file(state, tmp_path / "a.safetensors")
    else:
        torch.save({"epoch": 3, "state_dict": state} if layout == "wrapped" else state, tmp_path / "a.pt")
    assert_equal(load(next(tmp_path.iterdir())).published_state(), written["state_dict"])


def test_open_clips_flat_file_loads(tmp_path):
    """A file that open_clip itself saves of a model without a separate text module."""
    plain = open_clip.CLIP(**architecture())
    torch.save({"epoch": 1, "state_dict": plain.state_dict()}, tmp_path / "clip.pt")
    base, _ = build_base(architecture(), tmp_path / "clip.pt")
    assert torch.equal(base.text.ln_final.weight, plain.ln_final.weight)
    assert torch.equal(base.text.token_embedding.weight, plain.token_embedding.weight)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ln_final_no.weight", None, r"a\.pt: does not fit this model: missing: ln_final_no\.weight$"),
        ("visual.proj", None, r"missing: visual\.proj$"),
        ("logit_scale", None, "missing: logit_scale$"),
        ("extra.weight", torch.ones(1), r"unexpected: extra\.weight$"),
        ("ln_final.bias", torch.ones(48), r"other shapes: ln_final\.bias \(48,\) instead of \(32,\)$"),
        ("ln_final_no.bias", torch.full((32,), torch.nan), r"NaN or infinite weights in: ln_final_no\.bias$"),
    ],
)
def test_a_key_that_does_not_fit_is_named(written, key, value, message):
    state = {name: value for name, value in (written["state_dict"] | {key: value}).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_model({"state_dict": state}, "a.pt", architecture())


class Crafted:
    """An object that would write a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_crafted_checkpoint_is_refused_and_not_executed(tmp_path):
    target = tmp_path / "executed"
    torch.save({"state_dict": {"a": Crafted(target)}}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Crafted(target), protocol=2))
    target.unlink(missing_ok=True)
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(ValueError, match="refused"):
            read_checkpoint(tmp_path / name)
    assert not target.exists()


def test_a_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        read_checkpoint("missing.pt")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 broken zip", b"\x80\x02.", 10, 100_000, -10])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_damaged_file_is_refused(written, tmp_path, content, name):
    if isinstance(content, int):  # a whole file cut at this size
        save = save_file if name == "a.safetensors" else torch.save
        save(written["state_dict"], tmp_path / "whole")
        content = (tmp_path / "whole").read_bytes()[:content]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"state_dict": [1]}, [1, 2], {"state_dict": {"a": 3}}])
def test_contents_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: (holds no weights|a is int, expected a tensor)"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("foo", 1), ("interpolation", "magic"), ("resize_mode", "magic"), ("size", 64)),
        *(("mean", [0.5]), ("mean", "grey"), ("std", [0.2, 0.2, 0.0])),
    ],
)
def test_an_impossible_preprocessing_is_one_line(written, key, value):
    with pytest.raises(ValueError, match="3 means, 3 deviations above 0, and the tower's size") as error:
        load_model(written | {"preprocess": {key: value}}, "a.pt", written["architecture"])
    assert "a.pt" in str(error.value) and key in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("metadata", [{"config": {"model": [1]}}, {"config": [1]}, {"preprocess": "x"}])
def test_metadata_of_another_type_is_one_line(written, tmp_path, metadata):
    torch.save(written | metadata, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: its \w+.* expected dict$"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("part", [{"text_cfg": "x"}, {"vision_cfg": {"width": 10**7, "layers": 10**6}}])
def test_an_architecture_that_cannot_be_built_is_one_line(written, part):
    with pytest.raises(ValueError, match="not a model that open_clip can build") as error:
        load_model(written, "a.pt", written["architecture"] | part)
    assert "\n" not in str(error.value)
