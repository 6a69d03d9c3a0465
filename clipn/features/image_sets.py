"""Features of image sets from the frozen image tower, computed once and kept on disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipn.config.schema import Config
from clipn.data.image_sets import UNREAD, ImageFiles, ImageSet
from clipn.data.images import val_transform
from clipn.features.store import FeatureStore, _hash, autocast, weights_hash
from clipn.model.clipn import CLIPN
from clipn.runtime.distributed import barrier, is_main


def image_set_features(
    config: Config,
    model: CLIPN,
    image_sets: Sequence[ImageSet],
    scores: dict[str, Callable[[Tensor], Tensor]] | None = None,
    scores_of: str = "",
) -> Iterator[tuple[ImageSet, Tensor, dict[str, Tensor]]]:
    """One pass over each image set, or none where features.dir has what is asked for.

    scores: by name, [B, 3, H, W] -> [B], taken of the images in the same pass; scores_of says what else they depend on.
    Yields each set without its unreadable images, and for the others a row each, on the CPU: features [N, D] float32,
    L2-normalised, and scores [N]. Under many ranks each encodes a share, and all get the whole.
    """
    settings, device, scores = config.eval, model.logit_scale.device, scores or {}
    weights = weights_hash(model.base.visual)

    def encode(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = batch["image"].to(device, non_blocking=True)
        with autocast(device, settings.precision):
            return {"image": model.encode_image(pixels)} | {name: score(pixels) for name, score in scores.items()}

    for images in image_sets:
        store = _image_store(config, model, images, weights, [*sorted(scores), scores_of] if scores else [])
        if store.missing():
            dataset = ImageFiles(images.paths, val_transform(model.preprocess))
            store.fill(dataset, encode, settings.batch_size, config.data.workers, images.name)
        parts = [store.read(part) for part in range(len(store))]
        skipped, causes = torch.cat([part["skipped"] for part in parts]).T.tolist()
        if len(skipped) == len(images):
            raise ValueError(
                f"image set {images.name!r}: none of the {len(images)} images in {images.root} is readable"
            )
        parts = [part for part in parts if "image" in part]
        found = {name: torch.cat([part[name] for part in parts]) for name in ("image", *scores)}
        barrier()
        if (not settings.keep_features or UNREAD in causes) and is_main():  # another time they may be readable
            shutil.rmtree(store.folder)
        yield images.without(skipped), found.pop("image"), found


def _image_store(config: Config, model: CLIPN, images: ImageSet, weights: str, scores: list[str]) -> FeatureStore:
    manifest = {
        "of": images.name,
        "model": model.architecture,  # the same weights mean another thing with another activation
        "weights": weights,
        "preprocess": model.preprocess,
        "precision": config.eval.precision,
        "images": _hash([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in images.paths]),
        "samples": len(images),
        "part_size": config.features.part_size,
        "scores": scores,
    }
    name = re.sub(r"[^\w.-]", "_", images.name)
    return FeatureStore(Path(config.features.dir) / "images" / f"{name}-{_hash(manifest)[:12]}", manifest)
