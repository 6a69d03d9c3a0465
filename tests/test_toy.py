"""The built-in world: the same bytes for the same parameters, the documented layout, and captions that fit."""

import io
import json
import re
import tarfile
from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import replace_figures
from helpers import write_images, write_tar
from PIL import Image

from clipn.config.loading import load_config
from clipn.config.schema import WorldConfig
from clipn.pipeline import run_training
from clipn.toy import generate
from clipn.toy.drawing import draw_scene, draw_things
from clipn.toy.generate import World, make_toy
from clipn.toy.photos import unpack_photos
from clipn.toy.shapes import CLASSES, COLOURS, KNOWN_SCENES, SCENE_CLASSES, SCENES, TEXTURES, THINGS, UNKNOWN_SCENES
from clipn.toy.world import make_world

SMALL = World(num_pairs=30, images_per_class=2)
CLASS_COUNTS = {"id": 24, "near": 24, "scenes": 8, "textures": 8, "digits": 10}


def read_all(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read_pairs(root: Path) -> dict[str, bytes]:
    """The members of all shards by name, in order."""
    members = {}
    for path in sorted((root / "pairs").iterdir()):
        with tarfile.open(path, "r:") as archive:
            members |= {member.name: archive.extractfile(member).read() for member in archive}
    return members


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_toy(tmp_path_factory.mktemp("small") / "world", SMALL, workers=1)


@pytest.fixture(scope="module")
def before_scenes(tmp_path_factory) -> Path:
    """A small world in which things stand before scenes."""
    return make_toy(
        tmp_path_factory.mktemp("before_scenes"), replace(SMALL, num_pairs=300, before_scenes=True), workers=1
    )


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> list[str]:
    """The captions of a world of two shards."""
    root = tmp_path_factory.mktemp("captions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "PAIRS_PER_SHARD", 1500)
        make_toy(root, World(num_pairs=2000, images_per_class=1, image_size=8), workers=1)
    members = read_pairs(root)
    assert {Image.open(path).size for path in root.rglob("*.jpg")} == {(8, 8)}
    assert [name for name in members if name.endswith("0000.jpg")] == ["000000000.jpg", "000010000.jpg"]
    return [content.decode() for name, content in members.items() if name.endswith(".txt")]


def test_things_are_split_into_disjoint_halves_by_the_alphabet():
    assert {split: len(names) for split, names in CLASSES.items()} == CLASS_COUNTS
    assert sorted(CLASSES["id"] + CLASSES["near"]) == list(THINGS)
    assert CLASSES["id"][0] < CLASSES["near"][0] < CLASSES["id"][1], "nobody chooses the halves by hand"


def test_every_thing_has_its_own_shape():
    images = {name: np.asarray(draw_things(np.random.default_rng(1), [name], 32)[0], float) for name in THINGS}
    for first, second in combinations(THINGS, 2):
        assert np.abs(images[first] - images[second]).mean() > 2, (first, second)


def test_bytes_follow_from_the_seed_whatever_the_workers(small, tmp_path):
    assert read_all(make_toy(tmp_path / "pool", SMALL, workers=2)) == read_all(small)
    other = read_all(make_toy(tmp_path / "other", replace(SMALL, seed=1), workers=1))
    assert other.keys() == read_all(small).keys()
    same = [name for name, content in read_all(small).items() if other[name] == content]
    assert all(name.startswith("digits/") for name in same), "two seeds may choose one of the few digits, no more"


def test_layout_image_format_and_record(small):
    members = read_pairs(small)
    assert list(members) == [f"{key:09d}.{extension}" for key in range(30) for extension in ("jpg", "txt")]
    images = [Image.open(io.BytesIO(content)) for name, content in members.items() if name.endswith(".jpg")]
    for split, names in CLASSES.items():
        folders = sorted((small / split).iterdir())
        assert [folder.name for folder in folders] == [name.replace(" ", "_") for name in names]
        for folder in folders:
            paths = sorted(folder.iterdir())
            assert [path.name for path in paths] == ["0000.jpg", "0001.jpg"]
            images += map(Image.open, paths)
    assert {(image.format, image.mode, image.size) for image in images} == {("JPEG", "RGB", (32, 32))}
    assert len({(str(image.quantization), str(image.layer)) for image in images}) == 1, "compression marks a set"

    record = json.loads((small / "world.json").read_text())
    assert record == {"version": 1, "num_pairs": 30, "images_per_class": 2, "seed": 0, "image_size": 32} | CLASSES


def test_captions_are_short_varied_grammatical_and_name_no_digit(captions):
    assert len(captions) == 2000 and len(set(captions)) > 1000
    assert all(0 < len(caption.split()) <= 18 for caption in captions)
    text = "\n".join(captions)
    assert not re.search(r"\d|\b(digits?|numbers?|handwritten|zero|two|three)\b", text)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\ban? (\w+ and )?(\w+ )?(mountains|bricks|stripes)\b", text)
    assert set(THINGS) <= set(text.split())


def test_kinds_have_their_share(captions):
    rest = [caption for caption in captions if not set(caption.split()) & set(THINGS)]
    scenes, textures = (sum(any(name in text for name in kind) for text in rest) for kind in (SCENES, TEXTURES))
    assert scenes + textures == len(rest)
    assert 0.06 < scenes / len(captions) < 0.1 and 0.06 < textures / len(captions) < 0.1


def test_a_second_call_reuses_the_world_and_refuses_other_parameters(tmp_path):
    root = make_toy(tmp_path, SMALL, workers=1)
    shard = root / "pairs" / "pairs-00000.tar"
    shard.write_bytes(b"touched")
    assert make_toy(str(root), SMALL, workers=2) == root and shard.read_bytes() == b"touched"
    with pytest.raises(ValueError, match=rf"{root} .*'seed': 0.*'seed': 3.*another root"):
        make_toy(root, replace(SMALL, seed=3))
    with pytest.raises(ValueError, match=r"'image_size': 32}, but .*'before_scenes': True} was asked for"):
        make_toy(root, replace(SMALL, before_scenes=True))


def test_an_unfinished_world_is_replaced_and_other_files_stay(small, tmp_path):
    make_toy(tmp_path, replace(SMALL, images_per_class=3, num_pairs=40), workers=1)
    (tmp_path / "world.json").unlink()
    (tmp_path / "near" / CLASSES["near"][0] / "0000.jpg").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    world = read_all(make_toy(tmp_path, SMALL, workers=1))
    assert world.pop("notes.txt") == b"mine"
    assert world == read_all(small)


def test_folders_that_belong_to_no_world_are_left_alone(tmp_path):
    image = write_images(tmp_path, "digits/0/0000.jpg") / "digits/0/0000.jpg"
    with pytest.raises(ValueError, match="holds digits but no pairs"):
        make_toy(tmp_path, SMALL)
    assert image.is_file()


@pytest.mark.parametrize("name, value", [("num_pairs", 0), ("images_per_class", 0), ("seed", -1), ("image_size", 4)])
def test_parameters_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        World(**{name: value})


def test_a_world_with_scenes_has_its_own_images_and_further_sets(small, before_scenes):
    record, own, plain = (
        json.loads((before_scenes / "world.json").read_text()),
        read_all(before_scenes),
        read_all(small),
    )
    assert record["before_scenes"] is True and SCENE_CLASSES.items() <= record.items()
    for split, names in (CLASSES | SCENE_CLASSES).items():
        folders = sorted(folder.name for folder in (before_scenes / split).iterdir())
        assert folders == [name.replace(" ", "_") for name in names]
    unchanged = {name.split("/")[0] for name, content in plain.items() if own[name] == content}
    assert unchanged == {"scenes", "textures", "digits"}, "sets without things do not depend on world.before_scenes"
    things = [own[name] for name in own if name.split("/")[0] in ("id", "near", *SCENE_CLASSES)]
    assert len(set(things)) == len(things) == 5 * 24 * 2, "test and training images differ"


def test_things_stand_before_known_scenes_or_shifted_ones(before_scenes, monkeypatch):
    assert sorted(KNOWN_SCENES + UNKNOWN_SCENES) == sorted(SCENES) and len(KNOWN_SCENES) == len(UNKNOWN_SCENES)
    drawn = defaultdict(set)

    def record(rng, names, image_size, scene=None):
        drawn[record.split].add(scene)
        return draw_things(rng, names, image_size, scene)

    monkeypatch.setattr(generate, "draw_things", record)
    world = World(images_per_class=40, before_scenes=True)
    for record.split in ("id", "near", *SCENE_CLASSES):
        generate._write_class(before_scenes / "again", world, record.split, 3)
    record.split = "pairs"
    for index in range(100):
        generate._pair(world.rng("pairs", index), world)
    assert drawn["id"] == drawn["near"] == drawn["train"] == set(KNOWN_SCENES)
    assert drawn["id_shifted"] == drawn["near_shifted"] == set(UNKNOWN_SCENES)
    assert drawn["pairs"] == {None, *SCENES}, "things stand on pale backgrounds too, where a small base learns them"


def test_captions_of_a_world_with_scenes_name_things_without_colours_and_sometimes_the_scene():
    world = World(image_size=8, before_scenes=True)
    captions = [generate._pair(world.rng("pairs", index), world)[1] for index in range(1500)]
    named = [re.search(r" in front of (an? )?(.*)", caption)[2] for caption in captions if " in front of " in caption]
    assert set(named) == set(SCENES), "of all scenes, as the base knows more than the ID training images show"
    assert 0.04 < len(named) / len(captions) < 0.12
    of_things = [set(caption.split()) for caption in captions if set(caption.split()) & set(THINGS)]
    assert not any(words & {*COLOURS, "small", "large", "tilted"} for words in of_things)
    assert 0.8 < len(of_things) / len(captions) < 0.88


def test_a_thing_leaves_the_scene_around_it_visible():
    """Two thirds of the pixels are alike, however the thing is drawn."""
    for seed in range(5):
        scene = np.asarray(draw_scene(np.random.default_rng(seed), "ocean", 32), float)
        image, things, text = draw_things(np.random.default_rng(seed), ["key"], 32, "ocean")
        assert (np.abs(np.asarray(image, float) - scene).mean(axis=2) < 30).mean() > 0.6
        assert 0.6 <= things[0].size <= 0.8 and text == "in front of an ocean"


def test_photos_are_unpacked_once_beside_the_digits(tmp_path):
    source, root = tmp_path / "source", tmp_path / "world"
    config = WorldConfig(name="photos", source=str(source), root=str(root))
    with pytest.raises(FileNotFoundError, match="no such folder, or no \\*_test.tar"):
        make_world(config)
    source.mkdir()
    write_tar(source / "pets_test.tar", {"pets/cat/1.jpg": b"cat", "pets/dog/1.jpg": b"dog"})
    make_world(config)
    assert (root / "pets/dog/1.jpg").read_bytes() == b"dog" and len(list((root / "digits").glob("*/*.jpg"))) == 500
    assert not (root / "cifar100_train").exists(), "there are no pairs"
    (root / "pets/dog/1.jpg").write_bytes(b"touched")
    make_world(config)
    assert (root / "pets/dog/1.jpg").read_bytes() == b"touched"
    write_tar(source / "cars_val.tar", {"cars/red/1.jpg": b"car"})
    with pytest.raises(ValueError, match="was unpacked from other archives"):
        make_world(config)


def test_photos_of_training_pairs_become_class_folders(tmp_path):
    source, root = tmp_path / "source", tmp_path / "world"
    source.mkdir()
    write_tar(source / "cifar100_test.tar", {"cifar100_test/bee/1.jpg": b"", "cifar100_test/oak_tree/1.jpg": b""})
    captions = ["photo of one bee", "a Honeybee, a kind of BEE", "an oak tree", "a bee on an oak tree", "an oak"]
    for shard in range(3):
        pairs = {f"{shard}{number}": caption for number, caption in enumerate(captions)}
        images = {f"{key}.jpg": f"image {key}".encode() for key in pairs}
        write_tar(source / f"pairs-{shard}.tar", images | {f"{key}.txt": pairs[key].encode() for key in pairs})
    unpack_photos(source, root)
    written = {path.relative_to(root / "cifar100_train").as_posix(): path.read_bytes() for path in root.rglob("??.jpg")}
    expected = {"bee": ("00", "01", "10", "11"), "oak_tree": ("02", "12")}  # not of the last shard, which is held out
    assert written == {f"{name}/{key}.jpg": f"image {key}".encode() for name in expected for key in expected[name]}
    (root / "photos.json").write_text(json.dumps({"cifar100_test.tar": (source / "cifar100_test.tar").stat().st_size}))
    with pytest.raises(ValueError, match="or by an older version; delete it"):  # which had no training images
        unpack_photos(source, root)


def test_toy_vit_runs_and_measures_id_things_before_unknown_scenes_too(tmp_path, monkeypatch):
    """Both commands of configs/toy_vit.yaml, made small."""
    monkeypatch.chdir(tmp_path)
    replace_figures(monkeypatch)
    small = "world.num_pairs=32 world.images_per_class=7 train.batch_size=16 train.epochs=1"
    small = f"{small} base.train.batch_size=16 base.train.epochs=1 data.workers=0 run.device=cpu"
    words = [*small.split(), f"data.index_dir={tmp_path}/index"]
    ood = load_config("toy_vit").eval.ood
    known = [scene.replace(" ", "_") for scene in KNOWN_SCENES]
    assert ood["scenes_known"]["classes"] == ood["scenes_unknown"]["exclude"] == known
    for id_set in ("id", "id_shifted"):
        run_training("toy_vit", [*words, f"eval.id={{{id_set}: '${{world.root}}/{id_set}'}}"])
        results = pd.read_csv("runs/toy_vit/results.csv")
        assert set(results["id_set"]) == {id_set} and list(results["ood_set"].unique()) == list(ood)
        assert {"MCM", "GL-MCM", "kNN", "RMD", "PLP-Energy", "PLP-RMD", "CTW", "ATD"} <= set(results["method"])
    log = Path("runs/toy_vit/log").read_text()
    assert log.count("from step 0") == 1 and log.count("from step 2") == 1, "the second command trains nothing"
