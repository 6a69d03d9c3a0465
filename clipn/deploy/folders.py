"""Classify folders of images with a Detector: one line or CSV row per image, in constant memory."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import tee
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from clipn.data.image_sets import find_images
from clipn.data.images import IMAGE_SUFFIXES
from clipn.deploy.detector import Detector
from clipn.deploy.result import Result
from clipn.runtime.console import FAILED, printable
from clipn.runtime.files import atomic_write
from clipn.scores import DECISIONS

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


class Calibration(NamedTuple):
    """A folder of in-distribution images, and the share of them that reaches the threshold."""

    folder: str | Path
    keep: float = 0.95


def predict_folders(
    detector: Detector,
    sources: Sequence[str | Path],
    csv_file: str | Path | None = None,
    ood_folder: str | Path | None = None,
    calibration: Calibration | None = None,
    batch_size: int = 32,
) -> None:
    """Classify every image of these folders and files; print one line per image, or write one row to `csv_file`.

    csv_file: rows are appended as they come. Older rows of the same files are then removed; rows of other files, such
        as images that an earlier run moved, stay. Memory grows with the older rows only.
    ood_folder: OOD images are moved there, under their path within the source folder. Nothing is overwritten.

    Raises FileNotFoundError or ValueError for a source that does not exist, if no image can be read, and for targets
    that hold something else. KeyboardInterrupt is passed on after the CSV file is complete.
    """
    sources = _outermost(sources)
    _check_targets(sources, csv_file, ood_folder)
    if calibration:
        paths = [path for _, path in _images([Path(calibration.folder)])]
        detector.calibrate(paths, calibration.keep, batch_size)
    elif detector.method not in DECISIONS:
        choices = " or ".join(DECISIONS)
        raise ValueError(f"method {detector.method} decides only by a threshold: calibrate it, or choose {choices}")
    total = sum(1 for _ in _images(sources, ood_folder))
    if not total:
        raise ValueError(f"{', '.join(map(str, sources))}: no image there ({', '.join(IMAGE_SUFFIXES)})")
    counts = dict.fromkeys(("of the classes", "of none of them", "unreadable", "not moved"), 0)
    with _row_writer(csv_file) as write, tqdm(total=total, unit="image", disable=None, leave=False) as bar:
        try:
            for root, path, result in _predictions(detector, _images(sources, ood_folder), batch_size):
                row = _row(path, result)
                counts["unreadable" if row.error else "of none of them" if row.is_ood else "of the classes"] += 1
                if row.is_ood and ood_folder:
                    row = row._replace(error=_move(path, root, Path(ood_folder)))
                    counts["not moved"] += bool(row.error)
                write(row)
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


def _outermost(sources: Sequence[str | Path]) -> list[Path]:
    """The sources without those inside another one. Raises FileNotFoundError for one that does not exist."""
    absent = [source for source in sources if not Path(source).exists()]
    if absent:
        raise FileNotFoundError(f"{absent[0]}: no such folder or image")
    resolved = {Path(source).resolve(): Path(source) for source in sources}
    return [source for path, source in resolved.items() if not resolved.keys() & set(path.parents)]


def _check_targets(sources: Sequence[Path], csv_file: str | Path | None, ood_folder: str | Path | None) -> None:
    if ood_folder:
        folder = Path(ood_folder)
        if folder.exists() and not folder.is_dir() or folder.resolve() in [source.resolve() for source in sources]:
            raise ValueError(f"move-ood {ood_folder}: expected a folder of its own for the OOD images")
        folder.mkdir(parents=True, exist_ok=True)
    if csv_file and (Path(csv_file).is_dir() or str(csv_file) == "-"):
        raise ValueError(f"csv {csv_file}: expected a file; without one each image is a line")
    if csv_file and Path(csv_file).is_file() and Path(csv_file).stat().st_size:
        with open(csv_file, "rb") as file:
            if file.readline().rstrip() != ",".join(Row._fields).encode():
                raise ValueError(f"csv {csv_file}: holds something else; choose another file")


def _images(sources: Sequence[Path], leave_out: str | Path | None = None) -> Iterator[tuple[Path, Path]]:
    """Each image with the folder that its path is relative to."""
    for source in sources:
        if source.is_dir():
            yield from ((source, path) for path in find_images(source, Path(leave_out) if leave_out else None))
        else:
            yield source.parent, source


def _predictions(
    detector: Detector, images: Iterator[tuple[Path, Path]], batch_size: int
) -> Iterator[tuple[Path, Path, Result | Exception]]:
    images, read_ahead = tee(images)  # tee keeps the few images that the detector reads ahead
    results = detector.predict((path for _, path in read_ahead), batch_size, on_error="return")
    for (root, path), result in zip(images, results, strict=True):
        yield root, path, result


def _row(path: Path, result: Result | Exception) -> Row:
    if isinstance(result, Exception):
        return Row(str(path), error=str(result))
    return Row(str(path), result.label, result.is_ood, result.score, result.p_yes, result.p_no)


@contextmanager
def _row_writer(csv_file: str | Path | None) -> Iterator[Callable[[Row], None]]:
    """A function that writes a row to the CSV file or, without one, to the terminal."""
    if csv_file is None:
        yield lambda row: tqdm.write(_sentence(row))
        return
    path = Path(csv_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    total, older = _older_rows(path)
    try:
        with open(path, "a", buffering=1, **_TEXT) as file:  # line buffering: each row is in the file at once
            writer = csv.writer(file)
            if not total:
                writer.writerow(Row._fields)

            def write(row: Row) -> None:
                writer.writerow(row)
                older.pop(row.file, None)

            yield write
    finally:
        if len(older) + 1 < total:
            _remove_rows(path.resolve(), set(range(1, total)) - set(older.values()))


def _older_rows(path: Path) -> tuple[int, dict[str, int]]:
    """The number of lines in a CSV file, and for each image file the number of its last row."""
    if not path.is_file() or not path.stat().st_size:
        return 0, {}
    with open(path, **_TEXT) as file:
        names = [row[0] if row else "" for row in csv.reader(file)]
    with open(path, "rb+") as file:
        file.seek(-1, io.SEEK_END)
        if file.read() != b"\n":  # an editor may leave out the last line's end
            file.write(b"\r\n")
    return len(names), {name: number for number, name in enumerate(names) if number}


def _remove_rows(path: Path, numbers: set[int]) -> None:
    with open(path, **_TEXT) as old, atomic_write(path) as file:
        new = io.TextIOWrapper(file, **_TEXT)
        csv.writer(new).writerows(row for number, row in enumerate(csv.reader(old)) if number not in numbers)
        new.detach()  # flushes it


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


def _summary(counts: dict[str, int], csv_file: str | Path | None) -> str:
    total = sum(counts.values()) - counts["not moved"]
    parts = [f"{number} {name}" for name, number in counts.items() if number or name != "not moved"]
    where = f"; rows in {csv_file}" if csv_file else ""
    return f"{total} images, {', '.join(parts)}{where}"
