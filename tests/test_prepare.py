"""`clipn prepare`: known image sets from small archives and folders of this machine."""

import gzip
import hashlib
import io
import pickle
import tarfile
from dataclasses import replace
from itertools import repeat
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.io
from helpers import files, image_bytes, write_images, write_tar, write_zip
from PIL import Image
from torchvision import datasets
from torchvision.datasets import imagenet

from clipn.data import downloads as downloads_module
from clipn.data import prepare as module
from clipn.data.downloads import download, unpack
from clipn.data.image_sets import open_image_set
from clipn.data.known_sets import KNOWN_SETS, KnownSet
from clipn.data.prepare import prepare, read_mapping, run_prepare, sort_into_classes

IMAGE = image_bytes()
MEMBERS = {f"wrap/set/{name}/{n}.jpg": IMAGE for name in ("a", "b") for n in (1, 2)}


@pytest.fixture
def known(monkeypatch):
    """Adds a small set to the table: `name`, by default of 4 images in 2 class folders."""

    def _known(name="small", **fields):
        row = replace(KNOWN_SETS[name], md5=None, images=4, classes=2) if name in KNOWN_SETS else None
        row = row or KnownSet("Small", "sets/small", 4, 2, "a/<image>.jpg", "https://example.org/small")
        monkeypatch.setitem(KNOWN_SETS, name, replace(row, **fields))

    return _known


@pytest.fixture
def downloads(tmp_path):
    """The folder for archives that are put there by hand; the root of the sets is tmp_path."""
    return write_images(tmp_path / "downloads")


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def content(folder) -> list[str]:
    """The images of a prepared set, relative to its folder."""
    return [path.relative_to(folder).as_posix() for path in open_image_set("set", folder).paths]


# Downloads and archives


def test_a_file_is_downloaded_and_checked(server, tmp_path):
    served = server.files["a.tar.gz"] = gzip.compress(b"x" * 3_000_000)
    server.headers["Content-Encoding"] = "gzip"
    download(server.url("a.tar.gz"), tmp_path / "new" / "a.tar.gz", md5(served))
    assert (tmp_path / "new" / "a.tar.gz").read_bytes() == served, "not decompressed"


@pytest.mark.parametrize(
    ("name", "checksum", "message"),
    [
        ("a.tar", "0" * 32, r"a\.tar: not the published file: its MD5 is \w+, expected 000"),
        ("short.tar", None, r"short\.tar: .*not completed"),
        ("busy.tar", None, r"busy\.tar: 503"),
        ("gone.tar", None, r"gone\.tar: no such file"),
        ("slow.tar", None, r"slow\.tar: .*(timeout|Timeout)"),
        ("http://127.0.0.1:9/a.tar", None, r"http://127\.0\.0\.1:9/a\.tar: .*onnect"),
    ],
)
def test_a_failed_download_leaves_no_file(server, tmp_path, monkeypatch, name, checksum, message):
    server.files = dict.fromkeys(["a.tar", "short.tar", "busy.tar", "slow.tar"], b"content")
    server.faults = {"short.tar": repeat("cut"), "busy.tar": repeat("503"), "slow.tar": repeat(20.0)}
    monkeypatch.setattr(downloads_module, "_TIMEOUT", 0.3)
    with pytest.raises((OSError, ValueError), match=message) as error:
        download(name if "://" in name else server.url(name), tmp_path / "new" / "x.tar", checksum)
    assert files(tmp_path / "new") == [] and "\n" not in str(error.value)


def without_filters(monkeypatch, python):
    """Make tarfile that of Python 3.11.3 if `python` is old."""
    if python == "old":
        extract = tarfile.TarFile.extractall
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
        monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: extract(self, path))


@pytest.mark.parametrize("python", ["new", "old"])
def test_tar_and_zip_are_unpacked_without_the_additions_of_macos(tmp_path, monkeypatch, python):
    without_filters(monkeypatch, python)
    for write in (write_tar, write_zip):
        folder = tmp_path / write.__name__
        unpack(write(tmp_path / "archive", MEMBERS | {"__MACOSX/._1.jpg": b""}), folder)
        assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")) == sorted(MEMBERS)


@pytest.mark.parametrize("python", ["new", "old"])
def test_an_archive_with_a_path_outside_is_refused(tmp_path, monkeypatch, python):
    without_filters(monkeypatch, python)
    (tmp_path / "link").symlink_to(tmp_path)
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        archive.add(tmp_path / "link", "link")
        archive.addfile(tarfile.TarInfo("link/evil.txt"))
    write_tar(tmp_path / "up.tar", {"../../evil.txt": b"x"})
    write_zip(tmp_path / "up.zip", {"../../evil.txt": b"x"})
    write_zip(tmp_path / "root.zip", {f"{tmp_path}/evil.txt": b"x"})
    for name in ("link.tar", "up.tar", "up.zip", "root.zip"):
        with pytest.raises(ValueError, match=name):
            unpack(tmp_path / name, tmp_path / "deep" / "er")
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("name", ["page.tar.gz", "cut.tar.gz", "cut.zip"])
def test_a_broken_archive_is_named(tmp_path, name):
    path, noise = tmp_path / name, {"noise": np.random.default_rng(0).bytes(100_000)}
    whole = {
        "page.tar.gz": b"<html>please log in</html>" * 2,
        "cut.tar.gz": gzip.compress(write_tar(path, noise).read_bytes()),
        "cut.zip": write_zip(path, noise).read_bytes(),
    }[name]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name}: not a complete tar or zip file, delete it"):
        unpack(path, tmp_path / "out")


# A set, from its URL to its folder


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_set_is_downloaded_unpacked_checked_and_moved_into_place(known, server, tmp_path, kind):
    write = {"tar": write_tar, "zip": write_zip}[kind]
    server.files["x"] = write(tmp_path / "x", MEMBERS | {"wrap/readme.txt": b"?"}).read_bytes()
    known(archive=f"small.{kind}", url=server.url("x"), md5=md5(server.files["x"]), inside="wrap/set")
    prepare("small", tmp_path / "data")
    images = open_image_set("small", tmp_path / "data" / "sets" / "small")
    assert (images.classes, len(images)) == (["a", "b"], 4)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["downloads", "sets"], "no leftovers"
    server.files.clear()
    prepare("small", tmp_path / "data")  # nothing is downloaded again


def test_an_archive_put_there_by_hand_is_used_if_it_is_the_published_one(known, downloads, tmp_path):
    known(archive="small.tar", inside="wrap/set", terms="registration")
    with pytest.raises(FileNotFoundError, match=r"downloads/small\.tar; get it from https://example.org/small \(regis"):
        prepare("small", tmp_path)
    write_tar(downloads / "small.tar", MEMBERS)
    known(md5="0" * 32)
    with pytest.raises(ValueError, match=r"small\.tar: not the published file"):
        prepare("small", tmp_path)
    assert not (tmp_path / "sets").exists()
    known(md5=None)
    prepare("small", tmp_path)
    assert len(open_image_set("small", tmp_path / "sets" / "small")) == 4


def test_an_incomplete_set_is_an_error(known, tmp_path):
    known(archive="small.tar", inside="wrap/set")
    write_images(tmp_path / "sets" / "small", "a/1.jpg", "b/1.jpg")
    with pytest.raises(ValueError, match=r"found 2 images in 2 class folders.*is 4 images in 2.*move .*small away"):
        prepare("small", tmp_path)


# The command


def test_one_set_that_fails_does_not_stop_the_others(known, tmp_path, capsys):
    archive = write_tar(tmp_path / "x.tar", {name.removeprefix("wrap/set/"): IMAGE for name in MEMBERS})
    known(archive="small.tar", url=archive.as_uri(), inside="no such folder in it")
    known("other", archive="other.zip", folder="other", terms="ask them")
    with pytest.raises(ValueError, match="not ready: other$"):
        run_prepare(["other", "small"], tmp_path)
    out, err = capsys.readouterr()
    assert out == f"small: ready in {tmp_path}/sets/small\n"
    for part in (f"{tmp_path}/downloads/other.zip", "example.org/small", "ask them", f"{tmp_path}/other/a/<image>"):
        assert part in err, part


def test_the_list_describes_every_set_and_creates_nothing(tmp_path, capsys):
    run_prepare([], tmp_path / "data", only_list=True)
    shown = capsys.readouterr().out
    for name, known in KNOWN_SETS.items():
        assert f"{name}: {known.title}\n" in shown and f"{known.images}, {known.layout}" in shown
    assert "photos: 30 000 captioned photos" in shown and f"{tmp_path}/data/photos/pairs-00000.tar" in shown
    with pytest.raises(ValueError, match=r"'svnh'.*svhn.*photos"):
        run_prepare(["textures", "svnh"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


# Images that are published without class folders

CLASSES = ["n01440764", "n01443537", "n01440764", "n01443537"]
FLAT = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
SORTED = [f"{wnid}/{FLAT[n]}" for wnid, n in (("n01440764", 0), ("n01440764", 2), ("n01443537", 1), ("n01443537", 3))]
LABELS = {image[:-5]: wnid for image, wnid in zip(FLAT, CLASSES, strict=True)}


@pytest.mark.parametrize(
    "line",
    ["mv {image}.JPEG {wnid}/", "{image},{wnid} 85 1 499 272", "{image}.JPEG\t{wnid}", "val/{wnid}/{image}.JPEG 3"],
)
def test_a_mapping_may_have_any_form(tmp_path, line):
    rows = [line.format(image=image, wnid=wnid) for image, wnid in LABELS.items()]
    (tmp_path / "map").write_text("\n".join(["ImageId,PredictionString", "mkdir -p n01440764", *rows]))
    assert read_mapping(tmp_path / "map") == LABELS


def test_a_mapping_without_classes_is_refused(tmp_path):
    (tmp_path / "map").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    with pytest.raises(ValueError, match=r"map: no line names an image and its class"):
        read_mapping(tmp_path / "map")
    with pytest.raises(FileNotFoundError):
        read_mapping(tmp_path / "gone")


def test_sorting_moves_all_or_nothing_and_completes_after_an_interruption(tmp_path):
    folder = write_images(tmp_path / "val", *FLAT)
    with pytest.raises(ValueError, match=r"00000004\.JPEG: the mapping has no class for it, but 3 others"):
        sort_into_classes(folder, {key: LABELS[key] for key in sorted(LABELS)[:3]})
    assert sorted(path.name for path in folder.iterdir()) == FLAT
    (folder / CLASSES[0]).mkdir()
    (folder / FLAT[0]).rename(folder / SORTED[0])  # as if interrupted after the first
    sort_into_classes(folder, LABELS)
    assert content(folder) == SORTED


def write_devkit(downloads):
    """A devkit with two classes, whose numbers are not in the order of their names, and one inner node."""
    types = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [(2, "n01440764", "tench", "a fish", 0), (1, "n01443537", "goldfish", "a fish", 0), (3, "n0", "fish", "", 2)]
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": np.array(rows, dtype=types)})
    truth = "".join(f"{ {'n01440764': 2, 'n01443537': 1}[wnid] }\n" for wnid in CLASSES).encode()
    data = "ILSVRC2012_devkit_t12/data"
    members = {f"{data}/meta.mat": stream.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": truth}
    path = write_tar(downloads / module.DEVKIT, members)
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize("source", ["archive", "folder"])
def test_imagenet_is_sorted_by_the_devkit(known, downloads, tmp_path, monkeypatch, source):
    known("imagenet")
    if source == "archive":
        write_tar(downloads / "ILSVRC2012_img_val.tar", dict.fromkeys(FLAT, IMAGE))
    else:
        write_images(tmp_path / "imagenet" / "val", *FLAT)
    with pytest.raises(FileNotFoundError, match=rf"{module.DEVKIT} in .*downloads, or name a --mapping"):
        prepare("imagenet", tmp_path)
    write_devkit(downloads)
    with pytest.raises(ValueError, match=module.DEVKIT):
        prepare("imagenet", tmp_path)  # not the published devkit
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (module.DEVKIT, md5((downloads / module.DEVKIT).read_bytes())))
    prepare("imagenet", tmp_path)
    assert content(tmp_path / "imagenet" / "val") == SORTED


def test_imagenet_training_images_are_unpacked_from_the_archive_of_each_class(known, downloads, tmp_path):
    known("imagenet-train")
    classes = {name: write_tar(tmp_path / name, {f"{name}_{n}.JPEG": IMAGE for n in (1, 2)}) for name in ("n1", "n2")}
    members = {f"{name}.tar": path.read_bytes() for name, path in classes.items()}
    write_tar(downloads / "ILSVRC2012_img_train.tar", members)
    prepare("imagenet-train", tmp_path)
    expected = ["n1/n1_1.JPEG", "n1/n1_2.JPEG", "n2/n2_1.JPEG", "n2/n2_2.JPEG"]
    assert content(tmp_path / "imagenet" / "train") == expected


def test_imagenet_100_needs_only_its_classes_after_a_mapping(known, tmp_path):
    known("imagenet100", images=2, classes=1, subset=("n01443537",))
    write_images(tmp_path / "imagenet" / "val", *FLAT)
    (tmp_path / "map").write_text("\n".join(f"{image} {wnid}" for image, wnid in LABELS.items()))
    run_prepare(["imagenet100"], tmp_path, str(tmp_path / "map"))


@pytest.mark.parametrize("source", ["archive", "folder"])
def test_tiny_imagenet_is_sorted_by_its_annotations(known, downloads, tmp_path, source):
    known("tiny-imagenet")
    annotations = "".join(f"val_{n}.JPEG\t{wnid}\t0\t0\t9\t9\n" for n, wnid in enumerate(CLASSES)).encode()
    members = {f"tiny-imagenet-200/val/images/val_{n}.JPEG": IMAGE for n in range(4)}
    members |= {"tiny-imagenet-200/val/val_annotations.txt": annotations, "tiny-imagenet-200/wnids.txt": b"?"}
    archive = write_zip(downloads / "tiny-imagenet-200.zip", members)
    if source == "folder":
        unpack(archive, tmp_path)
    prepare("tiny-imagenet", tmp_path)
    expected = ["n01440764/val_0.JPEG", "n01440764/val_2.JPEG", "n01443537/val_1.JPEG", "n01443537/val_3.JPEG"]
    assert content(tmp_path / "tiny-imagenet-200" / "val") == expected


# Sets that torchvision reads


def test_svhn_as_published(known, server, tmp_path, monkeypatch):
    """Its labels are 1 to 10, and 10 means the digit 0."""
    known("svhn")
    pixels = np.arange(4, dtype=np.uint8) * np.ones((32, 32, 3, 4), dtype=np.uint8)
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"X": pixels, "y": np.array([[10], [3], [3], [10]])})
    server.files["test.mat"] = stream.getvalue()
    published = [server.url("test.mat"), "test_32x32.mat", md5(stream.getvalue())]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"test": published})
    prepare("svhn", tmp_path)
    server.files.clear()
    prepare("svhn", tmp_path)  # nothing is downloaded again
    made = tmp_path / "svhn" / "test"
    values = {name: Image.open(made / name).getpixel((9, 9))[0] for name in content(made)}
    assert values == {"0/00000.png": 0, "0/00003.png": 3, "3/00001.png": 1, "3/00002.png": 2}


@pytest.mark.parametrize(
    ("name", "file", "kind"), [("cifar10", "test_batch", "test"), ("cifar10-train", "one", "train")]
)
def test_cifar_as_published(known, server, tmp_path, monkeypatch, name, file, kind):
    known(name)
    rows = np.tile(np.arange(3, dtype=np.uint8).repeat(1024), (4, 1))  # all red values, all green, all blue
    batch = {"data": rows, "labels": [1, 0, 1, 0]}
    parts = {file: batch, "batches.meta": {"label_names": ["airplane", "cat"]}}
    members = {name: pickle.dumps(part) for name, part in parts.items()}
    sums = {name: md5(part) for name, part in members.items()}
    archive = write_tar(tmp_path / "x", {f"cifar-10-batches-py/{name}": part for name, part in members.items()})
    served = server.files["cifar-10-python.tar.gz"] = gzip.compress(archive.read_bytes())
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    published = {"url": server.url("cifar-10-python.tar.gz"), "tgz_md5": md5(served), "meta": meta}
    lists = {"test_list": [], "train_list": []} | {f"{kind}_list": [[file, sums[file]]]}
    for key, value in (published | lists).items():
        monkeypatch.setattr(datasets.CIFAR10, key, value)
    prepare(name, tmp_path)
    made = tmp_path / "cifar10" / kind
    names = ["airplane/00001.png", "airplane/00003.png", "cat/00000.png", "cat/00002.png"]
    assert content(made) == names and all(Image.open(made / name).getpixel((9, 9)) == (0, 1, 2) for name in names)


def test_arrays_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(module.ARRAYS, "cifar10", Mock(side_effect=RuntimeError("Dataset not found or corrupted.")))
    with pytest.raises(ValueError, match=r"downloads: Dataset not found or corrupted"):
        prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()
