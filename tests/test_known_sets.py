"""Image sets known by name: the table, the counts that are checked, and the configs that name them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import write_images
from open_clip import IMAGENET_CLASSNAMES

from clipn.config.loading import load_config
from clipn.data.image_sets import open_image_sets, open_known_set
from clipn.data.known_sets import KNOWN_SETS, known_set
from clipn.data.prompts import load_class_names

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROTOCOLS = sorted(CONFIGS.glob("eval_*.yaml"))
WHOLE = ("a/1.png", "a/2.png", "b/1.png", "b/2.png")


@pytest.fixture
def small(monkeypatch):
    """A known set of 4 images in 2 class folders, named "small"; other fields by keyword."""

    def _small(**fields):
        row = replace(KNOWN_SETS["textures"], title="Small", images=4, classes=2, example="a/<image>.png")
        monkeypatch.setitem(KNOWN_SETS, "small", replace(row, **fields))

    _small()
    return _small


def test_every_set_has_a_place_and_a_source():
    for name, known in KNOWN_SETS.items():
        assert known.images > 0 and known.page.startswith("http") and known.example, name
        assert not Path(known.folder).is_absolute() and ".." not in known.folder, name
        assert known.url or known.archive, f"{name} can neither be downloaded nor put in place"
        assert known.md5 is None or len(known.md5) == 32 and int(known.md5, 16), name
    folders = [known.folder for known in KNOWN_SETS.values() if not known.subset]
    assert len(set(folders)) == len(folders)


def test_a_set_based_on_another_keeps_its_source():
    imagenet, subset = known_set("imagenet"), known_set("imagenet100")
    assert (subset.folder, subset.archive, subset.md5) == (imagenet.folder, imagenet.archive, imagenet.md5)
    assert (subset.images, subset.classes, len(set(subset.subset))) == (5000, 100, 100) and not imagenet.subset


def test_imagenet_100_has_a_name_for_each_of_its_folders(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    subset = known_set("imagenet100").subset
    words = json.loads((CONFIGS / "imagenet100_names.json").read_text())
    assert list(words) == sorted(subset) and set(words.values()) <= set(IMAGENET_CLASSNAMES)
    assert (words["n02134084"], words["n13052670"]) == ("polar bear", "hen of the woods mushroom")
    names = load_class_names(load_config("configs/eval_imagenet100.yaml").eval.class_names, subset)
    assert len(set(names)) == 100 and names[:2] == ["stingray", "ostrich"]


def test_a_flat_set_opens_at_any_depth(small, tmp_path):
    small(classes=None)
    for folder, names in (("top", "abcd"), ("below", ["images/a", "images/b", "images/c", "images/d"])):
        root = write_images(tmp_path / folder, *(f"{name}.png" for name in names))
        assert len(open_known_set("mine", "small", root)) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (WHOLE[:3], "found 3 images in 2 class folders"),
        ((*WHOLE, "b/3.png"), "found 5 images in 2 class folders"),
        (("a/1.png", "a/2.png", "a/3.png", "a/4.png"), "found 4 images in 1 class folders"),
        (("1.png", "2.png", "3.png", "4.png"), "4 images in .* are not sorted into class folders"),
        ((), "no image in"),
        (None, "no such folder"),
    ],
)
def test_an_incomplete_set_is_an_error_with_the_published_numbers(small, tmp_path, names, message):
    root = tmp_path / "set" if names is None else write_images(tmp_path / "set", *names)
    with pytest.raises(FileNotFoundError if names is None else ValueError, match=f"'mine'.*{message}") as error:
        open_known_set("mine", "small", root)
    for part in ("4 images in 2 class folders", f"{root}/a/<image>.png", "clipn prepare small", "vgg/data"):
        assert part in str(error.value), part
    assert "\n" not in str(error.value), "the command line shows one line"


def test_imagenet_without_class_folders_is_explained(tmp_path):
    root = write_images(tmp_path / "val", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG")
    for name, count in (("imagenet", "50000 images in 1000"), ("imagenet100", "5000 images in 100")):
        expected = rf"{count} class folders, {root}/n01\d+/ILSVRC2012_val.*{name} --root DIR unpacks and sorts it"
        with pytest.raises(ValueError, match=rf"not sorted into class folders; .*{expected}.*image-net\.org"):
            open_known_set("ImageNet-1K", name, root)


def test_a_published_subset_is_selected_from_the_folder(small, tmp_path):
    root = write_images(tmp_path, *WHOLE, "c/1.png")
    small(subset=("a", "b"))
    assert open_known_set("mine", "small", root).classes == ["a", "b"]
    assert open_known_set("mine", "small", root, exclude=["a"]).classes == ["b"]
    small(subset=("a", "z"))
    with pytest.raises(ValueError, match=r"no class folder 'z'.*4 images in 2 class folders"):
        open_known_set("mine", "small", root)


def test_a_config_names_a_known_set_beside_its_path(small, tmp_path):
    root = str(write_images(tmp_path, *WHOLE))
    entry = {"path": root, "known": "small"}
    whole, some = open_image_sets({"all": entry, "some": {**entry, "exclude": ["a"]}}, "eval.ood")
    assert (whole.name, whole.classes, whole.labels) == ("all", ["a", "b"], [0, 0, 1, 1])
    assert (some.classes, len(some)) == (["b"], 2)
    for wrong in ("smal", "", ["small"], 3):
        with pytest.raises(ValueError, match=r"eval\.ood\.all\.known=.*: expected one of imagenet, .*small"):
            open_image_sets({"all": {"path": root, "known": wrong}}, "eval.ood")
    with pytest.raises(ValueError, match=r"eval\.ood\.all.*path with known"):
        open_image_sets({"all": {"known": "small"}}, "eval.ood")


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_a_protocol_names_known_sets_in_their_folders(path):
    config = load_config(path, ["data.root=/data"])
    comments = path.read_text().split("\nrun:")[0]
    assert f"configs/{path.name}" in comments, "it opens with its command"
    sets = {**config.eval.id, **config.eval.ood, **(config.eval.train or {})}
    if path.stem != "eval_own":
        prepared = [line.split()[3:-2] for line in comments.splitlines() if "clipn prepare" in line]
        assert sorted(entry["known"] for entry in sets.values()) == sorted(sum(prepared, []))
        assert all(entry["path"] == f"/data/{known_set(entry['known']).folder}" for entry in sets.values())
    with pytest.raises(FileNotFoundError, match="no such folder: /data"):
        open_image_sets(config.eval.id, "eval.id")


def test_the_protocols_are_those_of_the_papers():
    mos, small = ["inaturalist", "sun", "places", "textures"], ["svhn", "textures", "tiny-imagenet", "lsun"]
    settings = {path.stem: load_config(path).eval for path in PROTOCOLS if path.stem != "eval_own"}
    assert {
        name: [entry["known"] for entry in [*sets.id.values(), *sets.ood.values()]] for name, sets in settings.items()
    } == {
        "eval_imagenet": ["imagenet", *mos],
        "eval_imagenet_hard": ["imagenet", "imagenet-o", "openimage-o", "ninco", "ssb-hard"],
        "eval_imagenet100": ["imagenet100", *mos],
        "eval_imagenet_plp": ["imagenet", *mos, "imagenet-o", "ninco"],
        "eval_imagenet_tagood": ["imagenet", *mos, "imagenet-o", "openimage-o"],
        "eval_imagenet_tagood_ram": ["imagenet", *mos, "imagenet-o", "openimage-o"],
        "eval_cifar10": ["cifar10", "cifar100", *small],
        "eval_cifar100": ["cifar100", "cifar10", *small],
    }


def test_training_images_have_the_classes_of_the_id_set():
    pairs = [(of.id, of.train) for of in (load_config(path).eval for path in PROTOCOLS) if of.train]
    named = [[known_set(entry["known"]) for sets in pair for entry in sets.values()] for pair in pairs]
    assert {train.title for _, train in named} == {
        f"{of} training images" for of in ("CIFAR-10", "CIFAR-100", "ImageNet-1K")
    }
    assert all(within.classes == train.classes for within, train in named)


def test_the_own_folders_of_the_example_work_as_described(tmp_path):
    write_images(tmp_path / "my_classes", "polar_bear/1.jpg", "owl/1.png")
    write_images(tmp_path / "other_things", "cup/1.webp")
    write_images(tmp_path / "noise", "1.png")
    settings = load_config(CONFIGS / "eval_own.yaml", [f"data.root={tmp_path}"]).eval
    (mine,), others = open_image_sets(settings.id, "eval.id"), open_image_sets(settings.ood, "eval.ood")
    assert load_class_names(settings.class_names, mine.classes) == ["owl", "polar bear"]
    assert [(images.name, len(images)) for images in others] == [("other things", 1), ("noise", 1)]
