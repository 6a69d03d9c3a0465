"""Where each pair lies in its webdataset shard: read once from the tar headers, then remembered."""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .distributed import barrier, is_main
from .files import whole_file

log = logging.getLogger(__name__)

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
_FORMAT = 1  # of the remembered files; a new number forgets the old ones
_COLUMNS = ("image_start", "image_size", "txt_start", "txt_size", "json_start", "json_size")


class ShardIndex(NamedTuple):
    """One row per pair, in the order of the shards. Starts and sizes are bytes in the tar file."""

    shard: np.ndarray
    image_start: np.ndarray
    image_size: np.ndarray
    text_start: np.ndarray
    text_size: np.ndarray
    text_is_json: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)


def index_shards(paths: Sequence[Path], prefer: str, index_dir: str | None = None) -> ShardIndex:
    """Index every shard, from memory where the file has not changed since.

    prefer: "txt" takes a pair's .txt as its caption and its .json only if there is none; "json" takes the .json.
    index_dir: where indexes are remembered; None is the user's cache folder. Under many ranks, rank 0 does the work.
    Raises ValueError for a file that is no tar, or when there is no pair in any shard.
    """
    folder = Path(index_dir) if index_dir else _cache_home() / "clipn" / "shards"
    if not is_main():
        barrier()
    tables = _remembered(paths, folder)
    if is_main():
        barrier()
    for path, table in zip(paths, tables, strict=True):
        if not table.shape[1]:
            log.warning("%s: holds no pair of an image and a caption", path)
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [table.shape[1] for table in tables])
    if not len(shard):
        raise ValueError(
            f"no pair in {len(paths)} shards, the first of them {paths[0]}: expected members such as 0001.jpg "
            f"({', '.join(IMAGE_KINDS)}) beside 0001.txt or 0001.json"
        )
    image_start, image_size, txt_start, txt_size, json_start, json_size = np.concatenate(tables, axis=1)
    is_json = (json_start >= 0) if prefer == "json" else (txt_start < 0)
    text_start = np.where(is_json, json_start, txt_start)
    text_size = np.where(is_json, json_size, txt_size)
    return ShardIndex(shard, image_start, image_size, text_start, text_size, is_json)


def read_at(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`."""
    with open(path, "rb") as file:
        file.seek(int(start))
        return file.read(int(size))


def _remembered(paths: Sequence[Path], folder: Path) -> list[np.ndarray]:
    """A [6, pairs] table per shard; shards not seen before are scanned, several at a time."""
    memory = [folder / f"{_fingerprint(path)}.npy" for path in paths]
    tables = {number: table for number, file in enumerate(memory) if (table := _recall(file)) is not None}
    unknown = [number for number in range(len(paths)) if number not in tables]
    if unknown:
        workers = min(len(unknown), os.cpu_count() or 1)
        progress = tqdm(total=len(unknown), desc="indexing shards", unit="shard", disable=None if is_main() else True)
        with progress, ProcessPoolExecutor(workers) as pool:
            for number, table in zip(unknown, pool.map(scan_shard, [paths[n] for n in unknown]), strict=True):
                tables[number] = table
                _remember(memory[number], table)
                progress.update()
    return [tables[number] for number in range(len(paths))]


def _recall(file: Path) -> np.ndarray | None:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # never scanned, or written only in part
        return None


def scan_shard(path: Path) -> np.ndarray:
    """Read a tar's headers -> int64 [6, pairs], rows as _COLUMNS, -1 for an absent caption file.

    A truncated tar gives the pairs before the break, with a warning. Raises ValueError for a file that is no tar.
    """
    size = path.stat().st_size
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                if member.isfile() and member.offset_data + member.size <= size:
                    kind = "image" if kind.lower() in IMAGE_KINDS else kind.lower()
                    parts = found.setdefault(f"{member.name.rpartition('/')[0]}/{key}", {})
                    parts[kind] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        if not found and size:
            raise ValueError(f"{path}: not an uncompressed tar file: {error}") from error
        log.warning("%s: truncated (%s); the %d samples before the break are used", path, error, len(found))
    pairs = [parts for parts in found.values() if "image" in parts and ("txt" in parts or "json" in parts)]
    if len(pairs) < len(found):
        log.warning("%s: %d of %d samples lack an image or a caption", path, len(found) - len(pairs), len(found))
    absent = (-1, 0)
    rows = [(*parts["image"], *parts.get("txt", absent), *parts.get("json", absent)) for parts in pairs]
    return np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMNS)).T


def _remember(file: Path, table: np.ndarray) -> None:
    try:
        with whole_file(file) as stream:
            np.save(stream, table)
    except OSError as error:  # a read-only home only costs the next run this scan
        log.warning("the index of a shard could not be remembered: %s", error)


def _fingerprint(path: Path) -> str:
    stat = path.stat()
    return hashlib.sha256(f"{_FORMAT} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
