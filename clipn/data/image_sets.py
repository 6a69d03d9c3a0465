"""Image sets: a folder of class folders, or a flat folder, as a named list of files with labels."""

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch.utils.data import Dataset

from clipn.data.images import IMAGE_SUFFIXES, PIXELS_SUFFIX, Transform, open_image
from clipn.data.known_sets import KNOWN_SETS, expected_tree, known_set
from clipn.data.storage import with_retries
from clipn.runtime.console import shortened

_ENTRY_KEYS = {"path", "known", "classes", "exclude"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """A named list of image files; `labels` index `classes`, the class folders. Both are empty for a flat folder."""

    name: str
    root: Path
    paths: list[Path]
    labels: list[int]
    classes: list[str]
    left_out: list[Path] = field(default_factory=list)  # unreadable files

    def __len__(self) -> int:
        return len(self.paths)

    def without(self, numbers: Sequence[int]) -> "ImageSet":
        """The set without these unreadable images, which are then in `left_out`."""
        left_out = [self.paths[number] for number in sorted(set(numbers))]
        return replace(self.only(sorted(set(range(len(self))) - set(numbers))), left_out=left_out)

    def only(self, numbers: Sequence[int]) -> "ImageSet":
        """The set of these images, in this order, with all classes."""
        paths, labels = [self.paths[n] for n in numbers], [self.labels[n] for n in numbers if self.labels]
        return replace(self, paths=paths, labels=labels)

    def draw(self, shots: int, seed: int) -> "ImageSet":
        """At most `shots` images of each class, drawn at random, in the order of the set."""
        labels = torch.tensor(self.labels)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        drawn = [order[labels[order] == label][:shots] for label in labels.unique()]
        return self.only(torch.cat(drawn).sort().values.tolist())


def open_image_set(
    name: str, root: str | Path, classes: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> ImageSet:
    """The images of a folder. `classes` keeps only these class folders, `exclude` drops some.

    Raises FileNotFoundError for a missing folder; ValueError for a class without images or an unknown class.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"image set {name!r}: no such folder: {root}; expected {root}/<class>/<image>.jpg")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for folder in [*(classes or ()), *exclude]:
        if folder not in folders:
            choices = shortened(folders)
            raise ValueError(f"image set {name!r}: {root} has no class folder {folder!r}; it has: {choices}")
    flat = any(_is_image(entry.name) for entry in root.iterdir())
    if flat and (classes or exclude):
        raise ValueError(f"image set {name!r}: {root} has images beside its class folders, so none can be chosen")
    if flat or not folders:  # every image below, without labels
        paths = sorted(find_images(root))
        if not paths:
            raise ValueError(f"image set {name!r}: no image in {root} ({', '.join(IMAGE_SUFFIXES)})")
        return ImageSet(name, root, paths, [], [])
    kept = [folder for folder in folders if (classes is None or folder in classes) and folder not in exclude]
    paths, labels = [], []
    for label, folder in enumerate(kept):
        images = sorted(find_images(root / folder))
        if not images:
            raise ValueError(f"image set {name!r}: the class folder {root / folder} holds no image")
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise ValueError(f"image set {name!r}: no class folder of {root} is left; it has: {shortened(folders)}")
    return ImageSet(name, root, paths, labels, kept)


def open_known_set(
    name: str, known: str, root: str | Path, classes: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> ImageSet:
    """`open_image_set` for one of KNOWN_SETS. An incomplete one is an error that names the expected tree."""
    published = known_set(known)
    try:
        images = open_image_set(name, root)
        if published.classes and not images.classes:
            raise ValueError(f"image set {name!r}: {len(images)} images in {root} are not sorted into class folders")
        if published.subset:
            images = open_image_set(name, root, published.subset)
        folders = len(images.classes) if published.classes else None
        if (len(images), folders) != (published.images, published.classes):
            where = f" in {folders} class folders" if folders else ""
            raise ValueError(f"image set {name!r}: found {len(images)} images{where} in {root}")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; {expected_tree(known, root)}") from error
    if classes is None and not exclude:
        return images
    return open_image_set(name, root, images.classes if classes is None else classes, exclude)


def open_image_sets(value: Any, key: str) -> list[ImageSet]:
    """The image sets of eval.id or eval.ood.

    value: a folder, a list of folders, {name: folder}, or {name: {path, known, classes, exclude}}; without a name, a
    set has that of its folder. Raises ValueError for anything else.
    """
    value = [value] if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and value and all(isinstance(folder, str) and folder for folder in value):
        value = dict(zip(_names_of(value, key), value, strict=True))
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{key}={value!r}: expected a folder, a list of folders, or name: folder entries")
    sets = []
    for name, entry in value.items():
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not entry.get("path") or entry.keys() - _ENTRY_KEYS:
            raise ValueError(f"{key}.{name}={entry!r}: expected a folder, or path with known, classes or exclude")
        classes, exclude = (_listed(entry.get(choice)) for choice in ("classes", "exclude"))
        known = entry.get("known")
        if known is not None and str(known) not in KNOWN_SETS:
            raise ValueError(f"{key}.{name}.known={known!r}: expected one of {', '.join(KNOWN_SETS)}")
        opened = open_image_set if known is None else partial(open_known_set, known=str(known))
        sets.append(opened(name=str(name), root=entry["path"], classes=classes, exclude=exclude or ()))
    return sets


BROKEN, UNREAD = 0, 1  # why an image is left out


class ImageFiles(Dataset):
    """index -> {"image": [3, H, W]}; BROKEN for a file that is no image, UNREAD for one that cannot be read now.

    normalise: for files of float pixels (PIXELS_SUFFIX), which have the model's size.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        transform: Transform,
        normalise: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.paths, self.transform, self.normalise = paths, transform, normalise

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | int:
        path = self.paths[index]
        try:
            content = with_retries(path.read_bytes, path)
        except OSError as error:
            log.warning("left out: %s cannot be read: %s", path, error)
            return UNREAD
        try:
            if self.normalise and path.suffix == PIXELS_SUFFIX:
                return {"image": self.normalise(torch.from_numpy(np.load(io.BytesIO(content))))}
            return {"image": self.transform(open_image(content))}
        except Exception as error:  # PIL raises many kinds
            unknown = isinstance(error, UnidentifiedImageError)  # its text names a Python object
            log.warning("left out: %s is no readable image: %s", path, "unknown format" if unknown else error)
            return BROKEN


def check_readable(images: ImageSet) -> None:
    """Raise ValueError unless an image of the set is readable; no image after the first such one is read."""
    if all(isinstance(sample, int) for sample in ImageFiles(images.paths, lambda image: image)):
        raise unreadable(images)


def unreadable(images: ImageSet) -> ValueError:
    """The error for a set without a readable image."""
    return ValueError(f"image set {images.name!r}: none of the {len(images)} images in {images.root} is readable")


def _listed(value: Any) -> list[str] | None:
    return None if value is None else [value] if isinstance(value, str) else [str(name) for name in value]


def _names_of(folders: Sequence[str], key: str) -> list[str]:
    """The folders' own names, with as many parents as make them different."""
    for depth in range(1, max(len(Path(folder).parts) for folder in folders) + 1):
        names = ["/".join(Path(folder).parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{key}: the same folder is listed twice: {', '.join(folders)}")


def find_images(folder: Path, leave_out: Path | None = None) -> Iterator[Path]:
    """The image files in and below a folder, in order, except hidden ones and those in the folder `leave_out`."""
    seen = {os.path.realpath(leave_out)} if leave_out else set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()  # a link back
            continue
        seen.add(os.path.realpath(parent))
        visible = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(visible, key=lambda name: (os.path.islink(os.path.join(parent, name)), name))  # links last
        yield from (Path(parent) / name for name in sorted(names) if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
