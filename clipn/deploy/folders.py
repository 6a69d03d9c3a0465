"""Classify folders of images with a Detector: one line or CSV row per image, in constant memory."""

import csv
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from clipn.config.checks import require
from clipn.data.image_sets import find_images, open_image_set
from clipn.data.images import IMAGE_SUFFIXES
from clipn.deploy.detector import Detector
from clipn.deploy.result import Result
from clipn.deploy.saved import check_folder
from clipn.deploy.state import DETECTOR_METHODS
from clipn.methods.registry import METHODS
from clipn.runtime.console import FAILED, printable
from clipn.runtime.files import atomic_write
from clipn.scores import DECISIONS, SCORES

_HELD_OUT = 10  # every tenth image of --fit sets the threshold
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # a file name may be bytes that are no text


class Row(NamedTuple):
    """One image of the CSV file. All but `file` and `error` are empty for an image that cannot be read."""

    file: str
    label: str = ""  # the most likely class, also for an OOD image
    is_ood: bool | str = ""
    score: float | str = ""  # higher means in-distribution
    p_yes: float | str = ""
    p_no: float | str = ""
    error: str = ""


@dataclass(frozen=True)
class Training:
    """Folders of in-distribution images, and what a detector does with them before it classifies others."""

    fit: str | Path | None = None  # images that the method learns from, in class folders if it needs labels
    calibrate: str | Path | None = None  # images that set the threshold; None: every tenth of `fit`, held out
    keep: float = 0.95  # the share of them that reaches the threshold
    save: str | Path | None = None  # where the detector is saved
    train_filter: str | None = None  # CTW or ATD: leave out images of `fit` that this decision calls OOD


def predict_folders(
    detector: Detector,
    sources: Sequence[str | Path],
    csv_file: str | Path | None = None,
    ood_folder: str | Path | None = None,
    training: Training | None = None,
    batch_size: int = 32,
) -> None:
    """Classify every image of these folders and files; print one line per image, or write one row to `csv_file`.

    csv_file: its rows are replaced, except for those of images that an earlier run moved. Each row is written at once.
    ood_folder: OOD images are moved there, under their path within the source folder. Nothing is overwritten.
    training: the in-distribution images that the detector learns from first.

    Raises FileNotFoundError or ValueError for a source that does not exist, if no image can be read, and for targets
    that hold something else. KeyboardInterrupt is passed on.
    """
    csv_file, ood_folder = csv_file and Path(csv_file), ood_folder and Path(ood_folder)
    sources = _outermost(sources)
    _check_targets(sources, csv_file, ood_folder)
    if training:
        _train(detector, training, batch_size)
    if detector.lacks:
        raise ValueError(f"method {detector.method} learns from images of the classes: name their folder with --fit")
    if detector.method not in DECISIONS and detector.threshold is None:
        choices = " or ".join(DECISIONS)
        raise ValueError(f"method {detector.method} decides only by a threshold: calibrate it, or choose {choices}")
    total = sum(1 for _ in _images(sources, ood_folder))
    if not total:
        raise ValueError(f"{', '.join(map(str, sources))}: no image there ({', '.join(IMAGE_SUFFIXES)})")
    counts = dict.fromkeys(("of the classes", "of none of them", "unreadable", "not moved"), 0)
    images, read_ahead = tee(_images(sources, ood_folder))  # tee keeps the few images that the detector reads ahead
    results = detector.predict((path for _, path in read_ahead), batch_size, on_error="return")
    with _row_writer(csv_file) as write, tqdm(total=total, unit="image", disable=None, leave=False) as bar:
        try:
            for (root, path), result in zip(images, results, strict=True):
                row = _row(path, result)
                kind = "unreadable" if row.error else "of none of them" if row.is_ood else "of the classes"
                try:
                    if row.is_ood and ood_folder:
                        row = row._replace(error=_move(path, root, ood_folder))
                        counts["not moved"] += bool(row.error)
                finally:  # a moved image has its row, also when a stop request comes in between
                    write(row)
                    counts[kind] += 1
                bar.update()
        except KeyboardInterrupt:
            print(f"stopped: {_summary(counts, csv_file)}", file=sys.stderr)
            raise
        except BrokenPipeError:  # the reader of the output has closed it, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
    if counts["unreadable"] == total:
        raise ValueError(f"none of the {total} images can be read; the last: {row.error}")
    print(f"done: {_summary(counts, csv_file)}", file=sys.stderr)


def _train(detector: Detector, training: Training, batch_size: int) -> None:
    """Fit, calibrate and save the detector. Raises ValueError for images that it cannot learn from."""
    require(0 < training.keep <= 1, "keep", training.keep, "a share above 0, up to 1")
    if training.save:
        check_folder(training.save)
    calibration: list[Path] = []
    if training.calibrate:
        calibration = [path for _, path in _images([Path(training.calibrate)])]
        if not calibration:
            raise ValueError(f"calibrate {training.calibrate}: no image there ({', '.join(IMAGE_SUFFIXES)})")
    train_filter = None
    if training.fit:
        held_out = _fit(detector, training, batch_size)
        if held_out:
            calibration, train_filter = held_out, training.train_filter
    if calibration:
        on_error = "skip" if training.fit else "raise"
        detector.calibrate(calibration, training.keep, batch_size, on_error, train_filter)
    if training.save:
        detector.save(training.save)
        print(f"saved: {training.save}, which --checkpoint reads", file=sys.stderr)


def _fit(detector: Detector, training: Training, batch_size: int) -> list[Path]:
    """Fit the detector; returns the images that were held out, none if `training` names others for the threshold."""
    source, method = f"fit {training.fit}", detector.method
    if method in SCORES:
        learning = ", ".join(name for name in DETECTOR_METHODS if name in METHODS and METHODS[name].needs)
        raise ValueError(f"{source}: method {method} does not learn; methods that do: {learning}")
    images = open_image_set("fit", training.fit)
    names = [folder.replace("_", " ") for folder in images.classes]
    other = [name for name in names if name not in detector.class_names]
    labelled = bool(names) and not other
    if not labelled and method in METHODS and "labels" in METHODS[method].needs:
        reason = f"its class folder {other[0]!r} is none of the classes" if other else "it has no class folders"
        raise ValueError(f"{source}: {method} needs folders that are named like the classes, and {reason}")
    held_out = [] if training.calibrate else range(0, len(images), _HELD_OUT)
    kept = sorted(set(range(len(images))) - set(held_out))
    if not kept:
        raise ValueError(f"{source}: one image, which would set the threshold; name others with --calibrate")
    labels = [names[images.labels[number]] for number in kept] if labelled else None
    detector.fit([images.paths[number] for number in kept], labels, batch_size, "skip", training.train_filter)
    return [images.paths[number] for number in held_out]


def _outermost(sources: Sequence[str | Path]) -> list[Path]:
    """The sources without those inside another one. Raises FileNotFoundError for one that does not exist."""
    absent = [source for source in sources if not Path(source).exists()]
    if absent:
        raise FileNotFoundError(f"{absent[0]}: no such folder or image")
    resolved = {Path(source).resolve(): Path(source) for source in sources}
    return [source for path, source in resolved.items() if not resolved.keys() & set(path.parents)]


def _check_targets(sources: Sequence[Path], csv_file: Path | None, ood_folder: Path | None) -> None:
    if ood_folder:
        is_source = ood_folder.resolve() in [source.resolve() for source in sources]
        if is_source or ood_folder.exists() and not ood_folder.is_dir():
            raise ValueError(f"move-ood {ood_folder}: expected a folder of its own for the OOD images")
        ood_folder.mkdir(parents=True, exist_ok=True)
    if csv_file and (csv_file.is_dir() or str(csv_file) == "-"):
        raise ValueError(f"csv {csv_file}: expected a file; without one each image is a line")
    if csv_file and _is_filled(csv_file):
        with open(csv_file, "rb") as file:
            if file.readline().rstrip() != ",".join(Row._fields).encode():
                raise ValueError(f"csv {csv_file}: holds something else; choose another file")


def _images(sources: Sequence[Path], leave_out: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """Each image after the folder that its path is relative to."""
    for source in sources:
        if source.is_dir():
            yield from ((source, path) for path in find_images(source, leave_out))
        else:
            yield source.parent, source


def _row(path: Path, result: Result | Exception) -> Row:
    if isinstance(result, Exception):
        return Row(str(path), error=str(result))
    return Row(str(path), result.label, result.is_ood, result.score, result.p_yes, result.p_no)


@contextmanager
def _row_writer(path: Path | None) -> Iterator[Callable[[Row], None]]:
    """A function that writes a row to the CSV file or, without one, to the terminal."""
    if path is None:
        yield lambda row: tqdm.write(_sentence(row))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_filled(path):
        with open(path, **_TEXT) as old, atomic_write(path.resolve()) as file:
            new, lines = io.TextIOWrapper(file, **_TEXT), enumerate(csv.reader(old))
            csv.writer(new).writerows(line for number, line in lines if number == 0 or _was_moved(line))
            new.detach()  # flushes it
    with open(path, "a", buffering=1, **_TEXT) as file:  # line buffering: each row is in the file at once
        writer = csv.writer(file)
        if not _is_filled(path):
            writer.writerow(Row._fields)
        yield writer.writerow


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _was_moved(row: list[str]) -> bool:
    """Whether an older row is of an image that was moved, which no later run will classify."""
    return row[2:3] == ["True"] and row[6:] == [""] and not os.path.exists(row[0])


def _sentence(row: Row) -> str:
    if not row.label:
        return f"{printable(row.file)}: error: {printable(row.error.removeprefix(f'{row.file}: '))}"
    label = f"none of the classes (nearest: {row.label})" if row.is_ood else row.label
    error = f"; {printable(row.error)}" if row.error else ""
    return f"{printable(row.file)}: {label}, score {row.score:.3f}{error}"


def _move(path: Path, root: Path, folder: Path) -> str:
    """Move an image to its path in `folder`; returns why it could not be moved, or an empty text."""
    inside = path.relative_to(root)
    target = folder / inside
    if path.resolve() != root.resolve() / inside:
        return "not moved: it is a link, or behind one"
    if target.exists():
        return f"not moved: {target} exists"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    except OSError as error:
        return f"not moved: {error}"
    return ""


def _summary(counts: dict[str, int], csv_file: Path | None) -> str:
    total = sum(counts.values()) - counts["not moved"]
    parts = [f"{number} {name}" for name, number in counts.items() if number or name != "not moved"]
    where = f"; rows in {csv_file}" if csv_file else ""
    return f"{total} images, {', '.join(parts)}{where}"
