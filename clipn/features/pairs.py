"""Features of training pairs from the frozen towers, computed once and kept on disk."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from clipn.config.schema import Config
from clipn.data.images import pixel_input
from clipn.data.pairs import Pairs, Tokenizer, check_bad_fraction, epoch_batches, fingerprint, pair_dataset
from clipn.data.shards import CAUSES, BadPair, Pair
from clipn.features.columns import DenseColumn, RaggedColumn
from clipn.features.store import Columns, Encode, FeatureStore
from clipn.model.base import context_length
from clipn.model.clipn import CLIPN
from clipn.model.hashing import weights_hash
from clipn.model.packed_text import caption_lengths, ignores_padding
from clipn.model.precision import autocast

log = logging.getLogger(__name__)


class PairFeatures:
    """The features of all readable pairs: one row per pair, with random access.

    skipped: [n, 2], number and cause of each unreadable pair. numbers: [N], the pair of each row. fingerprint: of the
    pairs. tokens: whether batches have the captions' tokens, which an adapter does not read.

    Raises ValueError for a store without a readable pair.
    """

    def __init__(self, store: FeatureStore, device: torch.device, tokens: bool = True) -> None:
        self.skipped, parts = store.read()
        self.fingerprint: str = store.manifest["pairs"]
        self.numbers = torch.ones(store.samples, dtype=bool).index_fill(0, self.skipped[:, 0], False).nonzero()[:, 0]
        if not parts:
            raise ValueError(f"{store.folder}: none of its {store.samples} pairs is readable")
        self.image, self.yes = DenseColumn(parts, "image", device), DenseColumn(parts, "yes", device)
        names = [name for name in ("tokens", "no_tokens") if tokens and name in parts[0]]
        self.tokens = {name: RaggedColumn(parts, name, store.manifest["context_length"]) for name in names}

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """(epoch, row) items -> {"image_features" [b, D], "yes_features" [b, D], "tokens" [b, L], ...}."""
        epoch, rows = items[0][0], torch.tensor([row for _, row in items])
        return {name: column.take(rows, epoch).long() for name, column in self.tokens.items()} | {
            "image_features": self.image.take(rows, epoch),
            "yes_features": self.yes.take(rows, epoch),
            "number": self.numbers[rows],
            "skipped": torch.zeros(1, len(CAUSES), dtype=torch.long),  # the store has left them out
        }


def pair_features(config: Config, model: CLIPN, tokenizer: Tokenizer, pairs: Pairs | None) -> PairFeatures:
    """The features of pairs in features.dir; encodes what is missing there, after logging its size.

    pairs: None reads the features in the folder, whatever pairs they are of.

    Raises ValueError for features of another model or of other settings, a damaged file, too many bad pairs, or none
    that is readable; FileNotFoundError for no features and no pairs; OSError for a disk without enough space.
    """
    settings, data = config.features, config.data
    folder = Path(settings.dir) / "pairs"
    if pairs is None and not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"features.dir={settings.dir!r}: no features there, and data.shards names no pairs")
    store = FeatureStore(folder, _manifest(config, model, pairs))
    missing = store.missing()
    if missing and pairs is None:
        raise ValueError(f"{folder}: {len(missing)} of {len(store)} parts are missing, and data.shards names no pairs")
    texts = settings.views if len(data.caption_templates) > 1 else 1
    dtype = getattr(torch, settings.dtype)
    _check_space(store, missing, (settings.views + texts) * model.architecture["embed_dim"] * dtype.itemsize)
    if missing:
        store.fill(
            _PairViews(config, pairs, model, tokenizer, texts),
            pair_encoder(model, settings.precision or config.train.precision, dtype),
            settings.batch_size,
            data.workers,
            "features",
            # At least 1000: a few bad pairs at the start are not yet a large fraction.
            lambda skipped, seen: check_bad_fraction(len(skipped), max(seen, 1000), count_causes(skipped), data),
        )
    features = PairFeatures(store, model.logit_scale.device, tokens=model.no_tower == "tower")
    causes = count_causes(features.skipped)
    check_bad_fraction(len(features.skipped), store.samples, causes, data)
    counts = ", ".join(f"{count} {cause}" for cause, count in causes.items()) or "none"
    log.info("features: %d pairs in %s; left out: %s", len(features), folder, counts)
    unread = features.skipped[features.skipped[:, 1] == CAUSES.index("unreadable file"), 0] // store.part_size
    if len(unread):
        files = ", ".join(store.file(part).name for part in unread.unique().tolist())
        log.warning("to retry the pairs that could not be read, delete from %s: %s", folder, files)
    return features


def count_causes(skipped: Tensor) -> dict[str, int]:
    """Skipped pairs [n, 2] (number, cause) -> the number of pairs by the name of each cause that occurs."""
    counts = torch.bincount(skipped[:, 1], minlength=len(CAUSES)).tolist()
    return {cause: count for cause, count in zip(CAUSES, counts, strict=True) if count}


def feature_loader(config: Config, features: PairFeatures, start: int) -> tuple[Iterator[dict[str, Tensor]], int]:
    """This rank's batches from step `start` to the end of training, and the number of steps in an epoch."""
    order = epoch_batches(config, len(features), start)
    return (features.batch(items) for items in order), order.steps_per_epoch


def pair_encoder(model: CLIPN, precision: str, dtype: torch.dtype) -> Encode:
    """A function that encodes a batch of `views` images and texts per pair into the columns of a store.

    "image" [b, views, 3, H, W] in uint8 and "tokens" [b, texts, L] -> "image" [b, views, D] and "yes" [b, texts, D] of
    `dtype`, and "tokens" (and "no_tokens", if in the batch) as ragged columns.
    """
    device, tower = model.logit_scale.device, model.base.text
    to_input = pixel_input(model.preprocess, device)

    def encode(batch: Columns) -> Columns:
        tokens = batch["tokens"]
        with autocast(device, precision):
            image = torch.stack([model.encode_image(to_input(view)) for view in batch["image"].unbind(1)], dim=1)
            yes = torch.stack([model.encode_text(view) for view in tokens.unbind(1)], dim=1)
        columns = {"image": image.to(dtype), "yes": yes.to(dtype)}
        for name in ("tokens", "no_tokens"):
            if name in batch:
                columns |= _ragged_tokens(tower, batch[name], name)
        return columns

    return encode


def _ragged_tokens(tower: nn.Module, tokens: Tensor, name: str) -> Columns:
    """Token ids [b, texts, L] -> the ids that the tower reads, end to end, and their lengths [b, texts]."""
    flat = tokens.flatten(0, 1)
    lengths = caption_lengths(tower, flat) if ignores_padding(tower) else torch.full((len(flat),), flat.shape[1])
    real = torch.arange(flat.shape[1]) < lengths[:, None]
    return {name: flat[real].int(), f"{name}_length": lengths.view(tokens.shape[:2]).int()}


class _PairViews(Dataset):
    """Each number -> {"image" [views, 3, H, W], "tokens" [texts, L], "no_tokens" [texts, L]}, or its cause if bad."""

    def __init__(self, config: Config, pairs: Pairs, model: CLIPN, tokenizer: Tokenizer, texts: int) -> None:
        self.dataset = pair_dataset(config, pairs, model.preprocess, tokenizer, config.features.seed)
        self.epochs, self.texts = range(config.features.views), texts

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Tensor] | int]:
        """The samples of a batch, as a DataLoader asks for them: neighbouring pairs are read at once."""
        pairs = self.dataset.pairs.read(numbers)
        return [self._views(number, pair) for number, pair in zip(numbers, pairs, strict=True)]

    def _views(self, number: int, pair: Pair | BadPair) -> dict[str, Tensor] | int:
        try:
            if isinstance(pair, BadPair):
                raise pair
            views = self.dataset.views(pair, number, self.epochs)
        except BadPair as error:
            log.warning("skipped %s: %s", self.dataset.pairs.name(number), error)
            return CAUSES.index(error.cause)
        images = torch.stack([view.pop("image") for view in views])
        return {"image": images} | {key: torch.stack([v[key] for v in views[: self.texts]]) for key in views[0]}


def _manifest(config: Config, model: CLIPN, pairs: Pairs | None) -> dict[str, Any]:
    """All that the features of a training set depend on."""
    data, settings = config.data, config.features
    keys = "crop_scale flip color_jitter erase caption_templates caption_key image_column caption_column"
    manifest = {key: getattr(data, key) for key in keys.split()} | {
        "of": "image-caption pairs",
        "model": model.architecture,
        "weights": weights_hash(model.base.visual, model.base.text),
        "preprocess": model.preprocess,
        "context_length": context_length(model.architecture),
        "negated": config.model.negated,
        "precision": settings.precision or config.train.precision,
        "dtype": settings.dtype,
        "views": settings.views,
        "seed": settings.seed,
        "part_size": settings.part_size,
    }
    if pairs is not None:
        manifest |= {"shards": len(pairs.paths), "pairs": fingerprint(pairs), "samples": len(pairs)}
    return manifest


def _check_space(store: FeatureStore, missing: list[int], bytes_per_sample: int) -> None:
    """Log the size of the features. Raises OSError when there is no space for the missing ones."""
    needed = sum(len(store.numbers(part)) for part in missing) * bytes_per_sample / 1e6
    free, size = shutil.disk_usage(store.folder).free / 1e6, store.samples * bytes_per_sample / 1e6
    message = "features: %d pairs in %s, about %.1f MB; %d of %d parts are missing"
    log.info(message, store.samples, store.folder, size, len(missing), len(store))
    if needed > free:
        raise OSError(f"{store.folder}: the features need {needed:.0f} MB, and {free:.0f} MB are free there")
