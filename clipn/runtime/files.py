"""Files that are at every moment absent, old, or new and whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` only when all of it is on disk.

    Makes the folder. Raises OSError, as writing does; then `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(path: Path, name: Path) -> None:
    """Give a file a second name, in place of what had it: a hard link where the file system has them, else a copy."""
    partial = name.with_name(f"{name.name}.{os.getpid()}.partial")
    try:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        os.replace(partial, name)
    finally:
        partial.unlink(missing_ok=True)
