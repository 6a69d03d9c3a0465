"""Adversarial versions of OOD images, and every score of them: clean, with float pixels, and as 8-bit PNG files."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipn.config.schema import Config
from clipn.data.image_sets import ImageFiles, ImageSet, unreadable
from clipn.data.images import PIXELS_SUFFIX, normalise, val_transform
from clipn.evaluation.evaluate import Sets, check_evaluation, evaluate, open_models, open_sets
from clipn.features.image_sets import files_hash, image_set_features
from clipn.features.store import Columns, Encode, FeatureStore
from clipn.methods.adversarial import perturb
from clipn.model.clipn import CLIPN
from clipn.model.hashing import weights_hash
from clipn.runtime.files import atomic_write
from clipn.runtime.random import stream

log = logging.getLogger(__name__)

VERSIONS = {"clean": ".png", "float": PIXELS_SUFFIX, "png": ".png"}  # the folders of an OOD set, and their files
_BANKS = ("1NN", "kNN")  # methods that compare an image with each training image
_FEW = 20  # of fewer images, metrics are rough


class AdversarialSet(NamedTuple):
    """An OOD set's N images in each of VERSIONS, in the same order."""

    name: str
    versions: dict[str, ImageSet]
    targets: list[Path]  # [N], the ID image that each was moved towards
    cosines: dict[str, Tensor]  # by version: [N], to the target
    change: Tensor  # [N], mean absolute change of a pixel, in levels of 0..255


def evaluate_adversarial(config: Config) -> tuple[pd.DataFrame, list[AdversarialSet]]:
    """Perturb images of each set of eval.ood towards ID training images, and evaluate eval.methods on them.

    The image tower is that of the first checkpoint. The images are written to run.dir/adversarial/<set>; the same call
    resumes. Under many ranks each perturbs a share.

    Returns a row of results (fractions) per OOD set, version ("pixels"), method and checkpoint, and the OOD sets. 1NN
    and kNN have a second row, for which the targets are not among the training images.

    Raises what `evaluate` raises; ValueError also without eval.train, for too few images in it, and where the folder
    holds images of other settings.
    """
    if not config.eval.train:
        raise ValueError("eval.train: names no ID training images, towards which OOD images are moved")
    check_evaluation(config)
    sets = open_sets(config.eval, train=True, seed=config.run.seed)
    banks = [name for name in _BANKS if name in config.eval.methods]
    targets = _draw(config, sets.train, "targets")
    if banks and len(targets) == len(sets.train):
        expected = f"fewer than the {len(targets)} images of eval.train: {banks[0]} needs others than the targets"
        raise ValueError(f"adversarial.images={config.adversarial.images}: expected {expected}")
    model, _ = next(open_models(config))
    targets, features, _ = next(image_set_features(config, model, [targets]))
    made = [_make_set(config, model, _draw(config, ood, "OOD"), targets, features) for ood in sets.ood]
    del model
    return _evaluate_versions(config, sets, made, banks, set(targets.paths)), made


def _evaluate_versions(
    config: Config, sets: Sets, made: list[AdversarialSet], banks: list[str], targets: set[Path]
) -> pd.DataFrame:
    """The results of every version of the OOD sets; of `banks` also without the targets."""
    versions = {images.name: (of.name, pixels) for of in made for pixels, images in of.versions.items()}
    ood = [images for of in made for images in of.versions.values()]
    sets = Sets(_draw(config, sets.id, "ID"), ood, sets.train)
    for name, count in [(sets.id.name, len(sets.id)), *((of.name, len(of.targets)) for of in made)]:
        if count < _FEW:
            log.warning("%s: only %d images: AUROC and FPR95 are rough", name, count)
    results = evaluate(config, sets).results
    if banks:
        without = evaluate(replace(config, eval=replace(config.eval, methods=banks)), sets, unused=targets).results
        results = pd.concat([results, without.assign(method=without["method"] + " without targets")])
    names, pixels = zip(*results["ood_set"].map(versions), strict=True)
    results = results.assign(ood_set=names)
    results.insert(2, "pixels", pixels)
    return results.reset_index(drop=True)


def _draw(config: Config, images: ImageSet, purpose: str) -> ImageSet:
    """At most adversarial.images of a set, in random order."""
    order = stream(f"adversarial {purpose}", config.adversarial.seed).permutation(len(images))
    return images.only(order[: config.adversarial.images].tolist())


def _make_set(config: Config, model: CLIPN, images: ImageSet, targets: ImageSet, features: Tensor) -> AdversarialSet:
    """Write the three versions of these OOD images; what is on disk stays. features: of the targets."""
    settings = config.adversarial
    folder = Path(config.run.dir) / "adversarial" / re.sub(r"[^\w.-]", "_", images.name)
    manifest = {
        "of": images.name,
        "model": model.architecture,
        "weights": weights_hash(model.base.visual),
        "preprocess": model.preprocess,
        "images": files_hash(images.paths),
        "targets": files_hash(targets.paths),
        "samples": len(images),
        "part_size": settings.batch_size,
        "adversarial": vars(settings),
    }
    store = FeatureStore(folder, manifest, "adversarial images", "run.dir")
    missing = store.missing()
    if missing:
        work = (images.name, sum(len(store.numbers(part)) for part in missing), settings.steps)
        log.info("%s: %d images to perturb, each encoded and differentiated %d times", *work)
        make = _make_batch(config, model, folder, features)
        store.fill(_Pixels(images.paths, model.preprocess), make, settings.batch_size, config.data.workers, images.name)
    _, parts = store.read()
    if not parts:
        raise unreadable(images)
    columns = {name: torch.cat([part[name] for part in parts]) for name in ("number", *VERSIONS, "change")}
    numbers = columns["number"].tolist()
    versions = {
        kind: ImageSet(f"{images.name} {kind}", folder / kind, [_file(folder, kind, n) for n in numbers], [], [])
        for kind in VERSIONS
    }
    of_images = [targets.paths[number % len(targets)] for number in numbers]
    cosines = {kind: columns[kind] for kind in VERSIONS}
    return AdversarialSet(images.name, versions, of_images, cosines, columns["change"])


def _make_batch(config: Config, model: CLIPN, folder: Path, features: Tensor) -> Encode:
    """A batch of OOD images -> the files of its versions, and the cosines to the targets and the changes as columns."""
    settings, to_input = config.adversarial, normalise(model.preprocess)
    device = model.logit_scale.device

    def encode(pixels: Tensor) -> Tensor:
        return model.encode_image(to_input(pixels))

    def make(batch: Columns) -> Columns:
        clean, numbers = batch["image"].to(device), batch["number"]
        targets = features[numbers % len(features)].to(device)
        seed = int(stream("adversarial noise", settings.seed, numbers[0]).integers(2**31))
        moved = perturb(encode, clean, targets, settings.steps, settings.lr, settings.smoothness, seed)
        versions = {"clean": clean, "float": moved, "png": (255 * moved).round() / 255}
        for kind, pixels in versions.items():
            for number, image in zip(numbers.tolist(), pixels.cpu().numpy(), strict=True):
                _write(_file(folder, kind, number), image)
        cosines = {kind: (encode(pixels) * targets).sum(dim=1) for kind, pixels in versions.items()}
        return {"number": numbers, **cosines, "change": 255 * (moved - clean).abs().mean(dim=(1, 2, 3))}

    return make


class _Pixels(Dataset):
    """index -> {"image": [3, H, W] in 0..1, resized and cropped for the model, "number": index}, or a cause."""

    def __init__(self, paths: list[Path], preprocess: dict) -> None:
        self.files = ImageFiles(paths, val_transform(preprocess | {"mean": (0.0,) * 3, "std": (1.0,) * 3}))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict | int:
        sample = self.files[index]
        return sample if isinstance(sample, int) else sample | {"number": index}


def _file(folder: Path, kind: str, number: int) -> Path:
    return folder / kind / f"{number:05d}{VERSIONS[kind]}"


def _write(path: Path, pixels: np.ndarray) -> None:
    """Write pixels [3, H, W] in 0..1: as they are, or in 8 bits where the file is a PNG."""
    with atomic_write(path) as file:
        if path.suffix == PIXELS_SUFFIX:
            np.save(file, pixels)
        else:
            levels = (255 * pixels).round().astype(np.uint8)
            Image.fromarray(levels.transpose(1, 2, 0)).save(file, "PNG")
