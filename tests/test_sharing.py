"""Shared weights: the no tower alone, merged with its own base again; the hub; the model card."""

import json
import re
import shutil
from pathlib import Path

import open_clip
import pandas as pd
import pytest
import torch
import yaml
from conftest import architecture, write_clipn
from helpers import files, messages, write_images
from huggingface_hub import ModelCard, errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clipn
from clipn.cli import main
from clipn.config.evaluation import EvalConfig
from clipn.config.loading import to_dict
from clipn.config.schema import Config, DataConfig, ModelConfig, RunConfig
from clipn.deploy.sharing import ShareOptions, merge_weights, share_weights
from clipn.evaluation.record import RECORD, write_record
from clipn.evaluation.results import RESULT_COLUMNS
from clipn.model.base import build_base
from clipn.model.checkpoint import read_checkpoint, write_checkpoint
from clipn.model.hashing import weights_hash
from clipn.model.weights import find_weights, open_model
from clipn.pipeline import run_eval

ROOT = Path(__file__).resolve().parent.parent
HOME = "/home/somebody"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A run folder as training and evaluation leave it, its base clip.pt, and both parts of the run `shared`."""
    folder = tmp_path_factory.mktemp("material")
    content = read_checkpoint(write_clipn(folder / "clipn.pt"))
    base = {key: value for key, value in content["state_dict"].items() if "_no" not in key}
    write_checkpoint({"state_dict": base, "architecture": content["architecture"]}, folder / "clip.pt")
    config = Config(
        run=RunConfig(dir=f"{HOME}/run", seed=7),
        model=ModelConfig(name=f"{HOME}/model.json", pretrained=f"{HOME}/clip.pt", num_prompts=3),
        data=DataConfig(shards=[f"{HOME}/cc3m/{{00000..00003}}.tar", f"https://host/{HOME}/x.tar?token=1"]),
        eval=EvalConfig(id=f"{HOME}/id", ood=[f"{HOME}/sun"], methods=["ATD", "CTW"], templates="simple"),
    )
    content |= {"epoch": 4, "name": "mine", "config": to_dict(config), "training": {"step": 120, "pairs": 54321}}
    content["preprocess"] = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.25, 0.25)}
    write_checkpoint(content, last(folder / "run"))
    rows = [("id", "sun", "ATD", 0.9, 0.25, 0.5, 0.5, 0.75, 7), ("id", "sun", "CTW", 0.8, 0.5, 0.5, 0.5, 0.75, 7)]
    pd.DataFrame(rows, columns=RESULT_COLUMNS).to_csv(folder / "run" / "results.csv", index=False)
    record(folder / "run", [weights_hash(open_model(folder / "run"))])
    share_weights(folder / "run", folder / "shared", ShareOptions(license="mit", data="CC3M", repo="me/clipn-tiny"))
    return folder


@pytest.fixture
def run(material, tmp_path):
    """A copy of the run folder, for a test that changes it."""
    return Path(shutil.copytree(material / "run", tmp_path / "run"))


@pytest.fixture
def tagged(monkeypatch, tmp_path):
    """An open_clip name and tag whose weights, which require QuickGELU, are a local file."""
    torch.manual_seed(3)
    base, _ = build_base(architecture(quick_gelu=True))
    torch.save(base.state_dict(), tmp_path / "tagged.pt")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-B", architecture())
    entry = {"file": str(tmp_path / "tagged.pt"), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "hf_hub": "lab/tiny/"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-B", {"lab_s1": entry})
    return "Tiny-B", "lab_s1"


def record(run, hashes):
    settings = {"templates": "simple", "scale": 100.0, "id": f"{HOME}/id", "methods": ["ATD", "CTW"]}
    write_record(run, hashes, settings, ["cat", "red panda"])


def last(run):
    return run / "checkpoints" / "last.pt"


def weights(source, *arguments, **options):
    """The state_dict that `open_model` gives for these arguments, or that of a model."""
    model = source if isinstance(source, clipn.CLIPN) else open_model(source, *arguments, **options)
    return model.published_state()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def change(file, change, target=None):
    """Write a checkpoint again with changed weights."""
    content = read_checkpoint(file)
    content["state_dict"] = {key: change(key, value) for key, value in content["state_dict"].items()}
    write_checkpoint(content, target or file)


def card_of(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_shared_file_is_the_no_tower_alone_with_its_metadata(material):
    assert files(material / "shared") == ["README.md", "clipn.safetensors"]
    whole = read_checkpoint(last(material / "run"))["state_dict"]
    stored = load_file(material / "shared" / "clipn.safetensors")
    assert "prompt_no" in stored and "transformer_no.resblocks.0.mlp.c_fc.weight" in stored
    assert same(stored, {key: value for key, value in whole.items() if key.split(".")[0].endswith("_no")})
    with safe_open(material / "shared" / "clipn.safetensors", "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    assert header["license"] == "mit" and header["architecture"] == architecture() and header["steps"] == 120
    assert header["preprocess"]["mean"] == [0.5, 0.4, 0.3] and header["results"][0]["AUROC"] == 0.9
    assert header["config"]["train"]["lr"] == 3e-4 and header["config"]["run"] == {"seed": 7}
    assert header["model_name"] is None and header["pretrained"] is None and len(header["base_sha256"]) == 64
    assert header["class_names"] == ["cat", "red panda"]


def test_a_shared_folder_contains_no_private_paths(material):
    content = b"".join(path.read_bytes() for path in (material / "shared").iterdir())
    assert not any(word in content for word in (b"somebody", str(material).encode(), b"token="))
    assert content.count(b"{00000..00003}.tar") == 2, "in the header and the card"


@pytest.mark.parametrize(("num_prompts", "base"), [(3, "run/checkpoints/last.pt"), (0, "clip.pt")])
def test_merging_restores_the_same_bits(material, run, tmp_path, num_prompts, base):
    if not num_prompts:
        content = read_checkpoint(write_clipn(tmp_path / "crafted.pt", num_prompts=0))
        write_checkpoint(content | {"config": {"model": {"num_prompts": 0}}}, last(run))
    facts = share_weights(run, tmp_path / "shared")
    merge_weights(tmp_path / "shared", tmp_path / "whole.pt", material / base)
    before, after = read_checkpoint(last(run)), read_checkpoint(tmp_path / "whole.pt")
    assert same(after["state_dict"], before["state_dict"]) and after["architecture"] == before["architecture"]
    assert open_model(tmp_path / "whole.pt").num_prompts == num_prompts and "optimizer" not in after
    again = share_weights(tmp_path / "whole.pt", tmp_path / "again")
    assert again["base_sha256"] == facts["base_sha256"]
    if num_prompts:
        assert tuple(after["preprocess"]["mean"]) == (0.5, 0.4, 0.3) and again["steps"] == 120


def test_every_loader_accepts_a_shared_file(material):
    expected, base, shared = weights(material / "run"), material / "clip.pt", material / "shared/clipn.safetensors"
    assert same(weights(shared.parent, base=base), expected) and same(weights(shared, base=base), expected)
    model, _, transform = clipn.create_model_and_transforms(architecture(), shared, num_prompts=1, base=base)
    assert same(weights(model), expected) and tuple(transform.transforms[-1].mean) == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        ("other.pt", ValueError, r"clipn\.safetensors: belongs to the CLIP of SHA-256 .*other\.pt' holds other"),
        (None, FileNotFoundError, "holds the no tower alone; give a checkpoint of the CLIP of SHA-256"),
        ("missing.pt", FileNotFoundError, r"base='\S*missing\.pt' is no such file"),
        ("clipn.safetensors", ValueError, r"clipn\.safetensors' holds other weights"),  # it has no base
    ],
)
def test_another_base_is_refused_by_name(material, tmp_path, base, kind, message):
    write_clipn(tmp_path / "other.pt", base_seed=5)
    shutil.copy(material / "shared/clipn.safetensors", tmp_path)
    with pytest.raises(kind, match=message):
        open_model(material / "shared", base=base and tmp_path / base)


def test_a_base_stored_in_half_precision_is_the_same_base(run, tmp_path):
    file = tmp_path / "published.pt"
    change(last(run), lambda key, value: value.half() if value.is_floating_point() else value, file)
    share_weights(file, tmp_path / "shared")
    assert same(weights(tmp_path / "shared", base=file), weights(file))


def test_the_tag_that_a_file_names_is_its_base(tagged, tmp_path):
    model = clipn.create_model_and_transforms(*tagged, num_prompts=2)[0]
    torch.nn.init.normal_(model.no_text.prompts)
    content = {"state_dict": weights(model), "architecture": model.architecture, "preprocess": model.preprocess}
    content["config"] = {"model": dict(zip(("name", "pretrained"), tagged, strict=True), num_prompts=2)}
    write_checkpoint(content, tmp_path / "a.pt")
    facts = share_weights(tmp_path / "a.pt", tmp_path / "shared")
    assert (facts["model_name"], facts["pretrained"]) == tagged
    shared = tmp_path / "shared" / "clipn.safetensors"
    by_name = clipn.create_model_and_transforms("Tiny-B", shared)[0]
    for loaded in (open_model(shared), open_model(shared, base="lab_s1"), by_name):
        assert same(weights(loaded), weights(model)) and tuple(loaded.preprocess["mean"]) == (0.1, 0.2, 0.3)
        pixels = torch.ones(1, 3, 32, 32)  # the activation is not visible in the weights
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
    with pytest.raises(ValueError, match="no open_clip tag of 'Tiny-B'; its tags are: lab_s1"):
        open_model(shared, base="lab_s2")
    front, text = card_of(tmp_path / "shared")
    assert front["base_model"] == "lab/tiny" and front["base_model_relation"] == "adapter" and "base=" not in text
    torch.save({key: value + 1 for key, value in torch.load(tmp_path / "tagged.pt").items()}, tmp_path / "tagged.pt")
    with pytest.raises(ValueError, match="belongs to Tiny-B lab_s1; base='lab_s1' holds other weights"):
        open_model(shared)


def test_a_published_file_is_shared_with_the_names_that_it_lacks(tagged, tmp_path):
    model = clipn.create_model_and_transforms(*tagged, num_prompts=2)[0]
    file, shared = tmp_path / "epoch_9.pt", tmp_path / "shared"
    torch.save({"epoch": 9, "name": "x", "state_dict": weights(model)}, file)
    with pytest.raises(ValueError, match=r"epoch_9\.pt: does not say its architecture"):
        share_weights(file, shared)
    with pytest.raises(ValueError, match="tag='lab': not open_clip's of 'Tiny-B'; its tags are: lab_s1"):
        share_weights(file, shared, ShareOptions(model_name="Tiny-B", tag="lab"))
    facts = share_weights(file, shared, ShareOptions(*tagged))
    assert facts["epoch"] == 9 and facts["preprocess"] is None
    assert open_model(shared).preprocess["mean"] == (0.1, 0.2, 0.3), "the tag's, without any in the file"


def test_half_precision_halves_the_file_and_rounds(material, run, tmp_path):
    folders, half = (tmp_path / "half", material / "shared"), ShareOptions(dtype="float16")
    share_weights(run, folders[0], half)
    sizes = [(folder / "clipn.safetensors").stat().st_size for folder in folders]
    assert sizes[0] < 0.51 * sizes[1]
    low, full = (weights(folder, base=material / "clip.pt")["text_projection_no"] for folder in folders)
    assert 0 < (low - full).abs().max() < 1e-3
    change(last(run), lambda key, value: value + 1e6 * (key == "prompt_no"))
    with pytest.raises(ValueError, match="prompt_no is too large for float16; share it as float32"):
        share_weights(run, tmp_path / "half", half)


def test_what_cannot_be_shared_or_merged(material, tmp_path):
    for source, message in {"clip.pt": "a plain CLIP without a no tower", "shared": "the no tower alone"}.items():
        with pytest.raises(ValueError, match=rf"clipn?\.\w+: holds {message}"):
            share_weights(material / source, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt: no such checkpoint or run"):
        share_weights("missing.pt", tmp_path)
    with pytest.raises(ValueError, match=r"last\.pt: not a shared file"):
        merge_weights(material / "run", tmp_path / "whole.pt")
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(ValueError, match=r"has a README\.md that is not a model card"):
        share_weights(material / "run", tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project" and files(tmp_path) == ["README.md"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"clipn_format": "2"}, "clipn_format 2: this version of clipn reads 1"),
        ({"clipn_format": "1", "architecture": "[1]"}, "its architecture is list, expected dict"),
        ({"clipn_format": "1", "config": "{"}, "not a whole checkpoint file"),
        ({"clipn_format": "1", "architecture": '{"text_cfg": {"trust_remote_code": true}}'}, "refused"),
    ],
)
def test_a_bad_header_is_refused_and_none_replaces_the_weights(tmp_path, header, message):
    file, tensors = tmp_path / "clipn.safetensors", {"prompt_no": torch.ones(1, 2, 3)}
    save_file(tensors, file, header)
    with pytest.raises(ValueError, match=rf"clipn\.safetensors: .*{message}"):
        read_checkpoint(file)
    save_file(tensors, file, {"clipn_format": "1", "state_dict": '{"a": 1}', "format": "pt"})
    assert read_checkpoint(file)["state_dict"].keys() == {"prompt_no"}


# Names of weights


def test_a_plain_clip_and_a_tag_come_with_a_warning(material, tagged, caplog):
    assert open_model(material / "run").num_prompts == 3 and not messages(caplog)
    assert open_model(material / "clip.pt", num_prompts=5).num_prompts == 5
    model = open_model("lab_s1", "Tiny-B")
    assert model.num_prompts == 16 and not model.training and "lab_s1 is a plain CLIP" in messages(caplog)
    assert "clip.pt is a plain CLIP: its no tower is an untrained copy" in messages(caplog)


def test_a_file_without_architecture_needs_a_name(material, tmp_path, small_config, caplog):
    torch.save(read_checkpoint(last(material / "run"))["state_dict"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt: does not say its architecture; give model_name"):
        open_model(tmp_path / "bare.pt")
    assert same(weights(tmp_path / "bare.pt", small_config), weights(material / "run"))
    assert "bare.pt does not say its images' statistics" in messages(caplog)


def test_a_name_of_another_architecture_than_the_files_is_a_warning(material, tagged, tmp_path, small_config, caplog):
    assert same(weights(material / "run", "RN50"), weights(material / "run"))
    assert re.findall("model_name.*", messages(caplog)) == [
        "model_name='RN50' is ignored: the file describes another architecture, which is used"
    ]
    caplog.clear()
    open_model(material / "run", small_config)
    model = clipn.create_model_and_transforms(*tagged)[0]
    write_checkpoint({"state_dict": weights(model), "architecture": model.architecture}, tmp_path / "quick_gelu.pt")
    open_model(tmp_path / "quick_gelu.pt", "Tiny-B")
    assert "ignored" not in messages(caplog), "the same; with the activation that the weights require"
    with pytest.raises(ValueError, match="model 'RN51' is unknown"):
        open_model(material / "run", "RN51")


@pytest.mark.parametrize(
    ("source", "model_name", "kind", "message"),
    [
        ("nothing.pt", None, FileNotFoundError, "'nothing.pt': no such file or folder; expected a checkpoint"),
        ("nothing.pt", "ViT-B-16", ValueError, "'nothing.pt': no such file, and no open_clip tag of 'ViT-B-16'"),
        (str(ROOT / "clipn"), None, FileNotFoundError, r"neither a run's folder .* nor a shared one"),
        ("https://host/clipn.safetensors", None, ValueError, "https://host/clipn.safetensors: URLs are not"),
        ("file:///etc/passwd", "ViT-B-16", ValueError, "URLs are not"),
        ("hf://user", None, ValueError, "'hf://user': expected hf://user/repo or hf://user/repo@revision"),
        ("hf://a/b/c", None, ValueError, "'hf://a/b/c': expected hf://user/repo"),
        ("hf://a..b/c", None, ValueError, "hf://a..b/c: not a valid repository name"),
    ],
)
def test_a_name_of_nothing_is_refused_with_the_choices(source, model_name, kind, message):
    with pytest.raises(kind, match=message) as error:
        open_model(source, model_name)
    assert "\n" not in str(error.value)


def test_one_file_is_downloaded_from_the_hub(material, monkeypatch):
    requests = []

    def download(repo, name, revision=None):
        requests.append((repo, name, revision))
        return str(material / "shared" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert same(weights("hf://some-body/clipn_b.16", base=material / "clip.pt"), weights(material / "run"))
    assert find_weights("hf://a/b@v1.0").name == "clipn.safetensors"
    assert requests == [("some-body/clipn_b.16", "clipn.safetensors", None), ("a/b", "clipn.safetensors", "v1.0")]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "access must be granted"),
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (errors.EntryNotFoundError, r"holds no clipn\.safetensors"),
        (ConnectionError, "first line"),
        (RuntimeError, "first line"),
    ],
)
def test_an_error_of_the_hub_is_one_line(monkeypatch, kind, message):
    def download(*arguments, **options):
        error = kind.__new__(kind)  # some kinds require a response of the hub
        Exception.__init__(error, "first line\nand a second")
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(OSError, match=f"^hf://a/b: {message}") as error:
        open_model("hf://a/b")
    assert "\n" not in str(error.value)


# The model card


def test_the_card_states_what_the_run_states(material):
    front, text = card_of(material / "shared")
    assert front["license"] == "mit" and front["pipeline_tag"] == "zero-shot-image-classification"
    assert "base_model" not in front, "the base is not on the hub"
    assert '"hf://me/clipn-tiny"' in text and 'base="path/to/the/base.pt"' in text and '["cat", "red panda"]' in text
    assert "| ATD    | 90.00     | 25.00     | 90.00         | 25.00         |" in text and "accuracy 75.00" in text
    for fact in ("CC3M", "54,321", "- pairs per batch: 2048", "- learning rate: 0.0003", "Prompts: simple"):
        assert fact in text
    assert "Images have 32 x 32 pixels, normalised with mean 0.5, 0.4, 0.3 and" in text
    assert "Threshold-free" not in text, "there is no decisions.csv"
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_hub_reads_the_results_of_the_card(material):
    data = ModelCard.load(material / "shared" / "README.md").data
    values = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    metrics = {"AUROC of ATD": 90.0, "FPR95 of ATD": 25.0, "AUROC of CTW": 80.0, "FPR95 of CTW": 50.0}
    assert values == {("id (ID), sun (OOD)", name): value for name, value in metrics.items()}
    assert data.model_name == "clipn-tiny"


def test_the_card_invents_nothing(tmp_path):
    write_clipn(tmp_path / "bare.pt")
    share_weights(tmp_path / "bare.pt", tmp_path / "shared")
    front, text = card_of(tmp_path / "shared")
    assert not front.keys() & {"license", "model-index"} and "The license of these weights is not stated" in text
    assert not any(word in text for word in ("## Results", "## Training", "None", "nan"))
    assert "no image set that is known here" in text


@pytest.mark.parametrize("hashes", [["0" * 64], None, ["own", "own"]], ids=["other weights", "no record", "several"])
def test_results_of_other_weights_are_left_out(run, tmp_path, caplog, hashes):
    (run / RECORD).unlink()
    if hashes:
        record(run, [weights_hash(open_model(run)) if text == "own" else text for text in hashes])
    facts = share_weights(run, tmp_path / "shared")
    assert facts["results"] == [] and facts["class_names"] is None and "eval" not in facts["config"]
    assert "results.csv is left out of the model card" in messages(caplog)
    assert "## Results" not in card_of(tmp_path / "shared")[1]


def test_results_belong_to_every_file_of_the_same_weights(run, tmp_path):
    shutil.copy(last(run), run / "checkpoints" / "epoch_4.pt")
    assert len(share_weights(run / "checkpoints" / "epoch_4.pt", tmp_path / "same")["results"]) == 2
    change(last(run), lambda key, value: value + 1.0 * (key == "prompt_no"))
    assert share_weights(run, tmp_path / "later")["results"] == [], "it was trained further"
    (run / RECORD).write_text("{")
    with pytest.raises(ValueError, match="evaluated.json: not JSON; delete it and evaluate again"):
        share_weights(run, tmp_path / "later")


def test_an_evaluation_of_a_shared_folder_equals_that_of_its_run(material, run, tmp_path, monkeypatch):
    def write_tables(folder, evaluation, bootstrap):  # without the figures, which take long
        evaluation.results.to_csv(folder / "results.csv", index=False)
        evaluation.decisions.to_csv(folder / "decisions.csv", index=False)

    monkeypatch.setattr("clipn.pipeline.write_report", write_tables)
    id_set = write_images(tmp_path / "in", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    ood = write_images(tmp_path / "out", *(f"{n}.png" for n in range(5)))
    config = {
        "run": {"dir": str(run), "device": "cpu"},
        "model": {"pretrained": str(material / "clip.pt")},
        "eval": {"id": str(id_set), "ood": str(ood), "templates": "simple", "methods": ["MSP", "ATD"]},
        "data": {"workers": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    tables = []
    for checkpoint in (run, material / "shared"):
        run_eval(str(tmp_path / "config.yaml"), [f"eval.checkpoints={checkpoint}"])
        tables.append(pd.read_csv(run / "results.csv"))
        facts = share_weights(run, tmp_path / "new")
        assert facts["class_names"] == ["cat", "dog"] and [row["method"] for row in facts["results"]] == ["MSP", "ATD"]
        assert facts["config"]["eval"]["methods"] == ["MSP", "ATD"] and facts["decisions"]
        assert "Threshold-free decisions" in card_of(tmp_path / "new")[1]
    pd.testing.assert_frame_equal(*tables)
    assert set(tables[0]["seed"]) == {7}


def test_the_card_cites_what_the_project_cites(material):
    paper, text = (
        yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"],
        card_of(material / "shared")[1],
    )
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    cited = (paper["title"], authors, str(paper["year"]), f"{paper['start']}--{paper['end']}")
    assert all(words in text for words in cited)


def test_the_command_shares_and_merges(material, tmp_path, capsys):
    out = tmp_path / "a folder"
    main(["export", "share", str(material / "run"), "--out", str(out), "--repo", "me/tiny"])
    lines = capsys.readouterr().out
    assert f"hf upload me/tiny '{out}' ." in lines and "no --license" in lines
    assert lines.splitlines()[-1].startswith("done:")
    main(["export", "merge", str(out), "--base", str(material / "clip.pt"), "--out", str(tmp_path / "whole.pt")])
    assert f"done: {tmp_path}/whole.pt" in capsys.readouterr().out
    assert same(weights(tmp_path / "whole.pt"), weights(material / "run"))
