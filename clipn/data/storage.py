"""Reads of files on this machine or behind a URL (https, s3, gs, ... by fsspec), with retries and a time limit."""

import errno
import glob
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, TypeVar

import fsspec
from braceexpand import braceexpand
from fsspec.spec import AbstractBufferedFile

Location = Path | str  # a local path, or a URL

ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds between attempts, doubled each time
TIMEOUT = 60.0  # seconds that a read from a URL may stall
BLOCK = 5 * 2**20  # bytes that a stream from a URL reads at once

_VERSION_KEYS = ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "updated")
# Errors of the path, the place or the request, which a retry repeats.
_LASTING_ERRORS = (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_CODES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)

T = TypeVar("T")


def is_url(path: Location) -> bool:
    return isinstance(path, str) and ("://" in path or "::" in path)


def name_of(path: Location) -> str:
    """The file's own name."""
    return str(path).split("?")[0].rstrip("/").rpartition("/")[2]


def version_of(path: Location) -> tuple[int, str]:
    """The size in bytes, and a text that changes when the file does. Raises FileNotFoundError or OSError."""
    if not is_url(path):
        stat = Path(path).stat()
        return stat.st_size, str(stat.st_mtime_ns)
    files, name = fsspec.core.url_to_fs(path)
    info = with_retries(lambda: _info(files, name), path)
    if info.get("size") is None:
        raise OSError(f"{path}: the server does not say how large it is")
    return int(info["size"]), " ".join(str(info[key]) for key in _VERSION_KEYS if info.get(key))


def read_range(path: Location, start: int, size: int) -> bytes:
    """`size` bytes from `start`. Raises OSError when they stay unreadable, or are not there."""
    start, size = int(start), int(size)
    if is_url(path):
        files, name = fsspec.core.url_to_fs(path)  # in this thread: fsspec connects anew for each thread that asks
        content = with_retries(lambda: files.cat_file(name, start=start, end=start + size), path)
    else:
        content = with_retries(lambda: _read_local(path, start, size), path)
    if len(content) > size:
        raise OSError(f"{path}: the server ignores byte ranges; copy its files to this machine")
    if len(content) < size:
        raise OSError(f"{path}: ends {size - len(content)} bytes too early")
    return content


def open_stream(path: Location, size: int) -> BinaryIO:
    """A file of `size` bytes as a stream; a URL is read in blocks, each as by `read_range`."""
    return _UrlStream(None, path, block_size=BLOCK, size=size) if is_url(path) else open(path, "rb")


class _UrlStream(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end - start)


def with_retries(read: Callable[[], T], path: Location) -> T:
    """Return read(), tried again with growing pauses when it fails and, from a URL, when it stalls.

    Raises lasting errors at once, OSError after the last attempt.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            return _with_timeout(read) if is_url(path) else read()
        except _LASTING_ERRORS:
            raise
        except Exception as error:  # every kind of storage has its own errors
            if not is_url(path) and (not isinstance(error, OSError) or error.errno in _LASTING_CODES):
                raise
            last_error = error
    reason = f"{type(last_error).__name__} {last_error}"
    raise OSError(f"{path}: not readable in {ATTEMPTS} attempts: {reason}") from last_error


def expand_patterns(patterns: str | Sequence[str]) -> list[Location]:
    """Files for brace patterns ({00000..00331}, {train,val}), globs and URLs, in order.

    Raises FileNotFoundError for a missing file or a pattern without a match, ValueError for a malformed one.
    """
    paths: list[Location] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not is_url(pattern) and Path(pattern).is_file():  # a name with brackets or braces in it
            paths.append(Path(pattern))
            continue
        try:
            for text in braceexpand(pattern, escape=False):
                if not (matches := _matches(text)):
                    raise FileNotFoundError(f"data.shards={pattern!r}: no such file: {text}")
                paths += matches
        except (ImportError, ValueError) as error:  # also a protocol that is unknown, or its package not installed
            raise ValueError(f"data.shards={pattern!r}: {error}") from error
    if not paths:
        raise FileNotFoundError(f"data.shards={patterns!r}: no files are named")
    return paths


def _matches(text: str) -> list[Location]:
    if is_url(text):
        files, name = fsspec.core.url_to_fs(text)
        if not glob.has_magic(name):
            return [text]  # whether it is there is seen when it is indexed
        return [files.unstrip_protocol(path) for path in with_retries(lambda: sorted(files.glob(name)), text)]
    if glob.has_magic(text):
        return [Path(path) for path in sorted(glob.glob(text))]
    return [Path(text)] if Path(text).is_file() else []


def _info(files: fsspec.AbstractFileSystem, name: str) -> dict[str, Any]:
    try:
        return files.info(name)
    except FileNotFoundError as error:
        cause = error.__cause__
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", None) not in (404, 410):
            raise cause from None  # fsspec calls every failure over http "not found"
        raise


def _read_local(path: Location, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _with_timeout(read: Callable[[], T]) -> T:
    """Return read(), or raise TimeoutError after TIMEOUT: not every kind of storage has a time limit of its own."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()  # a pool's threads would hold the exit
    if not wait([future], timeout=TIMEOUT).done:
        raise TimeoutError(f"no answer in {TIMEOUT:g} s")
    return future.result()
