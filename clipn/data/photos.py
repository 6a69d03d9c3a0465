"""The photos of configs/photos.yaml, made from the published archives of CIFAR-100, CIFAR-10 and Tiny ImageNet.

photos.npz says which photos they are, in order, and photos.yaml how their captions are worded and the SHA-256 of each
file. A photo of CIFAR is found among those of its noun or class by the mean brightness of six of its blocks of 8 x 8
pixels, which a JPEG encoder hardly changes.
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

from clipn.data.downloads import fetch
from clipn.data.known_sets import KNOWN_SETS
from clipn.runtime.files import write_tar

PHOTOS = "photos"  # the name for `clipn prepare`, and the folder below its root
BESIDE = ("../data/photos", "../shared/data/photos")  # folders beside the project that may have the files already
_CHOSEN = Path(__file__).with_suffix(".npz")
_MANIFEST = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
FILES: dict[str, str] = _MANIFEST["files"]  # name: SHA-256
TINY = "tiny-imagenet-200"  # the folder in Tiny ImageNet's archive
_PAIRS_PER_SHARD = 2500
_BLOCKS = [1, 4, 6, 9, 11, 14]  # of the 16 blocks, row by row
_TOLERANCE = 8.0  # largest difference of a block's mean, of 255; of a photo and its JPEG file it was at most 3.3


def prepare_photos(root: str | Path, source: str | Path | None = None) -> Path:
    """Create ROOT/photos, if it is not there: from `source`, else a folder beside the project, else the archives.

    Returns the folder, and prints which files have other bytes than those of the results in docs/results.md. Raises
    FileNotFoundError for an archive that can't be downloaded, ValueError for a file that is not the published one.
    """
    folder, downloads, staging = Path(root, PHOTOS), Path(root, "downloads"), Path(root, f".{PHOTOS}.partial")
    if not folder.exists():
        shutil.rmtree(staging, ignore_errors=True)
        try:
            if source := source or next((place for place in BESIDE if not differing(Path(place))), None):
                copy_photos(Path(source), staging)
            else:
                write_photos(downloads, _fetch_archives(downloads), staging)
            os.replace(staging, folder)
        except RuntimeError as error:  # torchvision raises it for a file that is not the published one
            raise ValueError(f"{downloads}: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    other = differing(folder)
    if absent := [name for name in other if not (folder / name).is_file()]:
        raise ValueError(f"{folder / absent[0]}: no such file; move {folder} away to create it again")
    if other:
        reason = "another JPEG encoder wrote them, or they were changed"
        print(f"{PHOTOS}: other bytes than those of the results in docs/results.md, {reason}: {', '.join(other)}")
    return folder


def describe_photos(root: Path) -> str:
    """Tree, archives and terms, in a few lines."""
    return f"""\
{PHOTOS}: 30 000 captioned photos of 32 pixels, and test photos in class folders, for configs/photos.yaml
  tree   {root / PHOTOS}/pairs-00000.tar, ..., cifar100_test.tar, cifar10_test.tar, tiny_imagenet_val.tar
  file   made from {", ".join(name for name, *_ in _archives())} in {root / "downloads"},
         which are downloaded (600 MB), or copied from a folder that has the files: --from DIR"""


def write_photos(downloads: Path, tiny: Path, folder: Path) -> None:
    """Write the shards of pairs, the test and validation archives and the names of Tiny ImageNet's classes.

    downloads: where torchvision finds or unpacks the archives of CIFAR.  tiny: Tiny ImageNet's zip file.
    Raises ValueError for archives that lack one of the photos, or would give other captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.load(_CHOSEN)
    _write_pairs(datasets.CIFAR100(downloads, train=True, download=True), chosen, folder)
    cifar100, cifar10 = (kind(downloads, train=False, download=True) for kind in (datasets.CIFAR100, datasets.CIFAR10))
    _write_test(cifar100, chosen["cifar100_test"], folder / "cifar100_test.tar", quality=90, optimize=True)
    _write_test(cifar10, chosen["cifar10_test"], folder / "cifar10_test.tar", quality=75)
    _write_tiny(tiny, chosen["tiny_imagenet_val"], folder)


def copy_photos(source: Path, folder: Path) -> None:
    """Copy the files from a folder that has them. Raises ValueError for one that is missing or not the same."""
    if other := differing(source):
        raise ValueError(f"{source / other[0]}: no such file, or not the one of configs/photos.yaml (by SHA-256)")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, folder / name)


def differing(folder: Path) -> list[str]:
    """The names of files that the folder lacks, or has with another SHA-256."""
    return [name for name, sha256 in FILES.items() if _sha256(folder / name) != sha256]


def nouns_of(dataset: datasets.CIFAR100) -> list[str]:
    """The noun under which each training photo was collected: "worm snake" for worm_snake_s_000123.png."""
    path = Path(dataset.root) / dataset.base_folder / dataset.train_list[0][0]
    with open(path, "rb") as file:  # torchvision has checked its MD5
        names = pickle.load(file, encoding="latin1")["filenames"]
    return [re.sub(r"[\W_]+", " ", re.sub(r"_s_\d+\.\w+$", "", name)).lower() for name in names]


def find_photos(pixels: np.ndarray, groups: np.ndarray, means: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The row [n] of each wanted photo: of the rows of its group, the one whose blocks are nearest.

    pixels: uint8 [N, 32, 32, 3].  groups: [N].  means: of the wanted photos' blocks [n, 6].  wanted: their groups [n].
    Raises ValueError where no row is near.
    """
    luma = pixels.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)) @ [0.299, 0.587, 0.114]
    blocks, found = luma.reshape(-1, 16)[:, _BLOCKS], np.empty(len(wanted), dtype=int)
    for group in np.unique(wanted):
        rows, places = np.flatnonzero(groups == group), np.flatnonzero(wanted == group)
        distances = np.abs(blocks[rows][:, None] - means[places].astype(float)).max(axis=2, initial=0.0)
        if not len(rows) or (distances.min(axis=0) > _TOLERANCE).any():
            raise ValueError(f"the archive lacks photos of {str(group)!r}; it is not the published one")
        found[places] = rows[distances.argmin(axis=0)]
    return found


def _archives() -> list[tuple[str, str, str]]:
    """Name, URL and MD5 of each archive, Tiny ImageNet's last."""
    cifar, tiny = (datasets.CIFAR100, datasets.CIFAR10), KNOWN_SETS["tiny-imagenet"]
    return [*((kind.filename, kind.url, kind.tgz_md5) for kind in cifar), (tiny.archive, tiny.url, tiny.md5)]


def _fetch_archives(downloads: Path) -> Path:
    """Download the archives that are not there, and return the path of Tiny ImageNet's."""
    for name, url, md5 in _archives():
        try:
            fetch(downloads / name, url, md5)
        except OSError as error:
            choice = "put it there, or name a folder that has the photos with --from DIR"
            raise FileNotFoundError(f"no such file: {downloads / name}; {choice}; no download: {error}") from error
    return downloads / name


def _write_pairs(dataset: datasets.CIFAR100, chosen: dict[str, np.ndarray], folder: Path) -> None:
    """Write pairs-00000.tar, ...: <key>.jpg and <key>.txt, as img2dataset writes them."""
    wanted = np.array(_MANIFEST["nouns"])[chosen["noun"]]
    rows = find_photos(dataset.data, np.array(nouns_of(dataset)), chosen["pairs"], wanted)
    captions = []
    for noun, row, wording in zip(wanted, rows, chosen["wording"], strict=True):
        template, suffix = divmod(int(wording), len(_MANIFEST["suffixes"]))
        name = dataset.classes[dataset.targets[row]].replace("_", " ")
        captions.append(_MANIFEST["templates"][template].format(noun) + _MANIFEST["suffixes"][suffix].format(name))
    if hashlib.sha256("\n".join(captions).encode()).hexdigest() != _MANIFEST["captions"]:
        raise ValueError("CIFAR-100's file names and labels give other captions than those of configs/photos.yaml")
    for first in tqdm(range(0, len(rows), _PAIRS_PER_SHARD), desc="pairs", unit="shard", disable=None):
        members: dict[str, bytes] = {}
        for number in range(first, min(first + _PAIRS_PER_SHARD, len(rows))):
            members[f"{number:09d}.jpg"] = _jpeg(dataset.data[rows[number]], quality=90, optimize=True)
            members[f"{number:09d}.txt"] = captions[number].encode()
        write_tar(folder / f"pairs-{first // _PAIRS_PER_SHARD:05d}.tar", members.items())


def _write_test(dataset: datasets.CIFAR10, means: np.ndarray, path: Path, **options: int) -> None:
    """Write the same number of photos of each class as <set>/<class>/<number>.jpg; options: of the JPEG encoder."""
    names = sorted(dataset.classes)
    wanted = np.repeat(names, len(means) // len(names))
    rows = find_photos(dataset.data, np.array(dataset.classes)[dataset.targets], means, wanted)
    numbers = np.tile(np.arange(len(means) // len(names)), len(names))
    members = zip(wanted, numbers, rows, strict=True)
    write_tar(path, ((f"{path.stem}/{a}/{n:04d}.jpg", _jpeg(dataset.data[row], **options)) for a, n, row in members))


def _write_tiny(archive: Path, numbers: np.ndarray, folder: Path) -> None:
    """Write validation photos as they are, and {class folder: names of its class}."""
    with zipfile.ZipFile(archive) as content:

        def table(name: str) -> dict[str, str]:
            lines = content.read(f"{TINY}/{name}").decode().splitlines()
            return dict(line.split("\t")[:2] for line in lines)

        label_of, names = table("val/val_annotations.txt"), table("words.txt")
        members, counts = {}, dict.fromkeys(sorted(set(label_of.values())), 0)
        for photo in (f"val_{number}.JPEG" for number in numbers):
            label = label_of[photo]
            members[f"tiny_imagenet_val/{label}/{counts[label]:04d}.jpg"] = content.read(f"{TINY}/val/images/{photo}")
            counts[label] += 1
    write_tar(folder / "tiny_imagenet_val.tar", members.items())
    text = json.dumps({label: names[label] for label in counts}, indent=0)
    (folder / "tiny_imagenet_names.json").write_text(text, encoding="utf-8")


def _jpeg(pixels: np.ndarray, **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream.getvalue()


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
