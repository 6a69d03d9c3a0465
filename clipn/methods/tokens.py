"""TagOOD in an evaluation: the tokens of training images, kept on disk, and the scores of image sets in one pass."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipn.config.evaluation import TagoodConfig
from clipn.config.schema import Config
from clipn.data.image_sets import ImageSet
from clipn.features.columns import RaggedRows, Rows, open_rows
from clipn.features.image_sets import encode_images, image_manifest, store_folder
from clipn.features.store import Columns, FeatureStore
from clipn.methods.taggers import Tagger, Tags, kept_places, select_tokens, tag
from clipn.methods.tagood import MeanToken, centre_score
from clipn.methods.tagood_fit import class_means, fit_tagood, stored_tagood
from clipn.model.hashing import weights_hash
from clipn.model.precision import autocast
from clipn.runtime.distributed import choose_device

log = logging.getLogger(__name__)

REJECTED = -1.0  # the score of an image without a tag, with tagood.untagged=reject: no score is lower
# What is scored, beside TagOOD itself (""): "mean": the mean of the tokens against class means, without a projector;
# "image": the whole image as the only token; "CE": a projector of cross-entropy alone, against its class means.
ROWS = ("", "mean", "image", "CE")
_MANY_UNTAGGED = 0.05  # of ID images: with more of them rejected, FPR95 is that of a tie


class TrainingTokens(NamedTuple):
    """The tokens of N training images, float16, tensors on the device or mapped rows."""

    selected: RaggedRows  # those that show a tag
    image: Rows  # [N, D], of the whole images
    tagged: Tensor  # [N] bool

    def subset(self, numbers: Tensor) -> "TrainingTokens":
        """The tokens of these images."""
        image = self.image[numbers.to(self.image.device)]
        return TrainingTokens(self.selected.subset(numbers), image, self.tagged[numbers])


class KeptPlaces(NamedTuple):
    """Which places of N images the tagger's tokens are kept of, for a figure."""

    kept: np.ndarray  # [N, S, S] bool, rows from the top of an image that is preprocessed for the tagger
    tagged: np.ndarray  # [N] bool
    preprocess: dict[str, Any]  # of images, as the tagger's


class TagScore(nn.Module):
    """Tags -> scores [B]: the cosine of an encoder's feature to the nearest of the centres, or the tag's confidence.

    whole: the encoder sees the whole image's token alone.
    """

    def __init__(
        self,
        settings: TagoodConfig,
        encoder: nn.Module | None = None,
        centres: Tensor | None = None,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.encoder, self.whole = settings, encoder, whole
        self.register_buffer("centres", centres)
        self.fit: tuple[Any, ...] | None = None  # the arguments of `stored_tagood`, if this was fitted

    @torch.no_grad()
    def forward(self, tags: Tags) -> Tensor:
        settings, scores = self.settings, tags.confidence
        if self.encoder is not None:
            tokens, mask = tags.tokens[:, :1], torch.ones_like(tags.tagged[:, None])
            if not self.whole:
                tokens, mask = select_tokens(*tags[:2], settings.attention_threshold, settings.max_tokens + 1)
            with torch.autocast(tokens.device.type, enabled=False):
                scores = centre_score(self.encoder(tokens.float(), mask), self.centres)
            scores = scores * tags.confidence if settings.score == "cosine*tag" else scores
        return scores if settings.untagged == "keep" else scores.where(tags.tagged, REJECTED)


def fit_row(
    row: str,
    tokens: TrainingTokens,
    labels: Tensor,
    num_classes: int,
    settings: TagoodConfig,
    folder: str | Path | None = None,
) -> TagScore:
    """The score of one of ROWS, learned from training images and their labels [N].

    folder: where fits are kept. Classes without training images have no centre; tagood.untagged=reject leaves training
    images without a tag out. Raises ValueError as `fit_tagood` does, and where no training image has a tag.
    """
    sets, labels = tokens.selected, labels.cpu()
    if row == "image":
        sets = RaggedRows(tokens.image, torch.ones(len(sets), dtype=torch.long))
    if settings.untagged == "reject":
        numbers = tokens.tagged.cpu().nonzero()[:, 0]
        sets, labels = sets.subset(numbers), labels[numbers]
        if not len(numbers):
            raise ValueError("tagood.untagged=reject: no training image has a tag; try keep, or a lower tag_threshold")
    if row == "mean":
        encoder, centres = MeanToken(), class_means(MeanToken(), sets, labels, num_classes)
    else:
        settings_of_fit = replace(settings, centre_weight=0.0) if row == "CE" else settings
        arguments = sets, labels, num_classes, settings_of_fit
        fitted = stored_tagood(folder, *arguments) if folder else fit_tagood(*arguments)
        encoder, centres = fitted
        if row == "CE":  # its own centres move slowly and have not drawn the features near
            centres = class_means(encoder, sets, labels, num_classes, settings.groups)
    score = TagScore(settings, encoder, centres[labels.unique().to(centres.device)], whole=row == "image")
    score.fit = None if row == "mean" else (*arguments, fitted)
    return score


def token_columns(tags: Tags, settings: TagoodConfig) -> Columns:
    """What is kept of training images, for `open_tokens`: the columns of B images. Raises ValueError if too large."""
    tokens, mask = select_tokens(*tags[:2], settings.attention_threshold, settings.max_tokens + 1)
    columns = {"tokens": tokens[mask].half(), "count": mask.sum(dim=1), "image": tags.tokens[:, 0].half()}
    if not all(columns[name].isfinite().all() for name in ("tokens", "image")):
        raise ValueError("tagood: tokens beyond 65504, the largest number of float16, in which they are kept")
    return columns | {"tagged": tags.tagged}


def open_tokens(parts: Sequence[Columns], device: torch.device) -> TrainingTokens:
    """The training tokens whose `token_columns` are these, part by part. Raises ValueError for damaged ones."""
    values, image = (open_rows([part[name] for part in parts], device) for name in ("tokens", "image"))
    counts, tagged = (torch.cat([part[name] for part in parts]).cpu() for name in ("count", "tagged"))
    if not (len(counts) == len(tagged) == len(image) and int(counts.sum()) == len(values) and counts.min() > 0):
        raise ValueError(f"tokens of {len(image)} images: the stored columns do not fit each other; they are damaged")
    return TrainingTokens(RaggedRows(values, counts), image, tagged)


def training_tokens(config: Config, tagger: Tagger, images: ImageSet) -> TrainingTokens:
    """The tokens of readable training images, from a pass over them or from features.dir.

    Raises ValueError where an image can no longer be read, and as the tagger does.
    """
    settings = config.tagood
    most = len(images) * (settings.max_tokens + 2) * tagger.dim * 2
    log.info("%s: tokens of %d images take %.2f GB at most", images.name, len(images), most / 1e9)
    kept = {"attention_threshold": settings.attention_threshold, "max_tokens": settings.max_tokens, "holds": "tokens"}
    parts = _columns(config, tagger, images, kept, lambda tags: token_columns(tags, settings))
    return open_tokens(parts, choose_device(config.run.device))


def tag_scores(
    config: Config, tagger: Tagger, images: ImageSet, scores: dict[str, TagScore]
) -> tuple[dict[str, np.ndarray], KeptPlaces | None]:
    """Scores [N] by name of the N readable images of a set, and the places of their tokens, which are not kept.

    There are no places for a tagger without a square grid of patches. Logs this, and the share without a tag.

    Raises ValueError where an image can no longer be read, and as the tagger does.
    """
    settings = config.tagood
    depends_on = {key: getattr(settings, key) for key in ("attention_threshold", "max_tokens", "score", "untagged")}
    depends_on |= {name: [weights_hash(score), score.whole] for name, score in sorted(scores.items())}
    depends_on["holds"] = "scores and places"

    def encode(tags: Tags) -> Columns:
        kept = kept_places(tags.attention, settings.attention_threshold, settings.max_tokens + 1)
        return {name: score(tags) for name, score in scores.items()} | {"tagged": tags.tagged, "kept": kept[:, 1:]}

    parts = _columns(config, tagger, images, depends_on, encode)
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0] if name != "skipped"}
    kept, tagged = columns.pop("kept"), columns.pop("tagged")
    untagged = 1 - tagged.mean()
    many = settings.untagged == "reject" and untagged > _MANY_UNTAGGED
    hint = "; where these are ID images, FPR95 is that of a tie" if many else ""
    log.info("%s: %.2f %% of %d images have no tag%s", images.name, 100 * untagged, len(images), hint)
    patches, side = kept.shape[1], math.isqrt(kept.shape[1])
    if not patches or side**2 != patches:
        log.info("%s: the %d patches of the tagger are no square grid, so no figure shows them", images.name, patches)
        return columns, None
    return columns, KeptPlaces(kept.reshape(-1, side, side), tagged, tagger.preprocess)


def _columns(
    config: Config, tagger: Tagger, images: ImageSet, depends_on: dict[str, Any], encode: Callable[[Tags], Columns]
) -> list[Columns]:
    """The columns that `encode` makes of the tags of an image set, by part, from a pass over it or from features.dir.

    depends_on: all that `encode` depends on.
    """
    device = choose_device(config.run.device)

    def encode_batch(batch: Columns) -> Columns:
        pixels = batch["image"].to(device, non_blocking=True)
        with autocast(device, config.eval.precision):
            return encode(tag(tagger, pixels))

    manifest = image_manifest(config, images, tagger.preprocess) | {"tagger": tagger.identity} | depends_on
    store = FeatureStore(store_folder(config, "tokens", manifest), manifest)
    readable, parts = encode_images(config, store, images, tagger.preprocess, encode_batch)
    if len(readable) < len(images):
        raise ValueError(f"image set {images.name!r}: {readable.left_out[0]} can no longer be read; run it again")
    return parts
