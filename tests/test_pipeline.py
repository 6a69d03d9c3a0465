"""A run checks the settings of its evaluation before it trains anything."""

from pathlib import Path

import pytest
from helpers import write_images

import clipn.ablation
import clipn.pipeline
from clipn.ablation import run_ablation
from clipn.config.loading import load_config
from clipn.evaluation.evaluate import check_checkpoints, check_evaluation
from clipn.pipeline import run_training


@pytest.fixture
def trained(monkeypatch):
    """The folders of the runs that were trained; training itself is replaced."""
    folders = []
    for module in (clipn.pipeline, clipn.ablation):
        monkeypatch.setattr(module, "train", lambda config: folders.append(config.run.dir))
    return folders


@pytest.fixture
def world(monkeypatch):
    """The folders of the worlds that were made; each holds the image sets `id` and `near`."""
    folders = []

    def make_world(world):
        if world.name:
            folders.append(write_images(Path(world.root), "id/cat/1.png", "id/dog/1.png", "near/1.png"))

    for module in (clipn.pipeline, clipn.ablation):
        monkeypatch.setattr(module, "make_world", make_world)
    return folders


@pytest.fixture
def config_path(config_file, tmp_path):
    """A run with image sets that exist, with one class name per class folder."""
    write_images(tmp_path / "sets", "id/cat/1.png", "id/dog/1.png", "ood/1.png", "flat/1.png", "owls/owl/1.png")
    for folder in ("empty", "noise"):
        (tmp_path / "sets" / folder).mkdir()
    for name in ("1.png", "2.jpg"):
        (tmp_path / "sets/noise" / name).write_text("no image")
    (tmp_path / "latin.txt").write_bytes("Gemüse".encode("latin-1"))
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    sets = f"{{id: {tmp_path}/sets/id, ood: {tmp_path}/sets/ood, templates: simple, methods: [MSP]}}"
    config_file.write_text(f"{config_file.read_text()}eval: {sets}\n")
    return str(config_file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.ood={far: missing}"], "image set 'far': no such folder: missing"),
        (["eval.id={cats: SETS/empty}"], "image set 'cats': no image in .*empty"),
        (["eval.ood={noise: SETS/noise}"], "image set 'noise': none of the 2 images in .*noise is readable"),
        (["eval.id=SETS/noise", "eval.class_names=[cat]"], "none of the 2 images in .*noise is readable"),
        (["eval.methods=[kNN]", "eval.train=SETS/noise"], "none of the 2 images in .*noise is readable"),
        (["eval.class_names=[cat]"], "1 class names for 2 class folders"),
        (["eval.class_names=names.txt"], "names.txt.*no such file"),
        (["eval.ood={id: SETS/ood}"], "'id' is the name of the ID set"),
        (
            ["eval.methods=[kNN]", "eval.train=SETS/owls"],
            r"eval\.train: its class folders \(owl\) are not those of eval\.id \(cat, dog",
        ),
        (["eval.methods=[RMD]", "eval.train=SETS/flat"], r"eval\.train: RMD needs class folders, but .*flat has none"),
        (["eval.methods=[CSP]", "eval.words=latin.txt"], r"eval\.words: latin.txt: not text in UTF-8"),
        (["eval.templates=[photo]"], "'photo' has no"),
        (["eval.checkpoints=missing*.pt"], r"eval\.checkpoints='missing\*\.pt': no such file"),
        (["eval.checkpoints=broken.pt"], "broken.pt"),
    ],
)
def test_an_error_in_the_evaluation_comes_before_the_training(
    config_path, tmp_path, monkeypatch, trained, words, message
):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("SETS", f"{tmp_path}/sets") for word in words]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_training(config_path, words)
    if "checkpoints" not in words[0]:  # an ablation evaluates its own checkpoints
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_ablation(config_path, ["train.lr=1e-3,2e-3", *words])
    assert trained == [] and not (tmp_path / "run").exists()


def test_what_the_run_itself_makes_is_checked_as_soon_as_it_is_there(config_path, tmp_path, trained, world):
    own = ["world.name=toy", "eval.id=${world.root}/id", "eval.ood={near: '${world.root}/near', far: FAR}"]
    for far, worlds in ((f"{tmp_path}/missing", 0), (f"{tmp_path}/sets/noise", 0), ("${world.root}/missing", 1)):
        with pytest.raises((FileNotFoundError, ValueError), match="image set 'far': no(ne of| such folder)"):
            run_training(config_path, [word.replace("FAR", f"'{far}'") for word in own])
        assert len(world) == worlds, "the world is made only if all other sets exist"
    assert trained == []


@pytest.mark.parametrize("base", ["{}", "{model: {pretrained: null}, train: {objective: clip}}"])
def test_a_shared_world_is_made_and_checked_for_all_combinations_first(config_path, tmp_path, trained, world, base):
    words = ["world.name=toy", "eval.id=${world.root}/id", f"base={base}"]
    with pytest.raises(ValueError, match="1 class names for 2"):
        run_ablation(config_path, [*words, "eval.class_names=[cat,dog],[cat]"])
    assert trained == [] and len(world) == 1


def test_sets_and_checkpoints_that_the_run_will_write_are_no_error(config_path):
    words = ["world.name=toy", "eval.id=${world.root}/id", "eval.checkpoints=['${run.dir}/checkpoints/*.pt']"]
    config = load_config(config_path, words)
    check_checkpoints(config)
    check_evaluation(config, world_made=False)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_evaluation(config)
