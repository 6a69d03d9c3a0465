"""How ID accuracy and OOD detection go together over base CLIPs (TMLR 2024, arXiv 2303.05828).

Both are read from the image tower's output before its projection, as in the paper: the accuracy of a 20-NN classifier
of ID training images, and the AUROC of 1NN. So no class name, template or text tower has a part in them.
"""

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clipn.config.schema import Config
from clipn.evaluation.evaluate import Sets, matching_files, open_models, open_sets
from clipn.features.columns import Rows
from clipn.features.image_sets import image_set_features
from clipn.methods.neighbours import knn_classifier
from clipn.methods.probe_scores import nearest_cosine
from clipn.metrics import ood_metrics
from clipn.model.clipn import CLIPN
from clipn.model.hashing import weights_hash

AVERAGE = "average"  # the name of the rows with the mean over the OOD sets

_BASES = 3  # a line goes through any two points
_NEIGHBOURS, _TEMPERATURE = 20, 0.02
_ROWS = 1024  # images classified at once

log = logging.getLogger(__name__)


def correlate(config: Config) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The points and the fits: ID accuracy and AUROC of each checkpoint and OOD set, and lines through them.

    Points: checkpoint, id_set, ood_set, id_accuracy, AUROC, as fractions. Fits: see `fit_lines`. Each ends with the
    average over the OOD sets. A checkpoint with the image tower of an earlier one is left out. Writes only features.

    Raises ValueError for fewer than three different image towers and for image sets without class folders, and as
    `open_sets` and `open_models` do.
    """
    settings = config.eval
    files = matching_files(settings.checkpoints)
    _check_number(len(files))
    if not settings.train:
        raise ValueError("eval.train: names no in-distribution training images; 20-NN and 1-NN need them")
    sets = open_sets(settings, train=True, seed=config.run.seed)
    for key, images in (("id", sets.id), ("train", sets.train)):
        if not images.classes:
            raise ValueError(f"eval.{key}: 20-NN needs class folders, but {images.root} has none")
    if len(sets.train) < _NEIGHBOURS:
        log.warning("eval.train: %d images are fewer than %d neighbours: all vote", len(sets.train), _NEIGHBOURS)
    rows, seen = [], set()
    for file, (model, _) in zip(files, open_models(config), strict=True):
        tower = weights_hash(model.base.visual)
        if tower in seen:
            log.warning("%s is left out: its image tower is that of an earlier checkpoint", file)
            continue
        seen.add(tower)
        try:
            rows += [{"checkpoint": file, **row} for row in _measure(config, model, sets)]
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    _check_number(len(seen))
    points = pd.DataFrame(rows)
    return points, fit_lines(points)


def fit_lines(points: pd.DataFrame) -> pd.DataFrame:
    """Per OOD set: r_squared, the squared Pearson correlation, and the slope and intercept of the least-squares line.

    points: with ood_set, id_accuracy and AUROC; n is the number of points of a set. Where all accuracies or all AUROCs
    are equal there is no correlation: r_squared is NaN; without different accuracies, slope and intercept are too.
    """
    fits = []
    for name, of_set in points.groupby("ood_set", sort=False):
        x, y = of_set["id_accuracy"].to_numpy(), of_set["AUROC"].to_numpy()
        slope = intercept = r_squared = float("nan")
        if np.ptp(x):
            slope, intercept = np.polyfit(x, y, 1)
            r_squared = np.corrcoef(x, y)[0, 1] ** 2 if np.ptp(y) else r_squared
        row = {"ood_set": name, "r_squared": r_squared, "slope": slope, "intercept": intercept, "n": len(x)}
        fits.append(row)
    return pd.DataFrame(fits)


@torch.no_grad()
def _measure(config: Config, model: CLIPN, sets: Sets) -> list[dict]:
    """id_set, ood_set, id_accuracy and AUROC of one model, for each OOD set and their average."""
    features = image_set_features(config, model, [sets.train, sets.id, *sets.ood], tower=True)
    train, _, columns = next(features)
    bank = columns["tower"]
    score = nearest_cosine(bank)
    classify = knn_classifier(bank, torch.tensor(train.labels), len(train.classes), _NEIGHBOURS, _TEMPERATURE)

    def of_blocks(function: Callable[[Tensor], Tensor], tower: Rows) -> np.ndarray:
        blocks = [function(tower[start : start + _ROWS]) for start in range(0, len(tower), _ROWS)]
        return torch.cat(blocks).cpu().numpy()

    id_set, _, columns = next(features)
    accuracy = float((of_blocks(classify, columns["tower"]) == id_set.labels).mean())
    id_scores = of_blocks(score, columns["tower"])
    aurocs = {
        images.name: ood_metrics(id_scores, of_blocks(score, columns["tower"]))["AUROC"]
        for images, _, columns in features
    }
    aurocs[AVERAGE] = float(np.mean(list(aurocs.values())))
    names = {"id_set": id_set.name, "id_accuracy": accuracy}
    return [names | {"ood_set": name, "AUROC": auroc} for name, auroc in aurocs.items()]


def _check_number(checkpoints: int) -> None:
    if checkpoints < _BASES:
        need = f"a correlation needs at least {_BASES} checkpoints with different image towers"
        raise ValueError(f"eval.checkpoints: found {checkpoints}; {need}")
