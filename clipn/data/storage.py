"""Files on this machine or behind a URL (https, s3, gs, ... by fsspec), read in parts and with patience."""

from __future__ import annotations

import errno
import functools
import glob
import io
import itertools
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

Location = Path | str  # a local path, or a URL

ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds between attempts, doubled each time
TIMEOUT = 60.0  # seconds that a read from a URL may stall
BLOCK = 5 * 2**20  # bytes that a stream from a URL reads at once

_LASTING = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # faults of the path or place, not of the disk

T = TypeVar("T")


def is_url(path: Location) -> bool:
    return isinstance(path, str) and ("://" in path or "::" in path)


def name_of(path: Location) -> str:
    """The file's own name."""
    return str(path).split("?")[0].rstrip("/").rpartition("/")[2]


def version_of(path: Location) -> tuple[int, str]:
    """The size in bytes, and something that changes when the file does. Raises FileNotFoundError or OSError."""
    if not is_url(path):
        stat = Path(path).stat()
        return stat.st_size, str(stat.st_mtime_ns)
    info = with_retries(lambda: _info(path), path)
    if info.get("size") is None:
        raise OSError(f"{path}: the server does not say how large it is")
    keys = ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "updated")
    return int(info["size"]), " ".join(str(info[key]) for key in keys if info.get(key))


def read_range(path: Location, start: int, size: int) -> bytes:
    """`size` bytes from `start`. Raises OSError when they cannot be read, after some attempts, or are not there."""
    found = with_retries(lambda: _read(path, int(start), int(size)), path)
    if len(found) > size:
        raise OSError(f"{path}: the server ignores byte ranges; copy its files to this machine")
    if len(found) < size:
        raise OSError(f"{path}: ends {size - len(found)} bytes too early")
    return found


def open_stream(path: Location) -> BinaryIO:
    """The whole file, to be read from the start; of a URL each block as with_retries as by `read_range`."""
    return io.BufferedReader(_Blocks(path), BLOCK) if is_url(path) else open(path, "rb")


class _Blocks(io.RawIOBase):
    """A file behind a URL, as io.BufferedReader reads one."""

    def __init__(self, path: str) -> None:
        self.path, self.size, self.place = path, version_of(path)[0], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        size = max(0, min(len(buffer), self.size - self.place))
        buffer[:size] = read_range(self.path, self.place, size)
        self.place += size
        return size


def with_retries(read: Callable[[], T], path: Location) -> T:
    """Try a read again, with growing pauses; from a URL, also one that stalls.

    Raises FileNotFoundError at once, OSError that names `path` after the last attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _within(TIMEOUT, read) if is_url(path) else read()
        except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise  # trying again would not help
        except Exception as error:  # every kind of storage has its own errors
            if not is_url(path) and (not isinstance(error, OSError) or error.errno in _LASTING):
                raise
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{path}: not readable in {ATTEMPTS} attempts: {type(error).__name__} {error}") from error
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError


def expand_patterns(patterns: str | Sequence[str]) -> list[Location]:
    """Files for brace patterns ({00000..00331}, {train,val}), globs and URLs, in order.

    Raises FileNotFoundError that names the first missing file or the pattern that matches nothing.
    """
    paths: list[Location] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not is_url(pattern) and Path(pattern).is_file():  # a name with brackets or braces in it
            paths.append(Path(pattern))
            continue
        for text in _expand_braces(pattern):
            found = _matches(text)
            if not found:
                raise FileNotFoundError(f"data.shards={pattern!r}: no such file: {text}")
            paths += found
    if not paths:
        raise FileNotFoundError(f"data.shards={patterns!r}: no files are named")
    return paths


def _matches(text: str) -> list[Location]:
    if is_url(text):
        try:
            files, name = _files(text)
            if not glob.has_magic(name):
                return [text]  # whether it is there is seen when it is indexed
            found = with_retries(lambda: sorted(files.glob(name)), text)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise ValueError(f"data.shards={text!r}: {error}") from error
        return [files.unstrip_protocol(path) for path in found]
    if glob.has_magic(text):
        return [Path(path) for path in sorted(glob.glob(text))]
    return [Path(text)] if Path(text).is_file() else []


def _expand_braces(pattern: str) -> list[str]:
    """{00000..00003} counts, zero-padded as written; {a,b} lists; several braces multiply."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for number, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if number % 2 == 0:
            choices.append([part])
        elif span:
            low, high = span.groups()
            choices.append([str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(words) for words in itertools.product(*choices)]


def _files(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the file's name in it."""
    return _files_in(os.getpid(), url)


@functools.lru_cache(maxsize=10_000)
def _files_in(process: int, url: str) -> tuple[Any, str]:
    # fsspec itself would make another in every thread, and connect anew for every read
    return fsspec.core.url_to_fs(url)


def _info(url: str) -> dict[str, Any]:
    files, name = _files(url)
    try:
        return files.info(name)
    except FileNotFoundError as error:
        cause = error.__cause__
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", None) not in (404, 410):
            raise cause from None  # fsspec calls every failure over http "not found"
        raise


def _read(path: Location, start: int, size: int) -> bytes:
    if is_url(path):
        files, name = _files(path)
        return files.cat_file(name, start=start, end=start + size)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _within(seconds: float, read: Callable[[], T]) -> T:
    """Give a read up after some seconds: not every kind of storage does so by itself."""
    answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def work() -> None:
        try:
            answers.put((True, read()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        fine, answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if not fine:
        raise answer
    return answer
