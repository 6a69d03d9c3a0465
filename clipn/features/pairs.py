"""Features of the frozen towers, computed once: of a training's pairs, and of the image sets of an evaluation."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from clipn.config.schema import Config
from clipn.data.pairs import (
    EpochBatches,
    Pairs,
    Tokenizer,
    check_bad_fraction,
    epoch_batches,
    fingerprint,
    pair_dataset,
)
from clipn.data.shards import CAUSES, BadPair
from clipn.features.store import Encode, FeatureStore, autocast, weights_hash
from clipn.model.base import context_length
from clipn.model.clipn import CLIPN
from clipn.model.packed_text import caption_lengths, ignores_padding

log = logging.getLogger(__name__)


class PairFeatures:
    """The features of all readable pairs, a row each, ready to be drawn from in any order.

    On a GPU that has the room they are held there; else they stay on disk, mapped into memory.
    """

    def __init__(self, store: FeatureStore, device: torch.device) -> None:
        parts = [store.read(part) for part in range(len(store))]
        self.fingerprint: str = store.manifest["pairs"]
        self.skipped = torch.cat([part["skipped"] for part in parts])  # [n, 2]: pair and cause
        readable = torch.ones(store.samples, dtype=torch.bool)
        readable[self.skipped[:, 0]] = False
        self.numbers = readable.nonzero().squeeze(1)  # the pair that each row is of
        parts = [part for part in parts if "image" in part]
        if not parts:
            raise ValueError(f"{store.folder}: none of its {store.samples} pairs is readable")
        self.image = _Rows([part["image"] for part in parts], device)
        self.yes = _Rows([part["yes"] for part in parts], device)
        names = [name for name in ("tokens", "no_tokens") if name in parts[0]]
        self.tokens = {name: _Texts(parts, name, store.manifest["context_length"]) for name in names}

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """(epoch, row) items -> {"image_features" [b, D], "yes_features" [b, D], "tokens" [b, L], ...}."""
        epoch, rows = items[0][0], torch.tensor([row for _, row in items])
        found = {name: texts.take(rows, epoch) for name, texts in self.tokens.items()}
        return found | {
            "image_features": self.image.take(rows, epoch),
            "yes_features": self.yes.take(rows, epoch),
            "number": self.numbers[rows],
            "skipped": torch.zeros(1, len(CAUSES), dtype=torch.long),  # they were left out before
        }

    def batches(self, order: EpochBatches) -> Iterator[dict[str, Tensor]]:
        """This rank's batches in the order of training."""
        return (self.batch(items) for items in order)


class _Rows:
    """[N, views, D] in parts."""

    def __init__(self, parts: list[Tensor], device: torch.device) -> None:
        size = sum(part.numel() * part.element_size() for part in parts)
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
            parts = [torch.cat([part.to(device) for part in parts])]
        self.parts = parts
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, rows: Tensor, epoch: int) -> Tensor:
        """[b] row numbers -> [b, D], of the view that is an epoch's turn."""
        view = epoch % self.parts[0].shape[1]
        if len(self.parts) == 1:
            return self.parts[0][rows.to(self.parts[0].device), view]
        which = torch.bucketize(rows, self.ends, right=True)
        found = self.parts[0].new_empty(len(rows), self.parts[0].shape[2])
        for part in which.unique().tolist():
            mine = which == part
            start = int(self.ends[part]) - len(self.parts[part])
            found[mine] = self.parts[part][rows[mine] - start, view]
        return found


class _Texts:
    """Token ids of [N, views] captions, end to end."""

    def __init__(self, parts: list[dict[str, Tensor]], name: str, context_length: int) -> None:
        self.ids = torch.cat([part[name] for part in parts])
        self.lengths = torch.cat([part[f"{name}_length"] for part in parts]).long()
        self.starts = self.lengths.flatten().cumsum(0).view_as(self.lengths) - self.lengths
        self.context_length = context_length

    def take(self, rows: Tensor, epoch: int) -> Tensor:
        """[b] row numbers -> [b, context_length] token ids."""
        view = epoch % self.lengths.shape[1]
        lengths, starts = self.lengths[rows, view, None], self.starts[rows, view, None]
        places = torch.arange(self.context_length)
        real = places < lengths
        tokens = torch.zeros(real.shape, dtype=torch.long)
        tokens[real] = self.ids[(starts + places)[real]].long()
        return tokens


def pair_features(config: Config, model: CLIPN, tokenizer: Tokenizer, pairs: Pairs | None) -> PairFeatures:
    """The features of pairs in features.dir: what is missing there is made, and said beforehand how large it is.

    pairs: None takes whatever pairs the folder holds features of. Raises ValueError for features of another model or
    other settings, or a damaged file; OSError when the disk has no room.
    """
    settings, data = config.features, config.data
    dim = model.architecture["embed_dim"]
    folder = Path(settings.dir) / "pairs"
    if pairs is None and not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"features.dir={settings.dir!r}: no features there, and data.shards names no pairs")
    store = FeatureStore(folder, _describe_pairs(config, model, pairs))
    missing = store.missing()
    if missing and pairs is None:
        raise ValueError(f"{folder}: {len(missing)} of {len(store)} parts are missing, and data.shards names no pairs")
    texts = settings.views if len(data.caption_templates) > 1 else 1
    _say_size(store, missing, dim * (settings.views + texts) * (2 if settings.dtype == "float16" else 4))
    if missing:
        dataset = _PairViews(config, pairs, model, tokenizer, texts)
        precision = settings.precision or config.train.precision
        encode = pair_encoder(model, precision, getattr(torch, settings.dtype))
        store.fill(
            dataset,
            encode,
            settings.batch_size,
            data.workers,
            "features",
            # A bad start does not yet make the whole bad.
            lambda skipped, seen: check_bad_fraction(len(skipped), max(seen, 1000), count_causes(skipped), data),
        )
    features = PairFeatures(store, model.logit_scale.device)
    causes = count_causes(features.skipped)
    check_bad_fraction(len(features.skipped), store.samples, causes, data)
    counts = ", ".join(f"{count} {cause}" for cause, count in causes.items()) or "none"
    log.info("features: %d pairs in %s; left out: %s", len(features), folder, counts)
    unread = features.skipped[features.skipped[:, 1] == CAUSES.index("unreadable file"), 0] // store.part_size
    if len(unread):
        files = ", ".join(store.file(part).name for part in unread.unique().tolist())
        log.warning("to try again the pairs that could not be read, delete from %s: %s", folder, files)
    return features


def count_causes(skipped: Tensor) -> dict[str, int]:
    """[n, 2] numbers and causes -> how often each cause was found, if it was."""
    counts = torch.bincount(skipped[:, 1], minlength=len(CAUSES)).tolist()
    return {cause: count for cause, count in zip(CAUSES, counts, strict=True) if count}


def feature_loader(config: Config, features: PairFeatures, start: int) -> tuple[Iterator[dict[str, Tensor]], int]:
    """This rank's batches from step `start` to the end of training, and the number of steps in an epoch."""
    order = epoch_batches(config, len(features), start)
    return features.batches(order), order.steps_per_epoch


class _PairViews(Dataset):
    """number -> {"image" [views, 3, H, W], "tokens" [texts, L], "no_tokens" [texts, L]}, or its cause if bad."""

    def __init__(self, config: Config, pairs: Pairs, model: CLIPN, tokenizer: Tokenizer, texts: int) -> None:
        self.pairs = pair_dataset(config, pairs, model.preprocess, tokenizer, config.features.seed)
        self.views, self.texts = config.features.views, texts

    def __getitem__(self, number: int) -> dict[str, Tensor] | int:
        try:
            views = self.pairs.views(number, range(self.views))
        except BadPair as error:
            log.warning("skipped %s: %s", self.pairs.pairs.name(number), error)
            return CAUSES.index(error.cause)
        images = torch.stack([view.pop("image") for view in views])
        return {"image": images} | {key: torch.stack([v[key] for v in views[: self.texts]]) for key in views[0]}


def pair_encoder(model: CLIPN, precision: str, dtype: torch.dtype) -> Encode:
    device, tower = model.logit_scale.device, model.base.text

    def encode(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, tokens = batch["image"].to(device, non_blocking=True), batch["tokens"]
        with autocast(device, precision):
            image = torch.stack([model.encode_image(view) for view in images.unbind(1)], dim=1)
            yes = torch.stack([model.encode_text(view) for view in tokens.unbind(1)], dim=1)
        found = {"image": image.to(dtype), "yes": yes.to(dtype)}
        for name in ("tokens", "no_tokens"):
            if name in batch:
                found |= _cut_tokens(tower, batch[name], name)
        return found

    return encode


def _cut_tokens(tower: nn.Module, tokens: Tensor, name: str) -> dict[str, Tensor]:
    """[b, texts, L] -> the ids end to end without what the tower does not read, and the [b, texts] lengths."""
    flat = tokens.flatten(0, 1)
    whole = torch.full((len(flat),), flat.shape[1])
    lengths = caption_lengths(tower, flat) if ignores_padding(tower) else whole
    real = torch.arange(flat.shape[1]) < lengths[:, None]
    return {name: flat[real].int(), f"{name}_length": lengths.view(tokens.shape[:2]).int()}


def _describe_pairs(config: Config, model: CLIPN, pairs: Pairs | None) -> dict[str, Any]:
    """The manifest of a training set's features: all that they depend on."""
    data, settings = config.data, config.features
    manifest = {
        "of": "image-caption pairs",
        "model": model.architecture,
        "weights": weights_hash(model.base.visual, model.base.text),
        "preprocess": model.preprocess,
        "context_length": context_length(model.architecture),
        "negated": config.model.num_prompts == 0,
        "precision": settings.precision or config.train.precision,
        "dtype": settings.dtype,
        "views": settings.views,
        "seed": settings.seed,
        "part_size": settings.part_size,
    }
    keys = ("crop_scale", "flip", "color_jitter", "erase", "caption_templates")
    for key in (*keys, "caption_key", "image_column", "caption_column"):
        manifest[key] = getattr(data, key)
    if pairs is not None:
        manifest |= {"shards": len(pairs.paths), "pairs": fingerprint(pairs), "samples": len(pairs)}
    return manifest


def _say_size(store: FeatureStore, missing: list[int], bytes_per_sample: int) -> None:
    """Tell how much is to be written. Raises OSError when there is no room for it."""
    needed = sum(len(store.numbers(part)) for part in missing) * bytes_per_sample
    free = shutil.disk_usage(store.folder).free
    log.info(
        "features: %d pairs in %s, about %.1f MB; %d of %d parts are to be made",
        store.samples,
        store.folder,
        store.samples * bytes_per_sample / 1e6,
        len(missing),
        len(store),
    )
    if needed > free:
        raise OSError(
            f"{store.folder}: the features need {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free there"
        )
