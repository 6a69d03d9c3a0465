"""Image-caption pairs in webdataset shards, read by random access through an index of the tar headers."""

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from clipn.data.storage import BLOCK, Location, is_url, open_stream, read_range, version_of, with_retries
from clipn.runtime.distributed import barrier, is_main
from clipn.runtime.files import atomic_write
from clipn.runtime.signals import ignore_stop_signals, killed_children, stop_if_asked

CAUSES = (
    "unreadable file",
    "no caption",
    "caption not in UTF-8",
    "empty caption",
    "caption too long",
    "empty image file",
    "huge image",
    "broken image",
)
IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
FAULTS = ("truncated shard", "image or caption missing", "duplicate key")  # what an index can find

_FORMAT = 3  # of the cached indexes; a new number ignores the old ones
_GAP = 2**16  # bytes between two files that are read along rather than asked for by two requests
_ABSENT = (-1, 0)  # start and size of a file that a pair lacks

log = logging.getLogger(__name__)


class BadPair(Exception):
    """A pair that cannot be trained on; `cause` is one of CAUSES."""

    def __init__(self, cause: str, detail: object = "") -> None:
        super().__init__(f"{cause}: {detail}" if str(detail) else cause)
        assert cause in CAUSES
        self.cause = cause


class Pair(NamedTuple):
    """One pair as it is stored: the image file's bytes and the caption."""

    image: bytes
    caption: str


class ShardIndex(NamedTuple):
    """One row per pair, in the order of the shards. Starts and sizes are bytes in the tar file."""

    shard: np.ndarray
    image_start: np.ndarray
    image_size: np.ndarray
    text_start: np.ndarray
    text_size: np.ndarray
    text_is_json: np.ndarray
    faults: dict[str, int]  # counts of the FAULTS found

    def __len__(self) -> int:
        return len(self.shard)


class Scan(NamedTuple):
    """The content of one shard's headers."""

    table: np.ndarray  # int64 [6, pairs]: start and size of image, .txt and .json
    faults: np.ndarray  # int64 [3], as FAULTS


class ShardPairs:
    """Pairs in webdataset shards (.jpg/.png/.webp + .txt, or .json with a caption), read by random access."""

    def __init__(self, paths: Sequence[Location], caption_key: str | None = None, index_dir: str | None = None) -> None:
        self.paths, self.caption_key = list(paths), caption_key
        self.index = index_shards(self.paths, "json" if caption_key else "txt", index_dir)
        self.faults = self.index.faults

    def __len__(self) -> int:
        return len(self.index)

    def name(self, number: int) -> str:
        """The place of a pair, for messages."""
        return f"{self.paths[self.index.shard[number]]}, byte {self.index.image_start[number]}"

    def __getitem__(self, number: int) -> Pair:
        (pair,) = self.read([number])
        if isinstance(pair, BadPair):
            raise pair
        return pair

    def read(self, numbers: Sequence[int]) -> Iterator[Pair | BadPair]:
        """The pairs of `numbers`; in the place of one that cannot be trained on, its BadPair.

        Pairs that are neighbours in a shard and in `numbers` are read at once, in requests of about BLOCK bytes.
        """
        for run in self._runs(numbers):
            try:
                files = self._files(run)
            except OSError as error:
                if len(run) == 1:
                    yield BadPair("unreadable file", error)
                else:  # perhaps not all of them
                    for number in run:
                        yield from self.read([number])
                continue
            for number, (image, text) in zip(run, files, strict=True):
                try:
                    yield Pair(image, self._caption(number, text))
                except BadPair as error:
                    yield error

    def _runs(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """The numbers in lists, each of pairs that are read at once."""
        run: list[int] = []
        first = last = 0  # the first byte of the run, and the one after it
        for number in numbers:
            start, end = self._extent(number)
            same = run and self.index.shard[number] == self.index.shard[run[0]]
            if run and not (same and 0 <= start - last <= _GAP and end - first <= BLOCK):
                yield run
                run = []
            first, last = first if run else start, end
            run.append(number)
        if run:
            yield run

    def _extent(self, number: int) -> tuple[int, int]:
        """The first byte of a pair's files in its shard, and the one after the last."""
        _, image, image_size, text, text_size, _ = (int(column[number]) for column in self.index[:-1])
        return min(image, text), max(image + image_size, text + text_size)

    def _files(self, run: list[int]) -> list[tuple[bytes, bytes]]:
        """The bytes of each pair's image and caption file. Raises OSError."""
        index, path = self.index, self.paths[self.index.shard[run[0]]]
        columns = (index.image_start, index.image_size, index.text_start, index.text_size)
        places = [[int(column[number]) for column in columns] for number in run]
        first, last = self._extent(run[0])[0], self._extent(run[-1])[1]
        if len(run) == 1 and last - first > sum(places[0][1::2]) + _GAP:  # far apart in the shard
            return [(read_range(path, *places[0][:2]), read_range(path, *places[0][2:]))]
        content = read_range(path, first, last - first)
        places = [(image - first, size, text - first, length) for image, size, text, length in places]
        return [(content[image : image + size], content[text : text + length]) for image, size, text, length in places]

    def _caption(self, number: int, encoded: bytes) -> str:
        """The caption in its file's bytes. Raises BadPair."""
        try:
            text = encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadPair("caption not in UTF-8", error) from error
        if self.index.text_is_json[number]:
            return _json_caption(text, self.caption_key or "caption")
        if self.caption_key:
            raise BadPair("no caption", f"data.caption_key={self.caption_key!r}: there is no .json beside the image")
        return text


def _json_caption(text: str, key: str) -> str:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPair("no caption", f"its .json is broken: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        keys = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise BadPair("no caption", f"its .json has no text under {key!r} (data.caption_key); its keys are: {keys!r}")
    try:
        content[key].encode()
    except UnicodeEncodeError as error:  # an escaped half of a character, which some tokenizers refuse
        raise BadPair("caption not in UTF-8", error) from error
    return content[key]


def index_shards(paths: Sequence[Location], prefer: str, index_dir: str | None = None) -> ShardIndex:
    """Index every shard, from the cache where the file has not changed since.

    prefer: "txt" takes a pair's .txt as its caption and its .json only if there is none; "json" takes the .json.
    index_dir: the cache; None is the user's cache folder. Under many ranks, rank 0 does the work.
    Raises ValueError for a file that is no tar, or when there is no pair in any shard.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not is_main():
        barrier()
    scans = _cached_scans(paths, Path(index_dir or cache_home / "clipn" / "shards"))
    if is_main():
        barrier()
    for path, scan in zip(paths, scans, strict=True):
        faults = [f"{count} {fault}" for fault, count in zip(FAULTS, scan.faults, strict=True) if count]
        if faults or not scan.table.shape[1]:
            log.warning("%s: %s; %d pairs are used", path, ", ".join(faults) or "no pair", scan.table.shape[1])
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [scan.table.shape[1] for scan in scans])
    if not len(shard):
        expected = f"expected members such as 0001.jpg ({', '.join(IMAGE_KINDS)}) beside 0001.txt or 0001.json"
        raise ValueError(f"no pair in {len(paths)} shards, the first of them {paths[0]}: {expected}")
    table = np.hstack([scan.table for scan in scans])
    image, txt, json_ = table[:2], table[2:4], table[4:]
    is_json = (json_[0] >= 0) if prefer == "json" else (txt[0] < 0)
    counts = np.sum([scan.faults for scan in scans], axis=0)
    faults = {fault: int(count) for fault, count in zip(FAULTS, counts, strict=True) if count}
    return ShardIndex(shard, *image, *np.where(is_json, json_, txt), is_json, faults)


def _cached_scans(paths: Sequence[Location], folder: Path) -> list[Scan]:
    """Every shard's scan; shards that are not in the cache are scanned now, several at a time."""
    files = [folder / f"{_cache_key(path)}.npz" for path in paths]
    scans = [_load(file) for file in files]
    if missing := [number for number, scan in enumerate(scans) if scan is None]:
        progress = tqdm(missing, desc="indexing shards", unit="shard", disable=None if is_main() else True)
        workers = min(len(missing), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, initializer=ignore_stop_signals) as pool, killed_children():
            for number, scan in zip(progress, pool.map(scan_shard, [paths[n] for n in missing]), strict=True):
                stop_if_asked()
                scans[number] = scan
                _save(files[number], scan)
    return scans


def _cache_key(path: Location) -> str:
    place = path if is_url(path) else Path(path).resolve()
    return hashlib.sha256(f"{_FORMAT} {place} {version_of(path)}".encode()).hexdigest()[:32]


def _load(file: Path) -> Scan | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Scan(arrays["table"], arrays["faults"])
    except Exception:  # never scanned, or damaged: numpy and zipfile raise many kinds
        return None


def _save(file: Path, scan: Scan) -> None:
    try:
        with atomic_write(file) as stream:
            np.savez(stream, **scan._asdict())
    except OSError as error:  # a read-only home only costs the next run this scan
        log.warning("the index of a shard could not be saved: %s", error)


def scan_shard(path: Location) -> Scan:
    """Read a tar's headers. Raises ValueError for a file that is no tar, OSError for one that cannot be read.

    The first of duplicate keys counts; a truncated tar counts up to the break.
    """
    # each read of a URL has retries and a time limit of its own; all together may take long
    return _scan(path) if is_url(path) else with_retries(lambda: _scan(path), path)


def _scan(path: Location) -> Scan:
    size, _ = version_of(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    truncated = duplicates = 0
    try:
        with open_stream(path, size) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                plain = member.isfile() and not member.issparse()
                end = member.offset_data + member.size if plain else tar.offset
                if not member.offset_data <= end <= size:  # a size below 0 would lead back, without end
                    raise tarfile.ReadError("a member ends beyond the file")
                if not plain:
                    continue
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                kind = "image" if kind.lower() in IMAGE_KINDS else kind.lower()
                parts = samples.setdefault(f"{folder}/{key}", {})
                duplicates += kind in parts and kind in ("image", "txt", "json")
                parts.setdefault(kind, (member.offset_data, member.size))
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile stops at a broken header without an error
                raise tarfile.ReadError("a broken header")
    except OSError:
        raise
    except Exception as error:  # tarfile raises many kinds
        if not samples and size:
            raise ValueError(f"{path}: not an uncompressed tar file: {error}") from error
        truncated = 1
    pairs = [parts for parts in samples.values() if "image" in parts and ("txt" in parts or "json" in parts)]
    rows = [(*parts["image"], *parts.get("txt", _ABSENT), *parts.get("json", _ABSENT)) for parts in pairs]
    faults = np.array([truncated, len(samples) - len(pairs), duplicates], dtype=np.int64)
    return Scan(np.array(rows, dtype=np.int64).reshape(-1, 6).T, faults)
