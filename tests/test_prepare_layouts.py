"""scripts/prepare_data.py: what is published in a heap, or as arrays, becomes class folders."""

import gzip
import hashlib
import io
import pickle

import numpy as np
import pytest
import scipy.io
from helpers import image_bytes, md5, write_images, write_tar, write_zip
from PIL import Image
from torchvision import datasets
from torchvision.datasets import imagenet

from clipn.data.image_sets import open_image_set
from scripts import prepare_data
from scripts.prepare_data import main, prepare, read_mapping, sort_into_classes, unpack, write_class_folders

PICTURE = image_bytes()

# Sorting into class folders

CLASSES = ["n01440764", "n01443537", "n01440764", "n01443537"]
HEAP = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]


@pytest.mark.parametrize(
    "line",
    ["mv {image}.JPEG {wnid}/", "{image},{wnid} 85 1 499 272", "{image}.JPEG\t{wnid}", "val/{wnid}/{image}.JPEG 3"],
)
def test_a_mapping_may_have_any_form(tmp_path, line):
    rows = [line.format(image=image[:-5], wnid=wnid) for image, wnid in zip(HEAP, CLASSES, strict=True)]
    (tmp_path / "map").write_text("\n".join(["ImageId,PredictionString", "mkdir -p n01440764", *rows]))
    assert read_mapping(tmp_path / "map") == {image[:-5]: wnid for image, wnid in zip(HEAP, CLASSES, strict=True)}


def test_a_mapping_without_classes_is_refused(tmp_path):
    (tmp_path / "map").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    with pytest.raises(ValueError, match=r"map: no line names an image and its class"):
        read_mapping(tmp_path / "map")
    with pytest.raises(FileNotFoundError):
        read_mapping(tmp_path / "gone")


def test_sorting_moves_all_or_nothing_and_goes_on_where_it_stopped(tmp_path):
    folder = write_images(tmp_path / "val", *HEAP)
    labels = {image[:-5]: wnid for image, wnid in zip(HEAP, CLASSES, strict=True)}
    with pytest.raises(ValueError, match=r"00000004\.JPEG: the mapping has no class for it, but 3 others"):
        sort_into_classes(folder, {key: labels[key] for key in sorted(labels)[:3]})
    assert sorted(path.name for path in folder.iterdir()) == HEAP
    (folder / CLASSES[0]).mkdir()
    (folder / HEAP[0]).rename(folder / CLASSES[0] / HEAP[0])  # as if stopped after the first
    sort_into_classes(folder, labels)
    images = open_image_set("val", folder)
    assert [path.parent.name for path in images.paths] == sorted(CLASSES) and len(images) == 4
    assert {path.name: path.parent.name for path in images.paths} == dict(zip(HEAP, CLASSES, strict=True))


def write_devkit(downloads):
    """A devkit of two classes, numbered the other way round than their names are sorted, and of one inner node."""
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [(2, "n01440764", "tench", "a fish", 0), (1, "n01443537", "goldfish", "a fish", 0), (3, "n0", "fish", "", 2)]
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": np.array(rows, dtype=kinds)})
    truth = "".join(f"{ {'n01440764': 2, 'n01443537': 1}[wnid] }\n" for wnid in CLASSES).encode()
    data = "ILSVRC2012_devkit_t12/data"
    members = {f"{data}/meta.mat": stream.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": truth}
    write_tar(downloads / "plain.tar", members)
    (downloads / prepare_data.DEVKIT).write_bytes(gzip.compress((downloads / "plain.tar").read_bytes()))
    (downloads / "plain.tar").unlink()


@pytest.mark.parametrize("source", ["archive", "folder"])
def test_imagenet_is_sorted_by_the_devkit(known, tmp_path, monkeypatch, source):
    known("imagenet")
    (tmp_path / "downloads").mkdir()
    if source == "archive":
        write_tar(tmp_path / "downloads" / "ILSVRC2012_img_val.tar", dict.fromkeys(HEAP, PICTURE))
    else:
        write_images(tmp_path / "imagenet" / "val", *HEAP)
    with pytest.raises(FileNotFoundError, match=rf"{prepare_data.DEVKIT} in .*downloads, or name a --mapping"):
        prepare("imagenet", tmp_path)
    write_devkit(tmp_path / "downloads")
    with pytest.raises(ValueError, match=prepare_data.DEVKIT):
        prepare("imagenet", tmp_path)  # not the published devkit
    published = (prepare_data.DEVKIT, md5(tmp_path / "downloads" / prepare_data.DEVKIT))
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", published)
    prepare("imagenet", tmp_path)
    images = open_image_set("val", tmp_path / "imagenet" / "val")
    assert {path.name: path.parent.name for path in images.paths} == dict(zip(HEAP, CLASSES, strict=True))


def test_imagenet_100_needs_only_its_hundred_after_a_mapping(known, tmp_path):
    known("imagenet100", images=2, classes=1, subset=("n01443537",))
    write_images(tmp_path / "imagenet" / "val", *HEAP)
    (tmp_path / "map").write_text("\n".join(f"{i} {c}" for i, c in zip(HEAP, CLASSES, strict=True)))
    main(["imagenet100", "--root", str(tmp_path), "--mapping", str(tmp_path / "map")])


@pytest.mark.parametrize("source", ["archive", "folder"])
def test_tiny_imagenet_is_sorted_by_its_annotations(known, tmp_path, source):
    known("tiny-imagenet")
    annotations = "".join(f"val_{n}.JPEG\t{wnid}\t0\t0\t9\t9\n" for n, wnid in enumerate(CLASSES)).encode()
    members = {f"tiny-imagenet-200/val/images/val_{n}.JPEG": PICTURE for n in range(4)}
    members |= {"tiny-imagenet-200/val/val_annotations.txt": annotations, "tiny-imagenet-200/wnids.txt": b"?"}
    (tmp_path / "downloads").mkdir()
    archive = write_zip(tmp_path / "downloads" / "tiny-imagenet-200.zip", members)
    if source == "folder":
        unpack(archive, tmp_path)
    prepare("tiny-imagenet", tmp_path)
    images = open_image_set("val", tmp_path / "tiny-imagenet-200" / "val")
    assert [path.relative_to(images.root).as_posix() for path in images.paths] == [
        "n01440764/val_0.JPEG",
        "n01440764/val_2.JPEG",
        "n01443537/val_1.JPEG",
        "n01443537/val_3.JPEG",
    ]


# Sets that torchvision reads


class Arrays(list):
    classes = ["airplane", "cat"]


def some_arrays(classes=2):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    return [(Image.new("RGB", (8, 8), colour), n % classes) for n, colour in enumerate(colours)]


def test_arrays_become_class_folders_of_the_same_pixels(tmp_path):
    write_class_folders(some_arrays(), ["airplane", "cat"], tmp_path)
    images = open_image_set("arrays", tmp_path)
    found = {path.relative_to(tmp_path).as_posix(): Image.open(path).getpixel((3, 3)) for path in images.paths}
    assert found == {
        "airplane/00000.png": (255, 0, 0),
        "airplane/00002.png": (0, 0, 255),
        "cat/00001.png": (0, 255, 0),
        "cat/00003.png": (9, 9, 9),
    }


def test_a_set_of_arrays_is_written_once_and_whole(known, tmp_path, monkeypatch):
    known("cifar10")
    asked = []
    monkeypatch.setitem(prepare_data.ARRAYS, "cifar10", lambda folder: asked.append(folder) or Arrays(some_arrays()))
    prepare("cifar10", tmp_path)
    prepare("cifar10", tmp_path)
    assert asked == [tmp_path / "downloads"]
    assert open_image_set("cifar10", tmp_path / "cifar10" / "test").classes == ["airplane", "cat"]


def test_svhn_as_published(known, web, tmp_path, monkeypatch):
    """Its labels are 1 to 10, and 10 means the digit 0."""
    known("svhn")
    pixels = np.arange(4, dtype=np.uint8) * np.ones((32, 32, 3, 4), dtype=np.uint8)
    folder, address = web
    scipy.io.savemat(folder / "test.mat", {"X": pixels, "y": np.array([[10], [3], [3], [10]])})
    published = [f"{address}/test.mat", "test_32x32.mat", md5(folder / "test.mat")]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"test": published})
    prepare("svhn", tmp_path)
    images = open_image_set("svhn", tmp_path / "svhn" / "test")
    found = [(path.relative_to(images.root).as_posix(), Image.open(path).getpixel((9, 9))) for path in images.paths]
    assert found == [
        ("0/00000.png", (0, 0, 0)),
        ("0/00003.png", (3, 3, 3)),
        ("3/00001.png", (1, 1, 1)),
        ("3/00002.png", (2, 2, 2)),
    ]


def test_cifar_as_published(known, web, tmp_path, monkeypatch):
    known("cifar10")
    batch = {"data": np.full((4, 3072), 7, dtype=np.uint8), "labels": [1, 0, 1, 0]}
    parts = {"test_batch": batch, "batches.meta": {"label_names": ["airplane", "cat"]}}
    members = {name: pickle.dumps(content) for name, content in parts.items()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    folder, address = web
    archive = folder / "cifar-10-python.tar.gz"
    write_tar(tmp_path / "plain.tar", {f"cifar-10-batches-py/{name}": content for name, content in members.items()})
    archive.write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    published = {"url": f"{address}/{archive.name}", "tgz_md5": md5(archive), "train_list": [], "meta": meta}
    for key, value in (published | {"test_list": [["test_batch", sums["test_batch"]]]}).items():
        monkeypatch.setattr(datasets.CIFAR10, key, value)
    prepare("cifar10", tmp_path)
    images = open_image_set("cifar10", tmp_path / "cifar10" / "test")
    assert (images.classes, images.labels) == (["airplane", "cat"], [0, 0, 1, 1])


def test_arrays_that_are_not_the_published_ones_are_refused(known, tmp_path, monkeypatch):
    def corrupted(folder):
        raise RuntimeError("Dataset not found or corrupted.")

    monkeypatch.setitem(prepare_data.ARRAYS, "cifar10", corrupted)
    with pytest.raises(ValueError, match=r"downloads: Dataset not found or corrupted"):
        prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()
