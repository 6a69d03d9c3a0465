"""`clipn prepare photos`: the photos of configs/photos.yaml from small archives in the published formats."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import image_bytes, write_tar, write_zip
from PIL import Image
from torchvision import datasets

from clipn.data import photos
from clipn.data.known_sets import KNOWN_SETS
from clipn.data.photos import copy_photos, differing, find_photos, prepare_photos
from clipn.data.prepare import run_prepare

REAL = Path(__file__).resolve().parents[2] / "shared/data/photos"  # optional, beside the project

NAMES = ["worm_snake_s_000012.png", "built-in_bed_s_001.png", "bed_s_000003.png", "Worm_snake_s_000700.png"]
CLASSES = ["bed", "oak_tree"]
LABELS = [1, 0, 0, 1]
TRAIN = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
PAIRS = [3, 1, 0]  # the training photos of the pairs, in their order
CAPTIONS = ["a worm snake here, an oak tree", "photo of built in bed", "photo of worm snake, an oak tree"]
CIFAR10 = ["cat", "airplane"]  # not in the order of the alphabet
TINY = {
    "words.txt": "n02\tcock, hen\nn01\tgoldfish\nn03\tnot a class\n",
    "val/val_annotations.txt": "val_0.JPEG\tn01\t0\t0\nval_1.JPEG\tn02\t0\t0\nval_2.JPEG\tn02\t0\t0\n",
}


def blocks_of(pixels: np.ndarray) -> list[int]:
    """The rounded mean brightness of six blocks, by PIL."""
    grey = Image.fromarray(pixels).convert("L").reduce(8)
    return [grey.getpixel((n % 4, n // 4)) for n in (1, 4, 6, 9, 11, 14)]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def publish_cifar(kind, parts: dict[str, dict], server, tmp_path, monkeypatch) -> None:
    """Serve an archive of these pickled parts, the last of which has the class names, as torchvision's `kind`."""
    members = {name: pickle.dumps(part) for name, part in parts.items()}
    archive = write_tar(tmp_path / "x.tar", {f"{kind.base_folder}/{name}": part for name, part in members.items()})
    served = server.files[kind.filename] = gzip.compress(archive.read_bytes())
    train, test, meta = ([name, md5(members[name])] for name in parts)
    made = {"url": server.url(kind.filename), "tgz_md5": md5(served), "train_list": [train], "test_list": [test]}
    for key, value in (made | {"meta": kind.meta | {"filename": meta[0], "md5": meta[1]}}).items():
        monkeypatch.setattr(kind, key, value)


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """Three small archives on a server, and a choice of three pairs, four test photos and two validation photos."""
    monkeypatch.chdir(tmp_path)
    rows = [pixels.transpose(2, 0, 1).ravel() for pixels in TRAIN]
    train = {"data": np.array(rows), "fine_labels": LABELS, "filenames": NAMES}
    test = {"data": np.array(rows[::-1]), "fine_labels": [1, 0, 1, 0]}
    parts = {"train": train, "test": test, "meta": {"fine_label_names": CLASSES}}
    publish_cifar(datasets.CIFAR100, parts, server, tmp_path, monkeypatch)
    batch = {"data": np.array(rows), "labels": [0, 1, 1, 0]}
    parts = {"data_batch_1": batch, "test_batch": batch, "batches.meta": {"label_names": CIFAR10}}
    publish_cifar(datasets.CIFAR10, parts, server, tmp_path, monkeypatch)
    images = {f"val/images/val_{n}.JPEG": image_bytes((n, 0, 0)) for n in range(3)}
    tiny = {f"tiny-imagenet-200/{name}": content for name, content in (TINY | images).items()}
    served = server.files["tiny.zip"] = write_zip(tmp_path / "x.zip", tiny).read_bytes()
    known = replace(KNOWN_SETS["tiny-imagenet"], url=server.url("tiny.zip"), md5=md5(served))
    monkeypatch.setitem(KNOWN_SETS, "tiny-imagenet", known)

    chosen = {"noun": [1, 0, 1], "wording": [1, 2, 3], "tiny_imagenet_val": [0, 2]}
    chosen["pairs"] = [blocks_of(TRAIN[row]) for row in PAIRS]
    chosen["cifar100_test"] = [blocks_of(TRAIN[::-1][row]) for row in (3, 2)]
    chosen["cifar10_test"] = [blocks_of(TRAIN[row]) for row in (2, 1, 0, 3)]
    np.savez(tmp_path / "chosen.npz", **{name: np.array(value, dtype=np.uint16) for name, value in chosen.items()})
    names = ["pairs-00000.tar", "pairs-00001.tar", "cifar100_test.tar", "cifar10_test.tar"]
    names += ["tiny_imagenet_val.tar", "tiny_imagenet_names.json"]
    manifest = {
        "templates": ["a {} here", "photo of {}"],
        "suffixes": ["", ", an {}"],
        "nouns": ["built in bed", "worm snake"],
    }
    monkeypatch.setattr(photos, "_MANIFEST", manifest | {"captions": sha256("\n".join(CAPTIONS).encode())})
    monkeypatch.setattr(photos, "_CHOSEN", tmp_path / "chosen.npz")
    monkeypatch.setattr(photos, "_PAIRS_PER_SHARD", 2)
    monkeypatch.setattr(photos, "FILES", dict.fromkeys(names, "unknown"))
    return server


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def shows(image: bytes, pixels: np.ndarray) -> bool:
    """Whether an image shows these pixels and no others of TRAIN, which are noise."""
    shown = np.asarray(Image.open(io.BytesIO(image)), float)
    differences = [np.abs(shown - other).mean() for other in (pixels, *TRAIN)]
    return differences[0] <= min(differences)


def test_archives_become_shards_and_class_folders(published, capsys):
    run_prepare(["photos"], "data")
    out = capsys.readouterr().out
    assert out.endswith("photos: ready in data/photos\n") and "another JPEG encoder" in out, "no hash is known"
    folder, pairs = Path("data/photos"), {}
    assert sorted(path.name for path in folder.iterdir()) == sorted(photos.FILES)
    for shard, size in (("pairs-00000.tar", 4), ("pairs-00001.tar", 2)):
        assert len(members(folder / shard)) == size
        pairs |= members(folder / shard)
    assert list(pairs) == [f"{n:09d}.{kind}" for n in range(3) for kind in ("jpg", "txt")]
    assert [pairs[f"{n:09d}.txt"].decode() for n in range(3)] == CAPTIONS
    assert all(shows(pairs[f"{n:09d}.jpg"], TRAIN[row]) for n, row in enumerate(PAIRS))

    test = members(folder / "cifar100_test.tar")
    assert list(test) == ["cifar100_test/bed/0000.jpg", "cifar100_test/oak_tree/0000.jpg"]
    assert all(shows(image, TRAIN[row]) for image, row in zip(test.values(), (0, 1), strict=True))
    test = members(folder / "cifar10_test.tar")
    assert list(test) == [f"cifar10_test/{name}/000{n}.jpg" for name in sorted(CIFAR10) for n in (0, 1)]
    assert all(shows(image, TRAIN[row]) for image, row in zip(test.values(), (2, 1, 0, 3), strict=True))
    tiny = members(folder / "tiny_imagenet_val.tar")
    assert tiny == {f"tiny_imagenet_val/{a}/0000.jpg": image_bytes((n, 0, 0)) for a, n in (("n01", 0), ("n02", 2))}
    assert json.loads((folder / "tiny_imagenet_names.json").read_text()) == {"n01": "goldfish", "n02": "cock, hen"}

    published.files.clear()
    run_prepare(["photos"], "data")  # nothing is downloaded again


def test_archives_put_there_by_hand_give_the_same_bytes_again(published, tmp_path, monkeypatch, capsys):
    first = prepare_photos("data")
    hashes = {name: sha256((first / name).read_bytes()) for name in photos.FILES}
    monkeypatch.setattr(photos, "FILES", hashes)
    (tmp_path / "other").mkdir()
    (tmp_path / "data/downloads").rename(tmp_path / "other/downloads")
    published.files.clear()
    capsys.readouterr()
    assert differing(prepare_photos("other")) == [] and capsys.readouterr().out == ""


def test_a_missing_archive_is_one_line_that_says_where_to_put_it(published, tmp_path, capsys):
    del published.files["cifar-10-python.tar.gz"]
    with pytest.raises(
        FileNotFoundError, match=r"no such file: data/downloads/cifar-10-python.tar.gz; put.* --from"
    ) as e:
        prepare_photos("data")
    assert "\n" not in str(e.value) and not Path("data/photos").exists()
    with pytest.raises(ValueError, match="not ready: photos$"):
        run_prepare(["photos"], "data")
    assert "made from cifar-100-python.tar.gz, cifar-10-python.tar.gz, tiny-imagenet-200.zip" in capsys.readouterr().err


def test_an_archive_that_is_not_the_published_one_is_refused(published):
    for path in (Path("data/downloads/cifar-100-python.tar.gz"), Path("data/downloads/tiny-imagenet-200.zip")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"something else")
        with pytest.raises(ValueError, match=rf"{path}: not the published file: its MD5"):
            prepare_photos("data")
        path.unlink()
    assert not Path("data/photos").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 30}, "the archive lacks photos of 'built in bed'"),
        ({"noun": 1}, "the archive lacks photos of 'worm snake'"),  # as that row is of another noun
        ({"wording": 1}, "give other captions than those of configs/photos.yaml"),
    ],
)
def test_an_archive_without_a_photo_or_its_caption_is_refused(published, tmp_path, change, message):
    chosen = dict(np.load(tmp_path / "chosen.npz"))
    for name, value in change.items():
        chosen[name][1] += value
    np.savez(tmp_path / "chosen.npz", **chosen)
    with pytest.raises(ValueError, match=message):
        prepare_photos("data")
    assert not Path("data/photos").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_leaves_nothing_that_looks_complete(published, monkeypatch, killed):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(photos, "_write_tiny", stop)
        if killed:  # SIGKILL: no line of Python runs after it
            patch.setattr(photos.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            prepare_photos("data")
    assert not Path("data/photos").exists() and Path("data/.photos.partial").exists() == killed
    Path("data/.photos.partial").mkdir(exist_ok=True)
    Path("data/.photos.partial/stale").touch()
    assert sorted(path.name for path in prepare_photos("data").iterdir()) == sorted(photos.FILES)
    assert not Path("data/.photos.partial").exists()


def test_a_folder_that_has_the_files_is_copied_if_they_are_the_same(published, tmp_path, monkeypatch):
    made = prepare_photos("first")
    monkeypatch.setattr(photos, "FILES", {path.name: sha256(path.read_bytes()) for path in made.iterdir()})
    published.files.clear()
    run_prepare(["photos"], "data", source="first/photos")
    assert differing(Path("data/photos")) == []
    (made / "cifar10_test.tar").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"first/photos/cifar10_test.tar: no such file, or not the one of"):
        copy_photos(made, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    with pytest.raises(ValueError, match="--from first/photos: only `clipn prepare photos` copies from a folder"):
        run_prepare(["cifar10"], "data", source="first/photos")

    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")  # now data/photos is beside the project
    assert differing(prepare_photos("data")) == []


def test_a_folder_that_lacks_a_file_is_an_error(published):
    (prepare_photos("data") / "cifar10_test.tar").unlink()
    with pytest.raises(ValueError, match=r"data/photos/cifar10_test.tar: no such file; move data/photos away"):
        prepare_photos("data")


def test_the_packaged_choice_is_complete():
    chosen, manifest = np.load(photos._CHOSEN), photos._MANIFEST
    shapes = {name: chosen[name].shape for name in chosen.files}
    assert shapes.pop("noun") == shapes.pop("wording") == (30_000,) and shapes.pop("pairs") == (30_000, 6)
    assert shapes == {"cifar100_test": (4_000, 6), "cifar10_test": (2_000, 6), "tiny_imagenet_val": (3_000,)}
    assert chosen["noun"].max() + 1 == len(manifest["nouns"]) == len(set(manifest["nouns"]))
    assert chosen["wording"].max() + 1 == len(manifest["templates"]) * len(manifest["suffixes"])
    assert len(photos.FILES) == 12 + 4 and all(len(value) == 64 for value in photos.FILES.values())


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/photos is not beside the project")
def test_the_packaged_choice_finds_the_photos_of_a_real_shard():
    assert differing(REAL) == []
    files, chosen = members(REAL / "pairs-00011.tar"), np.load(photos._CHOSEN)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(files[name]))) for name in files if name.endswith(".jpg")])
    nouns = chosen["noun"][-2500:]
    noisy = np.clip(pixels + np.random.default_rng(0).integers(-3, 4, pixels.shape), 0, 255).astype(np.uint8)
    order = np.random.default_rng(1).permutation(2500)
    rows = find_photos(noisy[order], nouns[order], chosen["pairs"][-2500:], nouns)
    assert order[rows].tolist() == list(range(2500))
    captions = [files[name].decode() for name in files if name.endswith(".txt")]
    assert all(photos._MANIFEST["nouns"][noun] in caption for noun, caption in zip(nouns, captions, strict=True))
