"""What an evaluation returns: scores of each image set, and tables of metrics and decisions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from clipn.data.image_sets import ImageSet
from clipn.methods.tokens import KeptPlaces
from clipn.metrics import ood_metrics

RESULT_COLUMNS = ["id_set", "ood_set", "method", "AUROC", "FPR95", "AUPR_IN", "AUPR_OUT", "id_accuracy", "seed"]


@dataclass(frozen=True)
class SetScores:
    """One model's outputs for the N readable images of one image set."""

    images: ImageSet
    scores: dict[str, np.ndarray]  # by method: [N], higher means ID; log odds for a method of BY_LOG_ODDS
    says_ood: dict[str, np.ndarray]  # by threshold-free decision: [N] bool
    predicted: np.ndarray  # [N] class indices
    p_yes: np.ndarray  # [N], of the predicted class
    predictions: dict[str, np.ndarray] = field(default_factory=dict)  # of methods with a classifier of their own
    places: KeptPlaces | None = None  # of TagOOD's tokens


class Evaluation(NamedTuple):
    """The results of checkpoints: tables of fractions with a row per OOD set, method or decision, and checkpoint."""

    results: pd.DataFrame  # RESULT_COLUMNS
    decisions: pd.DataFrame
    set_scores: dict[str, SetScores]  # by image set, the ID set first; of the first checkpoint
    class_names: list[str]
    weights_sha256: tuple[str, ...] = ()  # of each checkpoint's model, in the order of the rows


def join(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of several runs as one; the scores are those of the first."""
    results, decisions = (pd.concat([e[part] for e in evaluations], ignore_index=True) for part in (0, 1))
    weights = sum((evaluation.weights_sha256 for evaluation in evaluations), ())
    return evaluations[0]._replace(results=results, decisions=decisions, weights_sha256=weights)


def result_rows(set_scores: dict[str, SetScores], seed: int) -> list[dict]:
    """RESULT_COLUMNS for each OOD set and method. Raises ValueError for scores that are not finite."""
    id_set, *ood_sets = set_scores.values()
    labels = id_set.images.labels
    rows = []
    for ood_set in ood_sets:
        for method, id_scores in id_set.scores.items():
            names = {"id_set": id_set.images.name, "ood_set": ood_set.images.name, "method": method}
            try:
                metrics = ood_metrics(id_scores, ood_set.scores[method])
            except ValueError as error:
                raise ValueError(f"{method} of {names['id_set']} and {names['ood_set']}: {error}") from error
            predicted = id_set.predictions.get(method, id_set.predicted)
            accuracy = float((predicted == labels).mean()) if labels else float("nan")
            rows.append(names | {"id_accuracy": accuracy, "seed": seed} | metrics)
    return rows


def decision_rows(set_scores: dict[str, SetScores], seed: int) -> list[dict]:
    """For each OOD set and threshold-free decision: shares of ID kept and lost, of OOD found and missed, and accuracy.

    `accuracy` has two classes, ID and OOD; `open_accuracy` has C + 1, the ID classes and OOD.
    """
    id_set, *ood_sets = set_scores.values()
    labels = np.array(id_set.images.labels or [-1] * len(id_set.images))
    rows = []
    for ood_set in ood_sets:
        for decision, id_rejected in id_set.says_ood.items():
            kept, rejected = ~id_rejected, ood_set.says_ood[decision]
            correct = np.concatenate([kept & (id_set.predicted == labels), rejected])
            shares = {"id_kept": kept.mean(), "ood_found": rejected.mean()}
            shares |= {"id_lost": 1 - shares["id_kept"], "ood_missed": 1 - shares["ood_found"]}
            shares["accuracy"] = np.concatenate([kept, rejected]).mean()
            shares["open_accuracy"] = correct.mean() if id_set.images.labels else float("nan")
            names = {"id_set": id_set.images.name, "ood_set": ood_set.images.name, "decision": decision}
            rows.append(names | {key: float(value) for key, value in shares.items()} | {"seed": seed})
    return rows
