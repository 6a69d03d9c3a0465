"""Files that are absent, old, or new and complete, at any moment."""

import io
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once all of it is on disk. Makes the folder.

    Raises OSError as writing does; `path` is then unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(path: Path, name: Path) -> None:
    """Give a file a second name, replacing what had it: a hard link where the file system has them, else a copy."""
    partial = _partial(name)
    try:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        os.replace(partial, name)
    finally:
        partial.unlink(missing_ok=True)


def extract_tar(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack an open tar file. Raises tarfile.TarError for a member that would be written outside of the folder."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    for member in archive:  # Python before 3.10.12 and 3.11.4
        inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
        if not inside or not (member.isfile() or member.isdir()):
            raise tarfile.ExtractError(f"{member.name!r} would be unpacked outside of {folder}, or is no plain file")
    archive.extractall(folder)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file whose bytes depend on the names and contents of its members alone."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
