"""Checkpoint files: layouts, errors that name keys, safety, and atomic writing."""

import pickle

import pytest
import torch
from conftest import architecture, write_clipn
from safetensors.torch import save_file

import clipn
from clipn.model.base import build_base
from clipn.model.checkpoint import read_checkpoint, write_checkpoint


@pytest.fixture
def model():
    torch.manual_seed(0)
    return clipn.create_model_and_transforms(architecture(), num_prompts=2)[0]


def load(path):
    return clipn.create_model_and_transforms(architecture(), path)[0]


def test_our_file_has_exactly_the_published_keys_and_shapes(golden, tmp_path):
    published = torch.load(golden["checkpoint"], weights_only=True)
    model, _, _ = clipn.create_model_and_transforms(golden["config"], golden["checkpoint"])
    content = {"epoch": 1, "name": "ours", "state_dict": model.published_state()}
    write_checkpoint(content, tmp_path / "epoch_1.pt")
    ours = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    assert ours.keys() == published.keys()
    expected = {key.removeprefix("module."): value for key, value in published["state_dict"].items()}
    assert ours["state_dict"].keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ours["state_dict"][key], value.float()), key


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_prefixes_and_wrapping(model, tmp_path, prefix, wrapped):
    state = {prefix + key: value for key, value in model.published_state().items()}
    torch.save({"epoch": 3, "state_dict": state} if wrapped else state, tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt").no_text.prompts, model.no_text.prompts)


def test_safetensors(model, tmp_path):
    save_file(
        {key: value.contiguous().clone() for key, value in model.published_state().items()}, tmp_path / "a.safetensors"
    )
    loaded = load(tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_open_clips_flat_file_loads(tmp_path):
    """What open_clip itself saves of a model without a separate text module."""
    import open_clip

    plain = open_clip.CLIP(**architecture())
    torch.save({"epoch": 1, "state_dict": plain.state_dict()}, tmp_path / "clip.pt")
    base, _ = build_base(architecture(), tmp_path / "clip.pt")
    assert torch.equal(
        base.text.transformer.resblocks[0].mlp.c_fc.weight, plain.transformer.resblocks[0].mlp.c_fc.weight
    )


@pytest.mark.parametrize("lost", ["ln_final_no.weight", "token_embedding_no.weight", "visual.proj", "logit_scale"])
def test_a_missing_key_is_named(model, tmp_path, lost):
    state = model.published_state()
    del state[lost]
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: does not fit this model: missing: {lost}$"):
        load(tmp_path / "a.pt")


def test_an_unexpected_key_is_named(model, tmp_path):
    torch.save({"state_dict": model.published_state() | {"extra.weight": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"unexpected: extra\.weight"):
        load(tmp_path / "a.pt")


def test_another_architecture_is_told_by_its_shapes(model, tmp_path):
    torch.save({"state_dict": model.published_state()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"other shapes: .*\(49408, 32\) instead of \(49408, 48\)"):
        clipn.create_model_and_transforms(architecture(text={"width": 48, "heads": 3}), tmp_path / "a.pt")


def test_nan_weights_are_refused(model, tmp_path):
    state = model.published_state()
    state["ln_final_no.bias"] = torch.full_like(state["ln_final_no.bias"], float("nan"))
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"NaN or infinite weights in: ln_final_no\.bias"):
        load(tmp_path / "a.pt")


class Crafted:
    """An object that would write a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_crafted_checkpoint_is_refused_and_not_executed(tmp_path):
    target = tmp_path / "executed"
    torch.save({"state_dict": {"a": Crafted(target)}}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Crafted(target)))
    target.unlink(missing_ok=True)
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(ValueError, match="refused"):
            read_checkpoint(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 broken zip", b"\x80\x02."])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_no_checkpoint_at_all(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        read_checkpoint(tmp_path / "missing.pt")


def test_a_truncated_file_is_refused(model, tmp_path):
    torch.save({"state_dict": model.published_state()}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "a.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.pt"):
            read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"state_dict": [1]}, [1, 2], {"state_dict": {"a": 3}}])
def test_contents_that_are_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt"):
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
    "told",
    [
        {"foo": 1},
        {"interpolation": "magic"},
        {"resize_mode": "magic"},
        {"size": 64},
        {"mean": [0.5]},
        {"std": [0.2, 0.2, 0.0]},
        {"mean": "grey"},
    ],
)
def test_an_impossible_preprocessing_is_one_line(tmp_path, told):
    path = write_clipn(tmp_path / "clipn.pt")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"preprocess": told}, path)
    with pytest.raises(ValueError, match="3 means, 3 deviations above 0, and the tower's size") as error:
        clipn.create_model_and_transforms(content["architecture"], path)
    assert str(path) in str(error.value) and next(iter(told)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("more", [{"config": {"model": [1]}}, {"config": [1]}, {"preprocess": "x"}])
def test_facts_of_another_kind_are_one_line(tmp_path, more):
    path = write_clipn(tmp_path / "clipn.pt")
    torch.save(torch.load(path, weights_only=True) | more, path)
    with pytest.raises(ValueError, match="expected dict"):
        read_checkpoint(path)


@pytest.mark.parametrize("part", [{"text_cfg": "x"}, {"vision_cfg": {"width": 10**7, "layers": 10**6}}])
def test_an_architecture_that_cannot_be_built_is_one_line(tmp_path, part):
    path = write_clipn(tmp_path / "clipn.pt")
    made = torch.load(path, weights_only=True)["architecture"]
    with pytest.raises(ValueError, match="not a model that open_clip can build") as error:
        clipn.create_model_and_transforms(made | part, path)
    assert "\n" not in str(error.value)
