"""Image-caption pairs: webdataset shards or a CSV/TSV table, decoded and tokenised in worker processes.

Every draw (order, crop, template) depends only on (seed, epoch, pair), never on the number of ranks or workers.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from clipn.config.schema import Config, DataConfig
from clipn.data.images import Augmentation, decode_pixels, pixel_transform
from clipn.data.prompts import fill, negate
from clipn.data.shards import CAUSES, BadPair, Pair, ShardPairs
from clipn.data.storage import expand_patterns, is_url, name_of, read_range, version_of, with_retries
from clipn.runtime.distributed import rank, world_size
from clipn.runtime.random import stream
from clipn.runtime.signals import ignore_stop_signals

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], torch.Tensor]

_MAX_REPLACEMENTS = 20  # bad pairs in a row, drawn at random, before the data as a whole is called broken
_CAPTIONS_CHECKED = 5  # pairs at the start that are checked for a caption before anything else
_FINGERPRINT_BYTES = 2**18  # at the start of a shard, which differ between shards of the same layout
_LONGEST_CAPTION = 10_000  # characters; no tokenizer reads a tenth of that


class TablePairs:
    """Pairs in a CSV or TSV file with an image path (relative to the file) and a caption in each row."""

    def __init__(self, path: Path, image_column: str, caption_column: str) -> None:
        self.folder, self.path, self.paths = path.parent, path, [path]
        self.faults: dict[str, int] = {}
        separator = "\t" if path.suffix == ".tsv" else ","
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row of more fields than columns
                table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, index_col=False)
        except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
            raise ValueError(f"{path}: not a readable table: {str(error).strip()}") from error
        for key, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in table.columns:
                columns = ", ".join(table.columns)
                raise ValueError(f"{path}: no column {column!r} (data.{key}); its columns are: {columns!r}")
        if table.empty:
            raise ValueError(f"{path}: holds no rows")
        self.images, self.captions = table[image_column].tolist(), table[caption_column].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        """The place of a pair, for messages."""
        return f"{self.path}, row {number + 1}: {self.images[number]!r}"

    def __getitem__(self, number: int) -> Pair:
        path = self.folder / self.images[number]
        try:
            return Pair(with_retries(path.read_bytes, path), self.captions[number])
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise BadPair("unreadable file", error) from error

    def read(self, numbers: Sequence[int]) -> Iterator[Pair | BadPair]:
        """The pairs of `numbers`; in the place of one that cannot be trained on, its BadPair."""
        for number in numbers:
            try:
                yield self[number]
            except BadPair as error:
                yield error


Pairs = ShardPairs | TablePairs


def open_pairs(data: DataConfig) -> Pairs:
    """The pairs of data.shards.

    Raises FileNotFoundError or ValueError for files that are not there or not readable, for captions that are not
    where `data` says, and for shards with more faulty samples than data.max_bad_fraction.
    """
    paths = expand_patterns(data.shards)
    tables = [path for path in paths if name_of(path).endswith((".csv", ".tsv"))]
    if tables and len(paths) > 1:
        raise ValueError(f"data.shards: one table or many shards, not {len(paths)} files such as {tables[0]}")
    if tables and is_url(tables[0]):
        raise ValueError(f"data.shards={tables[0]!r}: a table is read from this machine, not from a URL")
    if tables:
        return TablePairs(tables[0], data.image_column, data.caption_column)
    pairs = ShardPairs(paths, data.caption_key, data.index_dir)
    _compare_sizes(pairs)
    lost = sum(count for fault, count in pairs.faults.items() if fault != "truncated shard")
    check_bad_fraction(lost, len(pairs) + lost, pairs.faults, data)
    errors = [_caption_error(pairs, number) for number in range(min(_CAPTIONS_CHECKED, len(pairs)))]
    if all(errors):  # a wrong setting, more often than broken pairs
        raise ValueError(f"{pairs.name(0)}: {errors[0]}")
    return pairs


def _caption_error(pairs: Pairs, number: int) -> BadPair | None:
    try:
        pairs[number]
    except BadPair as error:
        return error if error.cause == "no caption" else None
    return None


def check_bad_fraction(bad: int, seen: int, causes: dict[str, int], data: DataConfig) -> None:
    """Raise ValueError, with the counts, when more of the pairs seen are bad than data.max_bad_fraction allows."""
    if bad > data.max_bad_fraction * seen:
        counts = ", ".join(f"{count} {cause}" for cause, count in causes.items() if count)
        limit = f"more than data.max_bad_fraction={data.max_bad_fraction}; the log names them"
        raise ValueError(f"data.shards={data.shards!r}: {bad} of {seen} pairs are bad ({counts}), {limit}")


def fingerprint(pairs: Pairs) -> str:
    """A hash of each pair's place and the start of each file, or of a table; the same when the files are moved."""
    digest = hashlib.sha256()
    for path in pairs.paths:
        digest.update(name_of(path).encode())
        size, version = version_of(path)
        digest.update(version.encode() if is_url(path) else read_range(path, 0, min(size, _FINGERPRINT_BYTES)))
    if isinstance(pairs, TablePairs):
        for text in pairs.images + pairs.captions:
            digest.update(text.encode(errors="surrogatepass") + b"\0")
    else:
        for column in pairs.index[:-1]:
            digest.update(column.tobytes())
    return digest.hexdigest()


@dataclass(eq=False)
class PairDataset(Dataset):
    """(epoch, number) -> {"image" [3, H, W] in uint8, "tokens" [L], "number", "skipped" [causes]}.

    transform: pixels [3, H, W] -> those of "image". With `negated`, "no_tokens" [L] too. A bad pair is replaced by
    another at random; "skipped" counts the bad ones by cause, and "number" is the pair in the sample.
    """

    pairs: Pairs
    transform: Callable[[torch.Tensor], torch.Tensor]
    tokenizer: Tokenizer
    templates: Sequence[str] = ("{}",)
    negated: bool = False
    seed: int = 0

    def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        epoch, number = item
        skipped, place = torch.zeros(len(CAUSES), dtype=torch.long), number
        replacements = stream("replacement", self.seed, epoch, number)
        for _ in range(_MAX_REPLACEMENTS):
            try:
                return self._sample(*_decoded(self.pairs[place]), epoch, number) | {"number": place, "skipped": skipped}
            except BadPair as error:
                log.warning("skipped %s: %s", self.pairs.name(place), error)
                skipped[CAUSES.index(error.cause)] += 1
            place = int(replacements.integers(len(self.pairs)))  # not its neighbour: a whole shard may be bad
        raise ValueError(f"{_MAX_REPLACEMENTS} pairs in a row are bad, drawn at random after {self.pairs.name(number)}")

    def views(self, pair: Pair, number: int, epochs: Iterable[int]) -> list[dict[str, torch.Tensor]]:
        """The samples in several epochs of a pair, the one of `number`, decoded once. Raises BadPair."""
        pixels, caption = _decoded(pair)
        return [self._sample(pixels, caption, epoch, number) for epoch in epochs]

    def _sample(self, pixels: torch.Tensor, caption: str, epoch: int, number: int) -> dict[str, torch.Tensor]:
        draws = stream("sample", self.seed, epoch, number)
        template = self.templates[draws.integers(len(self.templates))]
        with torch.random.fork_rng(devices=[]):  # of torchvision's draws; torch.manual_seed would seed every device
            torch.default_generator.manual_seed(int(draws.integers(2**63)))
            image = self.transform(pixels)
        sample = {"image": image, "tokens": self.tokenizer([fill(template, caption)])[0]}
        if self.negated:
            sample["no_tokens"] = self.tokenizer([fill(negate(template), caption)])[0]
        return sample


def _decoded(pair: Pair) -> tuple[torch.Tensor, str]:
    """A pair's uint8 pixels [3, H, W] and its caption."""
    caption = pair.caption.strip()
    if not caption:
        raise BadPair("empty caption")
    if len(caption) > _LONGEST_CAPTION:
        raise BadPair("caption too long", f"{len(caption)} characters")
    if not pair.image:
        raise BadPair("empty image file")
    try:
        return decode_pixels(pair.image), caption
    except Image.DecompressionBombError as error:
        raise BadPair("huge image", error) from error
    except Exception as error:  # PIL raises many kinds
        raise BadPair("broken image", error) from error


class EpochBatches(Sampler):
    """This rank's share of every global batch, as lists of (epoch, number), from step `start` to the end.

    Each epoch is a new permutation; it does not use the pairs after its last whole global batch.
    """

    def __init__(self, num_pairs: int, available: int, batch_size: int, epochs: int, seed: int, start: int) -> None:
        self.num_pairs, self.available, self.batch_size = num_pairs, available, batch_size
        self.epochs, self.seed, self.start = epochs, seed, start
        self.steps_per_epoch = num_pairs // batch_size

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share, (start_epoch, first) = self.batch_size // world_size(), divmod(self.start, self.steps_per_epoch)
        for epoch in range(start_epoch, self.epochs):
            order = stream("order", self.seed, epoch).permutation(self.available)[: self.num_pairs]
            for step in range(first, self.steps_per_epoch):
                begin = step * self.batch_size + rank() * share
                yield [(epoch, int(number)) for number in order[begin : begin + share]]
            first = 0


def epoch_batches(config: Config, available: int, start: int = 0) -> EpochBatches:
    """The order of training on `available` pairs, from step `start` on. Raises ValueError for sizes that do not fit."""
    data, train = config.data, config.train
    if train.batch_size % world_size():
        raise ValueError(f"train.batch_size={train.batch_size} cannot be shared equally by {world_size()} ranks")
    if data.num_pairs and data.num_pairs > available:
        raise ValueError(f"data.num_pairs={data.num_pairs}: there are only {available} pairs in {data.shards!r}")
    num_pairs = data.num_pairs or available
    if num_pairs < train.batch_size:
        raise ValueError(f"train.batch_size={train.batch_size}: an epoch has only {num_pairs} pairs")
    return EpochBatches(num_pairs, available, train.batch_size, train.epochs, config.run.seed, start)


def pair_dataset(config: Config, pairs: Pairs, preprocess: dict, tokenizer: Tokenizer, seed: int) -> PairDataset:
    """The pairs with the crops and templates of `data`, every draw from `seed`."""
    data = config.data
    augmentation = Augmentation(tuple(data.crop_scale), data.flip, data.color_jitter, data.erase)
    negated = config.train.objective == "clipn" and config.model.negated
    transform = pixel_transform(preprocess, augmentation)
    return PairDataset(pairs, transform, tokenizer, data.caption_templates, negated, seed)


def training_loader(
    config: Config, pairs: Pairs, preprocess: dict, tokenizer: Tokenizer, start: int = 0
) -> tuple[DataLoader, int]:
    """This rank's batches from step `start` to the end of training, and the number of steps in an epoch."""
    order = epoch_batches(config, len(pairs), start)
    loader = DataLoader(
        pair_dataset(config, pairs, preprocess, tokenizer, config.run.seed),
        batch_sampler=order,
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available() and config.run.device != "cpu",
        worker_init_fn=ignore_stop_signals,
    )
    return loader, order.steps_per_epoch


def _compare_sizes(pairs: ShardPairs) -> None:
    """Warn where a sizes.json beside the shards lists another number of pairs than there are."""
    sizes: dict[Path, dict[str, int]] = {}
    for path, count in zip(pairs.paths, np.bincount(pairs.index.shard, minlength=len(pairs.paths)), strict=True):
        if is_url(path):
            continue
        listed = path.parent / "sizes.json"
        try:
            if listed not in sizes:
                sizes[listed] = dict(json.loads(listed.read_text(encoding="utf-8"))) if listed.is_file() else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{listed}: expected a JSON object of shard: pairs: {error}") from error
        if sizes[listed].get(path.name, count) != count:
            log.warning("%s: holds %d pairs, sizes.json says %r", path, count, sizes[listed][path.name])
