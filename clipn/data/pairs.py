"""Image-caption pairs: webdataset shards or a CSV/TSV table, decoded and tokenised in worker processes.

Every draw (order, crop, template) depends only on (seed, epoch, pair), never on the number of ranks or workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from clipn.config.schema import Config, DataConfig
from clipn.data.images import Augmentation, Transform, open_image, train_transform
from clipn.data.prompts import fill, negate
from clipn.data.shards import CAUSES, BadPair, Pair, ShardPairs
from clipn.data.storage import expand_patterns, is_url, name_of, read_range, version_of, with_retries
from clipn.runtime.distributed import rank, world_size
from clipn.runtime.signals import leave_signals

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], torch.Tensor]

_MAX_REPLACEMENTS = 20  # bad pairs in a row, drawn at random, before the data as a whole is called broken
_TRIED = 5  # pairs whose captions are looked for before anything else is done
_COMPARED = 2**18  # bytes at the start of a shard that tell it from another of the same layout
_LONGEST_CAPTION = 10_000  # characters; no tokenizer reads a tenth of that


class TablePairs:
    """Pairs in a CSV or TSV file with an image path (relative to the file) and a caption in each row."""

    def __init__(self, path: Path, image_column: str, caption_column: str) -> None:
        self.folder, self.path, self.paths = path.parent, path, [path]
        options = {"sep": "\t" if path.suffix == ".tsv" else ",", "dtype": str, "keep_default_na": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row of more fields than columns
                table = pd.read_csv(path, index_col=False, **options)
        except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
            raise ValueError(f"{path}: not a readable table: {str(error).strip()}") from error
        for key, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in table.columns:
                found = ", ".join(table.columns)
                raise ValueError(f"{path}: no column {column!r} (data.{key}); its columns are: {found!r}")
        if table.empty:
            raise ValueError(f"{path}: holds no rows")
        self.faults: dict[str, int] = {}
        self.images, self.captions = table[image_column].tolist(), table[caption_column].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        """Where a pair lives, for messages."""
        return f"{self.path}, row {number + 1}: {self.images[number]!r}"

    def __getitem__(self, number: int) -> Pair:
        path = self.folder / self.images[number]
        try:
            return Pair(with_retries(path.read_bytes, path), self.captions[number])
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise BadPair("unreadable file", error) from error


Pairs = ShardPairs | TablePairs


def open_pairs(data: DataConfig) -> Pairs:
    """The pairs behind data.shards.

    Raises FileNotFoundError or ValueError for a pattern that matches nothing, an unreadable file, captions that are
    not where `data` says, or shards that hold more faulty samples than data.max_bad_fraction.
    """
    paths = expand_patterns(data.shards)
    if name_of(paths[0]).endswith((".csv", ".tsv")):
        if len(paths) > 1:
            raise ValueError(f"data.shards: one table or many shards, not {len(paths)} files such as {paths[0]}")
        if is_url(paths[0]):
            raise ValueError(f"data.shards={paths[0]!r}: a table is read from this machine, not from a URL")
        return TablePairs(paths[0], data.image_column, data.caption_column)
    pairs = ShardPairs(paths, data.caption_key, data.index_dir)
    _compare_sizes(pairs)
    lost = sum(count for fault, count in pairs.faults.items() if fault != "truncated shard")
    check_bad_fraction(lost, len(pairs) + lost, pairs.faults, data)
    refused = [error for number in range(min(_TRIED, len(pairs))) if (error := _no_caption(pairs, number))]
    if len(refused) == min(_TRIED, len(pairs)):  # a wrong setting, more often than broken pairs
        raise ValueError(f"{pairs.name(0)}: {refused[0]}")
    return pairs


def _no_caption(pairs: Pairs, number: int) -> BadPair | None:
    try:
        pairs[number]
    except BadPair as error:
        return error if error.cause == "no caption" else None
    return None


def check_bad_fraction(bad: int, seen: int, causes: dict[str, int], data: DataConfig) -> None:
    """Raises ValueError, with the counts, when more of the pairs seen are bad than data.max_bad_fraction allows."""
    if bad > data.max_bad_fraction * seen:
        counts = ", ".join(f"{count} {cause}" for cause, count in causes.items() if count)
        raise ValueError(
            f"data.shards={data.shards!r}: {bad} of {seen} pairs are bad ({counts}), more than "
            f"data.max_bad_fraction={data.max_bad_fraction}; the log names them"
        )


def fingerprint(pairs: Pairs) -> str:
    """A hash that tells data apart: of where each pair lies in its shard, and of the start of each file.

    It is alike wherever the files are moved to. Of a table it is its text, not its images.
    """
    digest = hashlib.sha256()
    for path in pairs.paths:
        digest.update(name_of(path).encode())
        size, version = version_of(path)
        digest.update(version.encode() if is_url(path) else read_range(path, 0, min(size, _COMPARED)))
    for column in pairs.index[:-1] if isinstance(pairs, ShardPairs) else []:
        digest.update(column.tobytes())
    for text in pairs.images + pairs.captions if isinstance(pairs, TablePairs) else []:
        digest.update(text.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


class PairDataset(Dataset):
    """(epoch, number) -> {"image" [3, H, W], "tokens" [L], "number", "skipped" [causes]}.

    For negated captions also "no_tokens" [L]. A bad pair is replaced by another, and counted under its cause in
    "skipped"; "number" says which pair it is in the end.
    """

    def __init__(
        self,
        pairs: Pairs,
        transform: Transform,
        tokenizer: Tokenizer,
        templates: Sequence[str] = ("{}",),
        negated: bool = False,
        seed: int = 0,
    ) -> None:
        self.pairs, self.transform, self.tokenizer = pairs, transform, tokenizer
        self.templates, self.negated, self.seed = list(templates), negated, seed

    def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        epoch, number = item
        skipped, place = torch.zeros(len(CAUSES), dtype=torch.long), number
        others = np.random.default_rng([self.seed, epoch, number])
        for _ in range(_MAX_REPLACEMENTS):
            try:
                sample = self._sample(*self._read(place), epoch, number)
                return sample | {"number": place, "skipped": skipped}
            except BadPair as error:
                log.warning("skipped %s: %s", self.pairs.name(place), error)
                skipped[CAUSES.index(error.cause)] += 1
            place = int(others.integers(len(self.pairs)))  # not its neighbour: a whole shard may be bad
        raise ValueError(f"{_MAX_REPLACEMENTS} pairs in a row are bad, drawn at random after {self.pairs.name(number)}")

    def views(self, number: int, epochs: Iterable[int]) -> list[dict[str, torch.Tensor]]:
        """One pair's samples in several epochs, read and decoded once. Raises BadPair."""
        image, caption = self._read(number)
        return [self._sample(image, caption, epoch, number) for epoch in epochs]

    def _read(self, number: int) -> tuple[Image.Image, str]:
        pair = self.pairs[number]
        caption = pair.caption.strip()
        if not caption:
            raise BadPair("empty caption")
        if len(caption) > _LONGEST_CAPTION:
            raise BadPair("caption too long", f"{len(caption)} characters")
        if not pair.image:
            raise BadPair("empty image file")
        try:
            return open_image(pair.image), caption
        except Image.DecompressionBombError as error:
            raise BadPair("huge image", error) from error
        except Exception as error:  # PIL raises many kinds
            raise BadPair("broken image", error) from error

    def _sample(self, image: Image.Image, caption: str, epoch: int, number: int) -> dict[str, torch.Tensor]:
        state = int(np.random.SeedSequence([self.seed, epoch, number]).generate_state(1)[0])
        with _seeded(state):
            pixels = self.transform(image)
        template = random.Random(state).choice(self.templates)
        sample = {"image": pixels, "tokens": self.tokenizer([fill(template, caption)])[0]}
        if self.negated:
            sample["no_tokens"] = self.tokenizer([fill(negate(template), caption)])[0]
        return sample


class EpochBatches(Sampler):
    """This rank's share of every global batch, as lists of (epoch, number), from step `start` to the end.

    Each epoch is a fresh permutation drawn from (seed, epoch). What is left of it after the last whole global batch
    is not used in that epoch; another epoch leaves out other pairs.
    """

    def __init__(self, num_pairs: int, available: int, batch_size: int, epochs: int, seed: int, start: int) -> None:
        self.num_pairs, self.available, self.batch_size = num_pairs, available, batch_size
        self.epochs, self.seed, self.start = epochs, seed, start
        self.steps_per_epoch = num_pairs // batch_size

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // world_size()
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.available)[: self.num_pairs]
            first = self.start % self.steps_per_epoch if epoch == self.start // self.steps_per_epoch else 0
            for step in range(first, self.steps_per_epoch):
                begin = step * self.batch_size + rank() * share
                yield [(epoch, int(number)) for number in order[begin : begin + share]]


def epoch_batches(config: Config, available: int, start: int = 0) -> EpochBatches:
    """The order of training on `available` pairs, from step `start` on.

    Raises ValueError when data.num_pairs or train.batch_size do not fit the pairs there are, or the ranks.
    """
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
    """The pairs as `data` says they are cropped and worded, with every draw from `seed`."""
    data = config.data
    augmentation = Augmentation(tuple(data.crop_scale), data.flip, data.color_jitter, data.erase)
    negated = config.train.objective == "clipn" and config.model.num_prompts == 0
    return PairDataset(
        pairs, train_transform(preprocess, augmentation), tokenizer, data.caption_templates, negated, seed
    )


def training_loader(
    config: Config, pairs: Pairs, preprocess: dict, tokenizer: Tokenizer, start: int = 0
) -> tuple[DataLoader, int]:
    """This rank's batches from step `start` to the end of training, and the number of steps in an epoch.

    Raises ValueError as `epoch_batches` does.
    """
    order = epoch_batches(config, len(pairs), start)
    loader = DataLoader(
        pair_dataset(config, pairs, preprocess, tokenizer, config.run.seed),
        batch_sampler=order,
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available() and config.run.device != "cpu",
        worker_init_fn=leave_signals,
    )
    return loader, order.steps_per_epoch


@contextmanager
def _seeded(state: int) -> Iterator[None]:
    """Draw from the CPU's default generator, as torchvision does, without leaving a trace in it."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(state)  # torch.manual_seed would also visit every accelerator, at ten times the cost
    try:
        yield
    finally:
        generator.set_state(before)


def _compare_sizes(pairs: ShardPairs) -> None:
    """Warn where a sizes.json beside the shards promises another number of pairs than there are."""
    counts = np.bincount(pairs.index.shard, minlength=len(pairs.paths))
    local = {path.parent for path in pairs.paths if isinstance(path, Path)}
    for folder in sorted(local):
        if not (folder / "sizes.json").is_file():
            continue
        try:
            sizes = dict(json.loads((folder / "sizes.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / 'sizes.json'}: expected a JSON object of shard: pairs: {error}") from error
        for path, count in zip(pairs.paths, counts, strict=True):
            if isinstance(path, Path) and path.parent == folder and sizes.get(path.name, count) != count:
                log.warning("%s: holds %d pairs, sizes.json says %r", path, count, sizes[path.name])
