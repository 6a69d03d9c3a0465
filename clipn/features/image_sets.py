"""Features of image sets from the frozen image tower, computed once and kept on disk."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipn.config.schema import Config
from clipn.data.image_sets import UNREAD, ImageFiles, ImageSet, unreadable
from clipn.data.images import normalise, val_transform
from clipn.features.columns import Rows, open_rows
from clipn.features.store import Columns, Encode, FeatureStore
from clipn.model.clipn import CLIPN
from clipn.model.hashing import weights_hash
from clipn.model.precision import autocast
from clipn.runtime.distributed import barrier, gather_values, is_main


def image_set_features(
    config: Config,
    model: CLIPN,
    image_sets: Sequence[ImageSet],
    scores: dict[str, Callable[[Tensor], Tensor]] | None = None,
    scores_of: str = "",
    tower: bool = False,
) -> Iterator[tuple[ImageSet, Tensor, dict[str, Rows]]]:
    """Encode each image set in one pass, or read its features where features.dir has them.

    scores: functions of images, [B, 3, H, W] -> [B] by name, computed in the same pass. scores_of: everything else that
        they depend on (head, scale, constants); another value computes them again.
    tower: also keep the image tower's output, in features.dtype. Stores without it stay valid for all other methods.
    Yields each set without its unreadable images and, for the N readable ones, features [N, D] float32, L2-normalised,
    and scores [N] by name, on the CPU, with `tower` also "tower" [N, W], a tensor on the device or mapped rows. Under
    many ranks each encodes a share, and every rank yields all.

    Raises ValueError for a set without readable images.
    """
    settings, device, scores = config.eval, model.logit_scale.device, scores or {}
    weights = weights_hash(model.base.visual)

    def encode(batch: Columns) -> Columns:
        pixels = batch["image"].to(device, non_blocking=True)
        with autocast(device, settings.precision):
            if "tower" in store.manifest:
                image, output = model.encode_image_with_tower(pixels)
                columns = {"image": image, "tower": output.to(getattr(torch, store.manifest["tower"]))}
            else:
                columns = {"image": model.encode_image(pixels)}
            return columns | {name: score(pixels) for name, score in scores.items()}

    for images in image_sets:
        store = _open_store(config, model, images, weights, [*sorted(scores), scores_of] if scores else [], tower)
        readable, parts = encode_images(config, store, images, model.preprocess, encode)
        columns = {name: torch.cat([part.pop(name) for part in parts]) for name in ("image", *scores)}
        if tower:
            columns["tower"] = open_rows([part["tower"] for part in parts], device)
        yield readable, columns.pop("image"), columns


def encode_images(
    config: Config, store: FeatureStore, images: ImageSet, preprocess: dict[str, Any], encode: Encode
) -> tuple[ImageSet, list[Columns]]:
    """The readable images of a set, and the columns of its store by part; missing parts are encoded in one pass.

    preprocess: of the images, in open_clip's words. Raises ValueError for a set without readable images.
    """
    settings = config.eval
    if store.missing():
        dataset = ImageFiles(images.paths, val_transform(preprocess), normalise(preprocess))
        store.fill(dataset, encode, settings.batch_size, config.data.workers, images.name)
    rows, parts = store.read()
    skipped, causes = rows.T.tolist()
    if not parts:
        raise unreadable(images)
    barrier()
    if (not settings.keep_features or UNREAD in causes) and is_main():  # an unread file may be readable later
        shutil.rmtree(store.folder)
    return images.without(skipped), parts


def _open_store(
    config: Config, model: CLIPN, images: ImageSet, weights: str, scores: list[str], tower: bool
) -> FeatureStore:
    """The store of one image set; any number of them coexist.

    A store with the tower's output also serves methods that do not ask for it.
    """
    manifest = image_manifest(config, images, model.preprocess) | {
        "model": model.architecture,  # with another activation, the same weights give other features
        "weights": weights,
        "scores": scores,
    }
    with_tower = manifest | {"tower": config.features.dtype}
    plain, complete = (store_folder(config, "images", of) for of in (manifest, with_tower))
    use_tower = gather_values(tower or (complete.is_dir() and not plain.is_dir()))[0]
    return FeatureStore(complete, with_tower) if use_tower else FeatureStore(plain, manifest)


def image_manifest(config: Config, images: ImageSet, preprocess: dict[str, Any]) -> dict[str, Any]:
    """What all stores of an image set depend on."""
    return {
        "of": images.name,
        "preprocess": preprocess,
        "precision": config.eval.precision,
        "images": files_hash(images.paths),
        "samples": len(images),
        "part_size": config.features.part_size,
    }


def store_folder(config: Config, kind: str, manifest: dict[str, Any]) -> Path:
    """The folder in features.dir/kind of a store of an image set: its name has a hash of the manifest."""
    name = re.sub(r"[^\w.-]", "_", manifest["of"])
    return Path(config.features.dir) / kind / f"{name}-{_json_hash(manifest)[:12]}"


def files_hash(paths: Sequence[Path]) -> str:
    """A hash of the names, sizes and times of files, in this order."""
    return _json_hash([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths])


def _json_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
