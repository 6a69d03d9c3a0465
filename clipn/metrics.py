"""How well a score parts ID from OOD. ID is the positive class and has the higher scores."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


def ood_metrics(id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
    """AUROC, FPR95, AUPR_IN and AUPR_OUT as fractions, from [N] ID and [M] OOD scores.

    FPR95 is the false positive rate where the ROC curve, linearly interpolated, reaches 95 % of ID; of a stretch at
    exactly 95 %, its end with the most OOD, as in the published code.
    (With OOD as the positive class, as some libraries have it, FPR95 is another number.) AUPR is the average
    precision, with ID (IN) or OOD (OUT) as positive.

    Raises ValueError for an empty side or for scores that are not finite.
    """
    id_scores, ood_scores = _checked(id_scores, "id_scores"), _checked(ood_scores, "ood_scores")
    scores = np.concatenate([id_scores, ood_scores])
    is_id = np.concatenate([np.ones(len(id_scores)), np.zeros(len(ood_scores))])
    return {
        "AUROC": float(roc_auc_score(is_id, scores)),
        "FPR95": _fpr_at_tpr(is_id, scores, 0.95),
        "AUPR_IN": float(average_precision_score(is_id, scores)),
        "AUPR_OUT": float(average_precision_score(1 - is_id, -scores)),
    }


def bootstrap_interval(
    id_scores: np.ndarray, ood_scores: np.ndarray, metric: str, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Where a metric of `ood_metrics` lies if other images of the same kinds were judged: its percentile bootstrap.

    Each draw takes as many ID and OOD images again, with replacement; `level` of the draws lie in the interval. It
    tells of the choice of images alone, not of the training.

    Raises ValueError for an unknown metric, no draws, an empty side or scores that are not finite.
    """
    if metric not in _METRIC_OF_COUNTS:
        raise ValueError(f"metric={metric!r}: expected one of {', '.join(_METRIC_OF_COUNTS)}")
    if draws < 1:
        raise ValueError(f"draws={draws}: expected at least 1")
    id_scores, ood_scores = _checked(id_scores, "id_scores"), _checked(ood_scores, "ood_scores")
    distinct, places = np.unique(-np.concatenate([id_scores, ood_scores]), return_inverse=True)  # from sure to unsure
    rng = np.random.default_rng(seed)

    def drawn(of: np.ndarray) -> np.ndarray:
        """How many of as many images, drawn again, have each distinct score."""
        return np.bincount(of[rng.integers(len(of), size=len(of))], minlength=len(distinct))

    inside, outside = np.split(places, [len(id_scores)])
    values = [_METRIC_OF_COUNTS[metric](drawn(inside), drawn(outside)) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _auroc_of(id_counts: np.ndarray, ood_counts: np.ndarray) -> float:
    beaten = ood_counts.sum() - ood_counts.cumsum() + ood_counts / 2
    return float((id_counts * beaten).sum() / (id_counts.sum() * ood_counts.sum()))


def _fpr95_of(id_counts: np.ndarray, ood_counts: np.ndarray) -> float:
    tpr, fpr = (np.concatenate([[0], counts.cumsum() / counts.sum()]) for counts in (id_counts, ood_counts))
    return float(np.interp(0.95, tpr, fpr))


def _precision_of(positive: np.ndarray, negative: np.ndarray) -> float:
    found = positive.cumsum()
    return float(positive @ (found / np.maximum(found + negative.cumsum(), 1)) / positive.sum())


# Each metric from the numbers of ID and of OOD images at every distinct score, the highest score first.
_METRIC_OF_COUNTS = {
    "AUROC": _auroc_of,
    "FPR95": _fpr95_of,
    "AUPR_IN": _precision_of,
    "AUPR_OUT": lambda id_counts, ood_counts: _precision_of(ood_counts[::-1], id_counts[::-1]),
}


def _fpr_at_tpr(positive: np.ndarray, scores: np.ndarray, level: float) -> float:
    fpr, tpr, _ = roc_curve(positive, scores)
    return float(np.interp(level, tpr, fpr))  # of several points at exactly this level, the one with the most OOD


def _checked(scores: np.ndarray, name: str) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64).ravel()
    if not len(scores):
        raise ValueError(f"{name}: empty; both ID and OOD scores are needed")
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {len(scores)} scores are NaN or infinite")
    return scores
