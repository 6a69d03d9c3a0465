"""The built-in world: the same bytes for the same parameters, the promised layout, and captions that fit."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clipn.toy.generate import ID_THINGS, NEAR_THINGS, make_toy
from clipn.toy.shapes import SCENES, TEXTURES, THINGS

SMALL = {"num_pairs": 30, "images_per_class": 2, "workers": 1}
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
    return make_toy(tmp_path_factory.mktemp("small") / "world", **SMALL)


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> list[str]:
    """The captions of a world with more than one shard."""
    root = make_toy(tmp_path_factory.mktemp("captions"), num_pairs=2600, images_per_class=1)
    assert [path.name for path in sorted((root / "pairs").iterdir())] == ["pairs-00000.tar", "pairs-00001.tar"]
    return [content.decode() for name, content in read_pairs(root).items() if name.endswith(".txt")]


def test_things_are_split_into_disjoint_halves():
    assert len(ID_THINGS) == len(NEAR_THINGS) == 24
    assert set(ID_THINGS) | set(NEAR_THINGS) == set(THINGS)
    assert list(THINGS) == sorted(THINGS), "the order decides the halves, so it must not be chosen by hand"


def test_bytes_follow_from_the_seed_whatever_the_workers(small, tmp_path):
    assert read_all(make_toy(tmp_path / "pool", **SMALL | {"workers": 2})) == read_all(small)
    other = read_all(make_toy(tmp_path / "other", **SMALL, seed=1))
    assert other.keys() == read_all(small).keys()
    same = [name for name, content in read_all(small).items() if other[name] == content]
    assert all(name.startswith("digits/") for name in same), "two seeds may choose one of the few digits, no more"


def test_pairs_are_shards_of_jpg_and_txt(small):
    members = read_pairs(small)
    assert list(members) == [f"{key:09d}.{extension}" for key in range(30) for extension in ("jpg", "txt")]
    for name, content in members.items():
        if name.endswith(".jpg"):
            image = Image.open(io.BytesIO(content))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


def test_every_class_folder_holds_its_images(small):
    for split, count in CLASS_COUNTS.items():
        folders = sorted((small / split).iterdir())
        assert len(folders) == count
        for folder in folders:
            assert [path.name for path in sorted(folder.iterdir())] == ["0000.jpg", "0001.jpg"]
    assert sorted(path.name for path in (small / "id").iterdir()) == ID_THINGS
    assert Image.open(small / "digits" / "7" / "0000.jpg").size == (32, 32)


def test_jpeg_settings_are_the_same_everywhere(small):
    pair = Image.open(io.BytesIO(read_pairs(small)["000000000.jpg"]))
    for split in CLASS_COUNTS:
        for path in (small / split).glob("*/0000.jpg"):
            image = Image.open(path)
            assert (image.quantization, image.layer) == (pair.quantization, pair.layer)


def test_world_json_tells_parameters_and_names(small):
    record = json.loads((small / "world.json").read_text())
    assert (record["num_pairs"], record["images_per_class"], record["seed"], record["image_size"]) == (30, 2, 0, 32)
    assert "version" in record
    assert (record["id"], record["near"]) == (ID_THINGS, NEAR_THINGS)
    assert {split: len(record[split]) for split in CLASS_COUNTS} == CLASS_COUNTS


def test_captions_are_short_varied_and_name_no_digit(captions):
    assert len(captions) == 2600
    assert all(0 < len(caption.split()) <= 18 for caption in captions)
    assert len(set(captions)) > 1000
    words = {word for caption in captions for word in caption.split()}
    assert not any(character.isdigit() for word in words for character in word)
    assert not words & {"digit", "digits", "number", "numbers", "handwritten", "zero", "two", "three"}
    assert set(THINGS) <= words


def test_captions_use_the_right_article(captions):
    for caption in captions:
        words = caption.split()
        for article, word in zip(words, words[1:], strict=False):
            if article in ("a", "an"):
                assert article == ("an" if word[0] in "aeiou" else "a"), caption


def test_kinds_have_their_share(captions):
    things = [caption for caption in captions if set(caption.split()) & set(THINGS)]
    rest = [caption for caption in captions if not set(caption.split()) & set(THINGS)]
    scenes = [caption for caption in rest if any(name in caption for name in SCENES)]
    textures = [caption for caption in rest if any(name in caption for name in TEXTURES)]
    assert len(things) + len(scenes) + len(textures) == len(captions)
    assert 0.06 < len(scenes) / len(captions) < 0.1
    assert 0.06 < len(textures) / len(captions) < 0.1


def test_a_second_call_reuses_and_other_parameters_refuse(tmp_path):
    root = make_toy(tmp_path, **SMALL)
    shard = root / "pairs" / "pairs-00000.tar"
    shard.write_bytes(b"touched")
    assert make_toy(str(root), **SMALL | {"workers": 2}) == root
    assert shard.read_bytes() == b"touched"
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 3.*another root") as error:
        make_toy(root, **SMALL, seed=3)
    assert str(root) in str(error.value)


def test_a_half_made_world_is_made_anew(small, tmp_path):
    make_toy(tmp_path, **SMALL | {"images_per_class": 3, "num_pairs": 40})
    (tmp_path / "world.json").unlink()
    (tmp_path / "near" / NEAR_THINGS[0] / "0000.jpg").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    world = read_all(make_toy(tmp_path, **SMALL))
    assert world.pop("notes.txt") == b"mine"
    assert world == read_all(small)


def test_folders_of_others_are_left_alone(tmp_path):
    image = tmp_path / "digits" / "0" / "0000.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"mine")
    with pytest.raises(ValueError, match="digits"):
        make_toy(tmp_path, **SMALL)
    assert image.read_bytes() == b"mine"


@pytest.mark.parametrize("name, value", [("num_pairs", 0), ("images_per_class", 0), ("seed", -1), ("image_size", 4)])
def test_parameters_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        make_toy(tmp_path / "world", **{name: value})
    assert not (tmp_path / "world").exists()


def test_other_image_sizes(tmp_path):
    root = make_toy(tmp_path, num_pairs=5, images_per_class=1, image_size=48, workers=1)
    assert {Image.open(path).size for path in root.rglob("*.jpg")} == {(48, 48)}
