"""What an evaluation returns: scores of each image set, and tables of metrics and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from clipn.data.image_sets import ImageSet
from clipn.metrics import ood_metrics
from clipn.scores import DECISIONS

RESULT_COLUMNS = ["id_set", "ood_set", "method", "AUROC", "FPR95", "AUPR_IN", "AUPR_OUT", "id_accuracy", "seed"]


@dataclass(frozen=True)
class SetScores:
    """What one model says of the N readable images of one image set."""

    images: ImageSet
    scores: dict[str, np.ndarray]  # by method: [N], higher means ID
    says_ood: dict[str, np.ndarray]  # by threshold-free decision: [N] bool
    predicted: np.ndarray  # [N] class indices
    p_yes: np.ndarray  # [N], of the predicted class


class Evaluation(NamedTuple):
    """What an evaluation found. The tables hold fractions: one row per OOD set, method or decision, and checkpoint."""

    results: pd.DataFrame  # RESULT_COLUMNS
    decisions: pd.DataFrame
    found: dict[str, SetScores]  # by set, the ID set first, of the first checkpoint
    class_names: list[str]


def join(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several runs' evaluations as one; the pictures are of the first."""
    results, decisions = (pd.concat([e[part] for e in evaluations], ignore_index=True) for part in (0, 1))
    return evaluations[0]._replace(results=results, decisions=decisions)


def result_rows(
    id_set: ImageSet, ood_sets: Sequence[ImageSet], found: dict[str, SetScores], methods: Sequence[str], seed: int
) -> list[dict]:
    inside = found[id_set.name]
    labels = inside.images.labels
    accuracy = float((inside.predicted == labels).mean()) if labels else float("nan")
    rows = []
    for ood in ood_sets:
        for method in methods:
            try:
                found_metrics = ood_metrics(inside.scores[method], found[ood.name].scores[method])
            except ValueError as error:
                raise ValueError(f"{method} of {id_set.name} and {ood.name}: {error}") from error
            names = {"id_set": id_set.name, "ood_set": ood.name, "method": method}
            rows.append(names | {"id_accuracy": accuracy, "seed": seed} | found_metrics)
    return rows


def decision_rows(id_set: ImageSet, ood_sets: Sequence[ImageSet], found: dict[str, SetScores], seed: int) -> list[dict]:
    """The threshold-free decisions: shares of ID kept and lost, of OOD found and missed, and of both judged rightly.

    open_accuracy is that of the classes and "none of them" as C + 1 answers.
    """
    rows, inside = [], found[id_set.name]
    labels = np.array(inside.images.labels or [-1] * len(inside.images))
    for ood in ood_sets:
        for name in DECISIONS:
            kept, told = ~inside.says_ood[name], found[ood.name].says_ood[name]
            shares = {
                "id_kept": kept.mean(),
                "ood_found": told.mean(),
                "id_lost": 1 - kept.mean(),
                "ood_missed": 1 - told.mean(),
                "accuracy": np.concatenate([kept, told]).mean(),
                "open_accuracy": np.concatenate([kept & (inside.predicted == labels), told]).mean(),
            }
            if not inside.images.labels:
                shares["open_accuracy"] = float("nan")
            shares = {key: float(value) for key, value in shares.items()}
            rows.append({"id_set": id_set.name, "ood_set": ood.name, "decision": name, **shares, "seed": seed})
    return rows
