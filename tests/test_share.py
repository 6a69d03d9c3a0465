"""Shared weights: the no tower alone and back, its base checked; the hub; the model card."""

import json
import os
from pathlib import Path

import open_clip
import pandas as pd
import pytest
import torch
import yaml
from conftest import architecture, write_clipn
from helpers import files, messages, write_images
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clipn
from clipn.config.loading import to_dict
from clipn.config.schema import Config, DataConfig, EvalConfig, ModelConfig, RunConfig
from clipn.deploy.sharing import restore_weights, share_weights
from clipn.evaluation.evaluate import evaluate
from clipn.evaluation.results import RESULT_COLUMNS
from clipn.model.base import build_base
from clipn.model.checkpoint import read_checkpoint, write_checkpoint
from clipn.model.weights import find_weights, open_model
from scripts import export

ROOT = Path(__file__).resolve().parent.parent
HOME = "/home/somebody"


@pytest.fixture
def run(tmp_path):
    """A run's folder, as training and evaluation leave it, and its base CLIP beside it."""
    write_clipn(tmp_path / "clipn.pt")
    content = read_checkpoint(tmp_path / "clipn.pt")
    base = {key: value for key, value in content["state_dict"].items() if "_no" not in key}
    write_checkpoint({"state_dict": base, "architecture": content["architecture"]}, tmp_path / "clip.pt")
    classes = write_images(tmp_path / "id", "cat/1.png", "red_panda/1.png")
    config = Config(
        run=RunConfig(dir=f"{HOME}/run", seed=7),
        model=ModelConfig(name=f"{HOME}/model.json", pretrained=f"{HOME}/clip.pt", num_prompts=3),
        data=DataConfig(shards=[f"{HOME}/cc3m/{{00000..00003}}.tar", f"https://host/{HOME}/x.tar?token=1"]),
        eval=EvalConfig(id=str(classes), ood=[f"{HOME}/sun"], methods=["ATD", "CTW"], templates="simple"),
    )
    more = {"epoch": 4, "name": "mine", "config": to_dict(config), "training": {"step": 120, "pairs": 54321}}
    more["preprocess"] = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.25, 0.25)}
    write_checkpoint(content | more, tmp_path / "run" / "checkpoints" / "last.pt")
    rows = [("id", "sun", "ATD", 0.9, 0.25, 0.5, 0.5, 0.75, 7), ("id", "sun", "CTW", 0.8, 0.5, 0.5, 0.5, 0.75, 7)]
    pd.DataFrame(rows, columns=RESULT_COLUMNS).to_csv(tmp_path / "run" / "results.csv", index=False)
    return tmp_path / "run"


def last(run):
    return run / "checkpoints" / "last.pt"


def weights(model):
    return model.published_state()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_shared_file_is_the_no_tower_alone_and_tells_what_it_is(run, tmp_path):
    share_weights(run, tmp_path / "shared", license="mit")
    assert files(tmp_path / "shared") == ["README.md", "clipn.safetensors"]
    whole = read_checkpoint(last(run))["state_dict"]
    stored = load_file(tmp_path / "shared" / "clipn.safetensors")
    assert "prompt_no" in stored and "transformer_no.resblocks.0.mlp.c_fc.weight" in stored
    assert same(stored, {key: value for key, value in whole.items() if key.split(".")[0].endswith("_no")})
    with safe_open(tmp_path / "shared" / "clipn.safetensors", "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    assert header["license"] == "mit" and header["architecture"] == architecture() and header["steps"] == 120
    assert header["preprocess"]["mean"] == [0.5, 0.4, 0.3] and header["results"][0]["AUROC"] == 0.9
    assert header["config"]["train"]["lr"] == 3e-4 and header["config"]["run"] == {"seed": 7}
    assert header["model_name"] is None and header["pretrained"] is None and len(header["base_sha256"]) == 64
    assert header["class_names"] == ["cat", "red panda"]


def test_nothing_of_the_machine_is_told(run, tmp_path):
    share_weights(run, tmp_path / "shared")
    for name in files(tmp_path / "shared"):
        content = (tmp_path / "shared" / name).read_bytes()
        assert not any(word in content for word in (b"somebody", str(tmp_path).encode(), b"token=")), name
    assert b"{00000..00003}.tar" in (tmp_path / "shared" / "README.md").read_bytes()


@pytest.mark.parametrize("num_prompts", [3, 0])
@pytest.mark.parametrize("base", ["clip.pt", "run/checkpoints/last.pt"])
def test_there_and_back_gives_the_same_bits(run, tmp_path, num_prompts, base):
    if not num_prompts:
        content = read_checkpoint(write_clipn(tmp_path / "crafted.pt", num_prompts=0))
        content["config"] = {"model": {"num_prompts": 0}}
        write_checkpoint(content, last(run))
    share_weights(run, tmp_path / "shared")
    restore_weights(tmp_path / "shared", tmp_path / "whole.pt", tmp_path / base)
    before, after = read_checkpoint(last(run)), read_checkpoint(tmp_path / "whole.pt")
    assert same(after["state_dict"], before["state_dict"]) and after["architecture"] == before["architecture"]
    assert "optimizer" not in str(after.keys())
    again = open_model(tmp_path / "whole.pt")
    assert again.num_prompts == num_prompts and not again.training
    if num_prompts:
        assert tuple(again.preprocess["mean"]) == (0.5, 0.4, 0.3)
        share_weights(tmp_path / "whole.pt", tmp_path / "second")
        first, second = (read_checkpoint(tmp_path / name / "clipn.safetensors") for name in ("shared", "second"))
        assert second["base_sha256"] == first["base_sha256"] and second["steps"] == 120


def test_every_door_takes_a_shared_file(run, tmp_path):
    share_weights(run, tmp_path / "shared")
    expected, base = weights(open_model(run)), tmp_path / "clip.pt"
    for source in (tmp_path / "shared", tmp_path / "shared" / "clipn.safetensors"):
        assert same(weights(open_model(source, base=base)), expected)
    made = clipn.create_model_and_transforms(
        architecture(), tmp_path / "shared" / "clipn.safetensors", num_prompts=1, base=base
    )
    assert same(weights(made[0]), expected) and tuple(made[2].transforms[-1].mean) == (0.5, 0.4, 0.3)


def test_an_evaluation_takes_a_shared_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr("clipn.evaluation.evaluate.write_report", lambda *arguments, **more: None)
    share_weights(run, tmp_path / "shared")
    id_set = write_images(tmp_path / "in", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    ood = write_images(tmp_path / "out", *(f"{n}.png" for n in range(5)))
    found = []
    for number, checkpoint in enumerate((last(run), tmp_path / "shared")):
        judged = EvalConfig(id=str(id_set), ood=str(ood), templates="simple", checkpoints=str(checkpoint))
        config = Config(
            run=RunConfig(dir=str(tmp_path / f"eval_{number}"), device="cpu"),
            model=ModelConfig(pretrained=str(tmp_path / "clip.pt")),
            eval=judged,
            data=DataConfig(workers=0),
        )
        config.features.dir = f"{config.run.dir}/features"
        found.append(evaluate(config).results)
    pd.testing.assert_frame_equal(*found)
    assert set(found[0]["seed"]) == {7}


def test_another_base_is_refused_by_name(run, tmp_path):
    share_weights(run, tmp_path / "shared")
    write_clipn(tmp_path / "other.pt", base_seed=5)
    with pytest.raises(
        ValueError, match=r"clipn\.safetensors: belongs to the CLIP of SHA-256 .*other\.pt' holds other"
    ):
        open_model(tmp_path / "shared", base=tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="holds the no tower alone; give a checkpoint of the CLIP of SHA-256"):
        open_model(tmp_path / "shared")
    with pytest.raises(FileNotFoundError, match=r"base='missing\.pt' is no such file"):
        open_model(tmp_path / "shared", base="missing.pt")
    with pytest.raises(ValueError, match=r"clipn\.safetensors' holds other weights"):  # no base in it at all
        open_model(tmp_path / "shared", base=tmp_path / "shared" / "clipn.safetensors")


def test_a_base_stored_in_half_precision_is_the_same_base(run, tmp_path):
    content = read_checkpoint(last(run))
    content["state_dict"] = {
        key: value.half() if value.is_floating_point() else value for key, value in content["state_dict"].items()
    }
    write_checkpoint(content, tmp_path / "published.pt")
    share_weights(tmp_path / "published.pt", tmp_path / "shared")
    model = open_model(tmp_path / "shared", base=tmp_path / "published.pt")
    assert same(weights(model), weights(open_model(tmp_path / "published.pt")))


@pytest.fixture
def tagged(monkeypatch, tmp_path):
    """An open_clip name and tag whose weights, which want QuickGELU, are a file here."""
    torch.manual_seed(3)
    base, _ = build_base(architecture(quick_gelu=True))
    torch.save(base.state_dict(), tmp_path / "tagged.pt")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-B", architecture())
    entry = {"file": str(tmp_path / "tagged.pt"), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "hf_hub": "lab/tiny/"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-B", {"lab_s1": entry})
    return "Tiny-B", "lab_s1"


def test_the_tag_that_a_file_names_is_its_base(run, tagged, tmp_path):
    model = clipn.create_model_and_transforms(*tagged, num_prompts=2)[0]
    torch.nn.init.normal_(model.no_text.prompts)
    content = {"state_dict": weights(model), "architecture": model.architecture, "preprocess": model.preprocess}
    content["config"] = {"model": dict(zip(("name", "pretrained"), tagged, strict=True), num_prompts=2)}
    write_checkpoint(content, last(run))
    facts = share_weights(run, tmp_path / "shared")
    assert (facts["model_name"], facts["pretrained"]) == tagged
    shared = tmp_path / "shared" / "clipn.safetensors"
    by_name = clipn.create_model_and_transforms("Tiny-B", shared)[0]
    for loaded in (open_model(shared), open_model(shared, base="lab_s1"), by_name):
        assert same(weights(loaded), weights(model)) and tuple(loaded.preprocess["mean"]) == (0.1, 0.2, 0.3)
        pixels = torch.ones(1, 3, 32, 32)  # also the activation, which no weight shows
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
    with pytest.raises(ValueError, match="no open_clip tag of 'Tiny-B'; its tags are: lab_s1"):
        open_model(shared, base="lab_s2")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "lab/tiny" and "base=" not in card
    torch.save({key: value + 1 for key, value in torch.load(tmp_path / "tagged.pt").items()}, tmp_path / "tagged.pt")
    with pytest.raises(ValueError, match="belongs to Tiny-B lab_s1; base='lab_s1' holds other weights"):
        open_model(shared)


def test_a_published_file_is_shared_with_the_names_it_lacks(tagged, tmp_path):
    model = clipn.create_model_and_transforms(*tagged, num_prompts=2)[0]
    torch.save({"epoch": 9, "name": "x", "state_dict": weights(model)}, tmp_path / "epoch_9.pt")
    with pytest.raises(ValueError, match=r"epoch_9\.pt: does not say its architecture"):
        share_weights(tmp_path / "epoch_9.pt", tmp_path / "shared")
    with pytest.raises(ValueError, match="tag='lab': not open_clip's of 'Tiny-B'; its tags are: lab_s1"):
        share_weights(tmp_path / "epoch_9.pt", tmp_path / "shared", *("Tiny-B", "lab"))
    facts = share_weights(tmp_path / "epoch_9.pt", tmp_path / "shared", *tagged)
    assert facts["epoch"] == 9 and facts["preprocess"] is None
    assert open_model(tmp_path / "shared").preprocess["mean"] == (0.1, 0.2, 0.3), "the tag's, as nobody said otherwise"


def test_half_precision_halves_the_file_and_rounds(run, tmp_path):
    share_weights(run, tmp_path / "half", dtype="float16")
    share_weights(run, tmp_path / "full")
    sizes = [(tmp_path / name / "clipn.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.51 * sizes[1]
    tokens = clipn.get_tokenizer(architecture())(["a photo of a cat", "dog"])
    half, full = (open_model(tmp_path / name, base=tmp_path / "clip.pt") for name in ("half", "full"))
    difference = (half.encode_no_text(tokens) - full.encode_no_text(tokens)).abs().max()
    assert 0 < difference < 1e-3
    content = read_checkpoint(last(run))
    content["state_dict"]["prompt_no"][0, 0, 0] = 1e6
    write_checkpoint(content, last(run))
    with pytest.raises(ValueError, match="prompt_no is too large for float16; share it as float32"):
        share_weights(run, tmp_path / "half", dtype="float16")


def test_what_cannot_be_shared_or_taken_back(run, tmp_path):
    share_weights(run, tmp_path / "shared")
    with pytest.raises(ValueError, match=r"clip\.pt: holds a plain CLIP without a no tower"):
        share_weights(tmp_path / "clip.pt", tmp_path / "new")
    with pytest.raises(ValueError, match=r"clipn\.safetensors: holds the no tower alone"):
        share_weights(tmp_path / "shared", tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"missing\.pt: no such checkpoint or run"):
        share_weights("missing.pt", tmp_path / "new")
    with pytest.raises(ValueError, match=r"last\.pt: not a shared file"):
        restore_weights(run, tmp_path / "whole.pt")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("my project")
    with pytest.raises(ValueError, match=r"project: holds a README\.md that is no model card"):
        share_weights(run, tmp_path / "project")
    assert (tmp_path / "project" / "README.md").read_text() == "my project" and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"clipn_format": "2"}, "clipn_format 2: this version of clipn reads 1"),
        ({"clipn_format": "1", "architecture": "[1]"}, "its architecture is list, expected dict"),
        ({"clipn_format": "1", "config": "{"}, "not a whole checkpoint file"),
        ({"clipn_format": "1", "architecture": '{"text_cfg": {"trust_remote_code": true}}'}, "refused"),
    ],
)
def test_a_stranges_header_is_judged(tmp_path, header, message):
    save_file({"prompt_no": torch.ones(1, 2, 3)}, tmp_path / "clipn.safetensors", header)
    with pytest.raises(ValueError, match=rf"clipn\.safetensors: .*{message}"):
        read_checkpoint(tmp_path / "clipn.safetensors")


def test_a_header_cannot_stand_in_for_weights(tmp_path):
    header = {"clipn_format": "1", "state_dict": '{"a": 1}', "format": "pt"}
    save_file({"prompt_no": torch.ones(1, 2, 3)}, tmp_path / "clipn.safetensors", header)
    assert read_checkpoint(tmp_path / "clipn.safetensors")["state_dict"].keys() == {"prompt_no"}


def test_a_checkpoint_that_would_run_a_strangers_code_is_refused(tmp_path):
    strange = architecture(text={"tokenizer_kwargs": {"trust_remote_code": True}})
    write_checkpoint({"state_dict": {"a": torch.ones(1)}, "architecture": strange}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: refused: .*trust_remote_code"):
        read_checkpoint(tmp_path / "a.pt")


# What names a model


def test_a_plain_clip_and_a_tag_come_with_a_warning(run, tagged, tmp_path, caplog):
    assert open_model(tmp_path / "clip.pt", num_prompts=5).num_prompts == 5
    assert "clip.pt is a plain CLIP: its no tower is an untrained copy" in messages(caplog)
    caplog.clear()
    model = open_model("lab_s1", "Tiny-B")
    assert model.num_prompts == 16 and not model.training and "lab_s1 is a plain CLIP" in messages(caplog)
    caplog.clear()
    open_model(run)
    assert not messages(caplog)


def test_a_file_without_architecture_needs_a_name(run, tmp_path, small_config, caplog):
    torch.save(read_checkpoint(last(run))["state_dict"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt: does not say its architecture; give model_name"):
        open_model(tmp_path / "bare.pt")
    assert same(weights(open_model(tmp_path / "bare.pt", small_config)), weights(open_model(run)))
    assert "bare.pt does not say its images' statistics" in messages(caplog)


@pytest.mark.parametrize(
    ("source", "model_name", "kind", "message"),
    [
        ("nothing.pt", None, FileNotFoundError, "'nothing.pt': no such file or folder; expected a checkpoint"),
        ("nothing.pt", "ViT-B-16", ValueError, "'nothing.pt': no such file, and no open_clip tag of 'ViT-B-16'"),
        (str(ROOT / "clipn"), None, FileNotFoundError, r"neither a run's folder .* nor a shared one"),
        ("https://host/clipn.safetensors", None, ValueError, "https://host/clipn.safetensors: not fetched"),
        ("file:///etc/passwd", "ViT-B-16", ValueError, "not fetched"),
        ("hf://user", None, ValueError, "'hf://user': expected hf://user/repo or hf://user/repo@revision"),
        ("hf://a/b/c", None, ValueError, "'hf://a/b/c': expected hf://user/repo"),
        ("hf://a..b/c", None, ValueError, "hf://a..b/c: no possible name of a repository"),
    ],
)
def test_what_names_nothing_is_told_with_the_choices(source, model_name, kind, message):
    with pytest.raises(kind, match=message) as error:
        open_model(source, model_name)
    assert "\n" not in str(error.value)


def test_the_hub_is_asked_for_one_file(run, tmp_path, monkeypatch):
    share_weights(run, tmp_path / "shared")
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(tmp_path / "shared" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = open_model("hf://some-body/clipn_b.16", base=tmp_path / "clip.pt")
    assert same(weights(model), weights(open_model(run)))
    assert find_weights("hf://a/b@v1.0").name == "clipn.safetensors"
    assert asked == [("some-body/clipn_b.16", "clipn.safetensors", None), ("a/b", "clipn.safetensors", "v1.0")]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "its owner must let you in"),
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (errors.EntryNotFoundError, r"holds no clipn\.safetensors"),
        (ConnectionError, "first line"),
        (RuntimeError, "first line"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, kind, message):
    def download(*arguments, **more):
        error = kind.__new__(kind)  # some kinds want an answer of the hub
        Exception.__init__(error, "first line\nand a second")
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(OSError, match=f"^hf://a/b: {message}") as error:
        open_model("hf://a/b")
    assert "\n" not in str(error.value)


# The model card


def card_of(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_card_says_what_the_run_says(run, tmp_path):
    share_weights(run, tmp_path / "shared", license="mit", data="CC3M", repo="me/clipn-tiny")
    front, text = card_of(tmp_path / "shared")
    assert front["license"] == "mit" and front["pipeline_tag"] == "zero-shot-image-classification"
    assert "base_model" not in front, "the base is on no hub"
    assert '"hf://me/clipn-tiny"' in text and 'base="path/to/the/base.pt"' in text and '["cat", "red panda"]' in text
    assert "| ATD    | 90.00     | 25.00     | 90.00         | 25.00         |" in text and "accuracy 75.00" in text
    for fact in ("CC3M", "54,321", "- pairs in a batch: 2048", "- learning rate: 0.0003", "Prompts: simple"):
        assert fact in text
    assert "Threshold-free" not in text, "there is no decisions.csv"


def test_the_code_in_the_card_is_python(run, tmp_path):
    share_weights(run, tmp_path / "shared")
    code = card_of(tmp_path / "shared")[1].split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_the_card_invents_nothing(tmp_path):
    write_clipn(tmp_path / "bare.pt")
    share_weights(tmp_path / "bare.pt", tmp_path / "shared")
    front, text = card_of(tmp_path / "shared")
    assert "license" not in front and "has not stated their license" in text
    assert "## Results" not in text and "## Training" not in text and "None" not in text and "nan" not in text
    assert "no image set that is known here" in text


def test_results_of_something_else_are_left_out(run, tmp_path, caplog):
    other = run / "checkpoints" / "epoch_1.pt"
    other.write_bytes(last(run).read_bytes())
    assert share_weights(other, tmp_path / "other")["results"] == []
    os.utime(run / "results.csv", (0, 0))
    assert share_weights(run, tmp_path / "old")["results"] == [] and "is older than" in messages(caplog)
    table = pd.read_csv(run / "results.csv")
    pd.concat([table, table]).to_csv(run / "results.csv", index=False)
    assert share_weights(run, tmp_path / "several")["results"] == []
    table.assign(method=["MSP", "MCM"]).to_csv(run / "results.csv", index=False)
    facts = share_weights(run, tmp_path / "later")  # by other settings than the run's: which ones nobody knows
    assert len(facts["results"]) == 2 and "eval" not in facts["config"] and facts["class_names"] is None
    assert "Prompts:" not in card_of(tmp_path / "later")[1]


def test_the_card_cites_what_the_project_cites(run, tmp_path):
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    share_weights(run, tmp_path / "shared")
    text = card_of(tmp_path / "shared")[1]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    for words in (paper["title"], authors, str(paper["year"]), f"{paper['start']}--{paper['end']}"):
        assert words in text


def test_the_command_shares_and_takes_back(run, tmp_path, capsys):
    out = tmp_path / "a folder"
    export.main(["share", str(run), "--out", str(out), "--repo", "me/tiny"])
    told = capsys.readouterr().out
    assert (
        f"hf upload me/tiny '{out}' ." in told and "no --license" in told and told.splitlines()[-1].startswith("done:")
    )
    export.main(["back", str(out), "--base", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "whole.pt")])
    assert f"done: {tmp_path}/whole.pt" in capsys.readouterr().out
    assert same(weights(open_model(tmp_path / "whole.pt")), weights(open_model(run)))
