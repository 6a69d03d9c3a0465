"""Folders of pictures through a Detector: a row each, as they come, however many there are."""

from __future__ import annotations

import csv
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
from clipn.scores import DECISIONS


class Row(NamedTuple):
    """What is written of one picture. All but `file` and `error` are empty where it cannot be read."""

    file: str
    label: str = ""  # the most likely class, also where it is none of them
    is_ood: bool | str = ""
    score: float | str = ""  # a higher one means in-distribution
    p_yes: float | str = ""
    p_no: float | str = ""
    error: str = ""


def predict_pictures(
    detector: Detector,
    places: Sequence[str | Path],
    csv_file: str | Path | None = None,
    ood_folder: str | Path | None = None,
    calibration_folder: str | Path | None = None,
    keep: float = 0.95,
    batch_size: int = 32,
) -> None:
    """Classify every image in these folders and files; print a line each, or write a CSV row each to `csv_file`.

    ood_folder: pictures of none of the classes are moved there, under their path
    within the folder; nothing is overwritten. calibration_folder: pictures of the classes, `keep` of which stay at or
    above the threshold. A picture that cannot be read is a row with its error. Any number needs no more memory.

    Raises FileNotFoundError or ValueError for a place that is not there, where there is no readable picture, and for
    places to write to that hold something else. Ctrl-C's KeyboardInterrupt is passed on when the rows so far are told.
    """
    places = _outermost(places)
    _check_targets(places, csv_file, ood_folder)
    if calibration_folder:
        detector.calibrate([path for _, path in _pictures([Path(calibration_folder)])], keep, batch_size)
    elif detector.method not in DECISIONS:
        choices = " or ".join(DECISIONS)
        raise ValueError(f"method {detector.method} decides only by a threshold: calibrate it, or take {choices}")
    total = sum(1 for _ in _pictures(places, ood_folder))
    if not total:
        raise ValueError(f"{', '.join(map(str, places))}: no picture there ({', '.join(IMAGE_SUFFIXES)})")
    counts = dict.fromkeys(("of the classes", "of none of them", "unreadable", "not moved"), 0)
    with _writer(csv_file) as write, tqdm(total=total, unit="image", disable=None, leave=False) as bar:
        try:
            for root, path, found in _judged(detector, _pictures(places, ood_folder), batch_size):
                row = _row(path, found)
                counts["unreadable" if row.error else "of none of them" if row.is_ood else "of the classes"] += 1
                if row.is_ood and ood_folder:
                    row = row._replace(error=_move(path, root, Path(ood_folder)))
                    counts["not moved"] += bool(row.error)
                write(row)
                bar.update()
        except KeyboardInterrupt:
            print(f"stopped: {_told(counts, csv_file)}", file=sys.stderr)
            raise
        except BrokenPipeError:  # who reads the output has seen enough, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
    if counts["unreadable"] == total:
        raise ValueError(f"none of the {total} pictures can be read; the last: {row.error}")
    print(f"done: {_told(counts, csv_file)}", file=sys.stderr)


def _outermost(places: Sequence[str | Path]) -> list[Path]:
    """The places, without those that lie in another one. Raises FileNotFoundError for one that is not there."""
    absent = [place for place in places if not Path(place).exists()]
    if absent:
        raise FileNotFoundError(f"{absent[0]}: no such folder or picture")
    real = {Path(place).resolve(): Path(place) for place in places}
    return [place for path, place in real.items() if not real.keys() & set(path.parents)]


def _check_targets(places: Sequence[Path], csv_file: str | Path | None, ood_folder: str | Path | None) -> None:
    if ood_folder:
        folder = Path(ood_folder)
        if folder.exists() and not folder.is_dir() or folder.resolve() in [place.resolve() for place in places]:
            raise ValueError(f"move-ood {ood_folder}: expected a folder of its own for the pictures of no class")
        folder.mkdir(parents=True, exist_ok=True)
    if csv_file and (Path(csv_file).is_dir() or str(csv_file) == "-"):
        raise ValueError(f"csv {csv_file}: expected a file; without one each picture is a line")
    if csv_file and Path(csv_file).is_file() and Path(csv_file).stat().st_size:
        with open(csv_file, "rb") as file:
            if file.readline().rstrip() != ",".join(Row._fields).encode():
                raise ValueError(f"csv {csv_file}: holds something else; choose another file")


def _pictures(places: Sequence[Path], leave_out: str | Path | None = None) -> Iterator[tuple[Path, Path]]:
    """The folder that each picture is to be seen from, and the picture."""
    for place in places:
        if place.is_dir():
            yield from ((place, path) for path in find_images(place, Path(leave_out) if leave_out else None))
        else:
            yield place.parent, place


def _judged(
    detector: Detector, pictures: Iterator[tuple[Path, Path]], batch_size: int
) -> Iterator[tuple[Path, Path, Result | Exception]]:
    told, to_judge = tee(pictures)  # which keeps the few that are read ahead
    results = detector.predict((path for _, path in to_judge), batch_size, on_error="return")
    for (root, path), found in zip(told, results, strict=True):
        yield root, path, found


def _row(path: Path, found: Result | Exception) -> Row:
    if isinstance(found, Exception):
        return Row(str(path), error=str(found))
    return Row(str(path), found.label, found.is_ood, found.score, found.p_yes, found.p_no)


@contextmanager
def _writer(csv_file: str | Path | None) -> Iterator[Callable[[Row], None]]:
    """What takes each row: a CSV file, or the reader of the terminal."""
    if csv_file is None:
        yield lambda row: tqdm.write(_sentence(row))
        return
    Path(csv_file).parent.mkdir(parents=True, exist_ok=True)
    # A row is on disk when it is written; a file's name may be bytes that are no text.
    with open(csv_file, "w", buffering=1, encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        yield writer.writerow


def _sentence(row: Row) -> str:
    if not row.label:
        return f"{printable(row.file)}: error: {printable(row.error.removeprefix(f'{row.file}: '))}"
    verdict = f"none of the classes (nearest: {row.label})" if row.is_ood else row.label
    return f"{printable(row.file)}: {verdict}, score {row.score:.3f}" + (
        f"; {printable(row.error)}" if row.error else ""
    )


def _move(path: Path, root: Path, folder: Path) -> str:
    """Move a picture to its place in `folder`; returns what stood in the way, if anything did."""
    inside = path.relative_to(root)
    target = folder / inside
    if path.resolve() != root.resolve() / inside:
        return "not moved: it is a link, or lies behind one"
    if target.exists():
        return f"not moved: {target} is there already"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    except OSError as error:
        return f"not moved: {error}"
    return ""


def _told(counts: dict[str, int], csv_file: str | Path | None) -> str:
    total = sum(counts.values()) - counts["not moved"]
    parts = [f"{number} {what}" for what, number in counts.items() if number or what != "not moved"]
    where = f"; rows in {csv_file}" if csv_file else ""
    return f"{total} pictures, {', '.join(parts)}{where}"
