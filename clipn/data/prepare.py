"""`clipn prepare`: download, unpack and check the known image sets, and the photos of configs/photos.yaml.

Archives are kept in ROOT/downloads. The archive of a set that needs a login has to be put there by hand.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torchvision import datasets
from torchvision.datasets import imagenet
from tqdm import tqdm

from clipn.data.downloads import check_md5, fetch, unpack
from clipn.data.image_sets import open_image_set, open_known_set
from clipn.data.known_sets import KNOWN_SETS, KnownSet, known_set
from clipn.data.photos import PHOTOS, describe_photos, prepare_photos

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

# Sets that are published as arrays; torchvision downloads and reads them.
ARRAYS: dict[str, Callable[[Path], Any]] = {
    "cifar10": lambda folder: datasets.CIFAR10(folder, train=False, download=True),
    "cifar100": lambda folder: datasets.CIFAR100(folder, train=False, download=True),
    "cifar10-train": lambda folder: datasets.CIFAR10(folder, train=True, download=True),
    "cifar100-train": lambda folder: datasets.CIFAR100(folder, train=True, download=True),
    "svhn": lambda folder: datasets.SVHN(folder, split="test", download=True),
}


def run_prepare(
    names: Sequence[str],
    root: str | Path,
    mapping: str | None = None,
    only_list: bool = False,
    source: str | None = None,
) -> None:
    """Prepare the named sets below `root`, or print the description of each (of all, if none is named).

    source: a folder that has the photos of configs/photos.yaml already, to be copied.
    Raises ValueError before any work for an unknown name, and at the end for sets that are not ready.
    """
    root = Path(root)
    if unknown := [name for name in names if name not in (*KNOWN_SETS, PHOTOS)]:
        raise ValueError(f"unknown image set {unknown[0]!r}: expected one of {', '.join((*KNOWN_SETS, PHOTOS))}")
    if source and PHOTOS not in names:
        raise ValueError(f"--from {source}: only `clipn prepare {PHOTOS}` copies from a folder")
    if only_list or not names:
        print("\n".join(describe(name, root) for name in names or (*KNOWN_SETS, PHOTOS)))
        return
    missing = []
    for name in names:
        try:
            folder = prepare_photos(root, source) if name == PHOTOS else prepare(name, root, mapping)
        except (ValueError, OSError) as error:
            missing.append(name)
            print(f"{name}: {error}\n\n{describe(name, root)}", file=sys.stderr)
        else:
            print(f"{name}: ready in {folder}")
    if missing:
        raise ValueError(f"not ready: {', '.join(missing)}")


def describe(name: str, root: Path) -> str:
    """A set's expected tree, numbers, source and terms, in a few lines."""
    if name == PHOTOS:
        return describe_photos(root)
    known = known_set(name)
    by_hand = f"by hand, as {root / 'downloads' / known.archive}" if known.archive else "by hand"
    rows = {"tree": f"{root / known.folder}/{known.example}", "images": f"{known.images}, {known.layout}"}
    rows |= {"page": known.page, "file": known.url or by_hand, "terms": known.terms, "note": known.note}
    return "\n".join([f"{name}: {known.title}", *(f"  {key:7}{value}" for key, value in rows.items() if value)])


def prepare(name: str, root: str | Path, mapping: str | Path | None = None) -> Path:
    """Create the set in its folder below `root`, if it is not there, check its numbers and return the folder.

    Raises FileNotFoundError for a file that has to be put there by hand, ValueError for a file or a set that is not the
    published one, OSError for a download or a disk that fails.
    """
    known, root = known_set(name), Path(root)
    folder, downloads = root / known.folder, root / "downloads"
    if not folder.exists():
        _create(name, known, root, downloads)
    if known.labels and (folder / "images").is_dir():
        sort_into_classes(folder, read_mapping(folder / known.labels))
    elif known.folder == KNOWN_SETS["imagenet"].folder and not open_image_set(name, folder).classes:
        sort_into_classes(folder, _imagenet_labels(downloads, mapping))
    try:
        open_known_set(name, name, folder)
    except ValueError as error:
        raise ValueError(f"{error}; move {folder} away to create it again") from error
    return folder


def write_class_folders(images: Iterable[tuple[Any, int]], folder: Path) -> None:
    """Write (image, label) pairs as folder/<class>/<number>.png; without classes of their own, labels are digits."""
    classes = getattr(images, "classes", "0123456789")
    for number, (image, label) in enumerate(tqdm(images, desc=str(folder), disable=None)):
        path = folder / classes[label] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def read_mapping(path: str | Path) -> dict[str, str]:
    """{image name without suffix: class} from lines that hold both, in any form.

    Tiny ImageNet's val_annotations.txt, Kaggle's LOC_val_solution.csv and the script valprep.sh are such files.
    """
    labels = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        if (image := re.search(r"\b(?:\w+_)?val_\d+", line)) and (wnid := re.search(r"\bn\d{8}\b", line)):
            labels[image[0]] = wnid[0]
    if not labels:
        raise ValueError(f"{path}: no line names an image and its class, such as ILSVRC2012_val_00000293 n01440764")
    return labels


def sort_into_classes(folder: Path, labels: dict[str, str]) -> None:
    """Move the images of a folder into one folder per class; after an interruption, the same call completes it.

    Raises ValueError, before anything is moved, for an image without a class.
    """
    unsorted = [path for path in open_image_set("unsorted", folder).paths if labels.get(path.stem) != path.parent.name]
    if unknown := [path for path in unsorted if path.stem not in labels]:
        raise ValueError(f"{unknown[0]}: the mapping has no class for it, but {len(labels)} others")
    for path in unsorted:
        target = folder / labels[path.stem] / path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    for empty in [entry for entry in folder.iterdir() if entry.is_dir() and not any(entry.iterdir())]:
        empty.rmdir()


def _create(name: str, known: KnownSet, root: Path, downloads: Path) -> None:
    """Unpack the set in a staging folder, and move it to its place when it is complete."""
    staging = root / f".{name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        if known.archive:
            unpack(_fetch(known, downloads), staging)
            inner = sorted(staging.glob("*.tar"))  # of ImageNet's training images, an archive for each class
            for archive in tqdm(inner, desc=name, unit="class", disable=None if inner else True):
                unpack(archive, staging / archive.stem)
                archive.unlink()
        else:
            try:
                write_class_folders(ARRAYS[name](downloads), staging)
            except RuntimeError as error:  # torchvision raises it for a file that is not the published one
                raise ValueError(f"{downloads}: {error}") from error
        (root / known.folder).parent.mkdir(parents=True, exist_ok=True)
        source = staging / known.inside if (staging / known.inside).is_dir() else staging
        os.replace(source, root / known.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(known: KnownSet, downloads: Path) -> Path:
    archive = downloads / known.archive
    if known.url:
        fetch(archive, known.url, known.md5)
    elif archive.is_file():
        check_md5(archive, known.md5, archive)
    else:
        terms = f" ({known.terms})" if known.terms else ""
        raise FileNotFoundError(f"no such file: {archive}; get it from {known.page}{terms}, then run this again")
    return archive


def _imagenet_labels(downloads: Path, mapping: str | Path | None) -> dict[str, str]:
    if mapping:
        return read_mapping(mapping)
    if not (downloads / DEVKIT).is_file():
        choice = f"put {DEVKIT} in {downloads}, or name a --mapping"
        lines = "a file with lines such as ILSVRC2012_val_00000293.JPEG n01440764"
        raise FileNotFoundError(f"the images are not sorted into class folders: {choice}, {lines}")
    try:
        imagenet.parse_devkit_archive(downloads)
    except RuntimeError as error:
        raise ValueError(f"{downloads / DEVKIT}: {error}") from error
    wnids = imagenet.load_meta_file(downloads)[1]
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, start=1)}
