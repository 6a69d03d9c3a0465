"""`clipn prepare`: download, unpack and check the known image sets.

Archives are kept in ROOT/downloads. A set that needs a login has to be put there by hand; the error names the file.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.datasets import imagenet
from tqdm import tqdm

from clipn.data.image_sets import open_image_set, open_known_set
from clipn.data.known_sets import KNOWN_SETS, KnownSet, known_set
from clipn.runtime.files import atomic_write

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

# Sets that are published as arrays; torchvision fetches and reads them.
ARRAYS: dict[str, Callable[[Path], Any]] = {
    "cifar10": lambda folder: datasets.CIFAR10(folder, train=False, download=True),
    "cifar100": lambda folder: datasets.CIFAR100(folder, train=False, download=True),
    "svhn": lambda folder: datasets.SVHN(folder, split="test", download=True),
}


def run_prepare(names: Sequence[str], root: str | Path, mapping: str | None = None, only_list: bool = False) -> None:
    """Prepare the named sets below `root`, or print what is known of them (of all, if none is named).

    Raises ValueError for an unknown name, before any work, and at the end for sets that are not ready.
    """
    root = Path(root)
    for name in names:
        known_set(name)
    if only_list or not names:
        print("\n".join(describe(name, root) for name in names or KNOWN_SETS))
        return
    missing = []
    for name in names:
        try:
            prepare(name, root, mapping)
        except (ValueError, OSError) as error:
            missing.append(name)
            print(f"{name}: {error}\n\n{describe(name, root)}", file=sys.stderr)
        else:
            print(f"{name}: ready in {root / known_set(name).folder}")
    if missing:
        raise ValueError(f"not ready: {', '.join(missing)}")


def describe(name: str, root: Path) -> str:
    """A set's expected tree, numbers, source and terms, in a few lines."""
    known = known_set(name)
    by_hand = f"by hand, as {root / 'downloads' / known.archive}" if known.archive else "by hand"
    rows = [
        ("tree", f"{root / known.folder}/{known.example}"),
        ("images", f"{known.images}, {known.layout}"),
        ("page", known.page),
        ("file", known.url or by_hand),
        ("terms", known.terms),
        ("note", known.note),
    ]
    return "\n".join([f"{name}: {known.title}", *(f"  {key:7}{value}" for key, value in rows if value)])


def prepare(name: str, root: str | Path, mapping: str | Path | None = None) -> None:
    """Make the set in its folder below `root`, if it is not there, and check its numbers.

    Raises FileNotFoundError for an archive or mapping that has to be put there by hand, ValueError for a file that is
    not the published one and for a set that is not whole, OSError for a download or a disk that fails.
    """
    known, root = known_set(name), Path(root)
    folder, downloads = root / known.folder, root / "downloads"
    if not folder.exists():
        _make(name, known, root, downloads)
    if known.labels and (folder / "images").is_dir():
        sort_into_classes(folder, read_mapping(folder / known.labels))
    elif known.folder == KNOWN_SETS["imagenet"].folder and not open_image_set(name, folder).classes:
        sort_into_classes(folder, _imagenet_labels(downloads, mapping))
    try:
        open_known_set(name, name, folder)
    except ValueError as error:
        raise ValueError(f"{error}; move {folder} away to have it made anew") from error


def download(url: str, path: str | Path, md5: str | None = None) -> None:
    """Fetch a file, whole or not at all. Raises OSError, or ValueError where its checksum is another."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (CLIPN)"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, atomic_write(path) as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=Path(path).name, disable=None) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
            if file.tell() < size:
                raise OSError(f"the connection ended after {file.tell()} of {size} bytes")
            file.flush()
            _check_md5(file.name, md5, url)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {str(error) or type(error).__name__}") from error


def unpack(archive: str | Path, folder: str | Path) -> None:
    """Unpack a tar or zip file into a folder. Raises ValueError for a broken one, or one that reaches outside."""
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                for member in content.namelist():
                    if not (folder / member).resolve().is_relative_to(folder.resolve()):
                        raise ValueError(f"{archive}: {member!r} would be unpacked outside of {folder}")
                content.extractall(folder)
        else:
            with tarfile.open(archive) as content:
                content.extractall(folder, filter="data")
        shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive}: no whole tar or zip file, delete it and fetch it again: {error}") from error


def write_class_folders(pictures: Iterable[tuple[Any, int]], classes: Sequence[str], folder: str | Path) -> None:
    """Write (image, label) pairs as folder/<class>/<number>.png."""
    for number, (image, label) in enumerate(tqdm(pictures, desc=str(folder), disable=None)):
        path = Path(folder) / classes[label] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def read_mapping(path: str | Path) -> dict[str, str]:
    """{image name without suffix: class} from lines that hold both, in whatever form.

    Tiny ImageNet's val_annotations.txt, Kaggle's LOC_val_solution.csv and the script valprep.sh are such files. Raises
    FileNotFoundError for a missing file, ValueError for one without such a line.
    """
    labels = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        image, wnid = re.search(r"\b(?:\w+_)?val_\d+", line), re.search(r"\bn\d{8}\b", line)
        if image and wnid:
            labels[image[0]] = wnid[0]
    if not labels:
        raise ValueError(f"{path}: no line names an image and its class, such as ILSVRC2012_val_00000293 n01440764")
    return labels


def sort_into_classes(folder: str | Path, labels: dict[str, str]) -> None:
    """Move the images of a folder into one folder per class; stopped, the same call goes on.

    Raises ValueError, before anything is moved, for an image without a class.
    """
    folder = Path(folder)
    loose = [path for path in open_image_set("loose", folder).paths if labels.get(path.stem) != path.parent.name]
    for path in loose:
        if path.stem not in labels:
            raise ValueError(f"{path}: the mapping has no class for it, but {len(labels)} others")
    for path in loose:
        target = folder / labels[path.stem] / path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    for left in [entry for entry in folder.iterdir() if entry.is_dir() and not any(entry.iterdir())]:
        left.rmdir()


def _make(name: str, known: KnownSet, root: Path, downloads: Path) -> None:
    """Unpack the set beside its place, and move it there when all of it is on disk."""
    staging = root / f".{name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        if known.archive:
            unpack(_fetch(known, downloads), staging)
            place = staging / known.inside if (staging / known.inside).is_dir() else staging
        else:
            place = staging
            pictures = _read_arrays(name, downloads)
            write_class_folders(pictures, getattr(pictures, "classes", "0123456789"), place)
        (root / known.folder).parent.mkdir(parents=True, exist_ok=True)
        os.replace(place, root / known.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(known: KnownSet, downloads: Path) -> Path:
    archive = downloads / known.archive
    if archive.is_file():
        _check_md5(archive, known.md5, archive)
    elif known.url:
        download(known.url, archive, known.md5)
    else:
        terms = f" ({known.terms})" if known.terms else ""
        raise FileNotFoundError(f"no such file: {archive}; get it from {known.page}{terms}, then run this again")
    return archive


def _read_arrays(name: str, downloads: Path) -> Any:
    try:
        return ARRAYS[name](downloads)
    except RuntimeError as error:  # torchvision's word for a file that is not the published one
        raise ValueError(f"{downloads}: {error}") from error


def _imagenet_labels(downloads: Path, mapping: str | Path | None) -> dict[str, str]:
    if mapping:
        return read_mapping(mapping)
    if not (downloads / DEVKIT).is_file():
        raise FileNotFoundError(
            f"the images are not sorted into class folders: put {DEVKIT} in {downloads}, or name a --mapping, "
            "a file with lines such as ILSVRC2012_val_00000293.JPEG n01440764"
        )
    try:
        imagenet.parse_devkit_archive(downloads)
    except RuntimeError as error:
        raise ValueError(f"{downloads / DEVKIT}: {error}") from error
    wnids = imagenet.load_meta_file(downloads)[1]
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, start=1)}


def _check_md5(path: str | Path, md5: str | None, source: Any) -> None:
    if md5 is None:
        return
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise ValueError(f"{source}: not the published file: its MD5 is {digest.hexdigest()}, expected {md5}")
