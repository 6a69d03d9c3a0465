"""Metrics of how well a score separates ID from OOD images. ID is the positive class and has the higher scores."""

import numpy as np


def ood_metrics(id_scores: np.ndarray, ood_scores: np.ndarray) -> dict[str, float]:
    """AUROC, FPR95, AUPR_IN and AUPR_OUT as fractions, from ID scores [N] and OOD scores [M].

    FPR95 is the false positive rate at which the linearly interpolated ROC curve reaches a true positive rate of 95 %;
    where several points have exactly 95 %, the highest one, as in the published code. With OOD as the positive class,
    as in some libraries, FPR95 is another number. AUPR is the average precision with ID (IN) or OOD (OUT) as positive.

    Raises ValueError for no scores on one side, and for scores that are not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # slow to import

    id_scores, ood_scores = _checked(id_scores, "id_scores"), _checked(ood_scores, "ood_scores")
    scores = np.concatenate([id_scores, ood_scores])
    is_id = np.arange(len(scores)) < len(id_scores)
    fpr, tpr, _ = roc_curve(is_id, scores)
    return {
        "AUROC": float(roc_auc_score(is_id, scores)),
        "FPR95": float(np.interp(0.95, tpr, fpr)),
        "AUPR_IN": float(average_precision_score(is_id, scores)),
        "AUPR_OUT": float(average_precision_score(~is_id, -scores)),
    }


def bootstrap_interval(
    id_scores: np.ndarray, ood_scores: np.ndarray, metric: str, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval (low, high) of a metric of `ood_metrics`, as fractions.

    Each draw resamples the N ID and M OOD images with replacement; `level` of the draws lie inside the interval. It
    covers the choice of images, not the randomness of training.

    Raises ValueError for an unknown metric, no draws, no scores on one side, and for scores that are not finite.
    """
    if metric not in _METRIC_OF_COUNTS:
        raise ValueError(f"metric={metric!r}: expected one of {', '.join(_METRIC_OF_COUNTS)}")
    if draws < 1:
        raise ValueError(f"draws={draws}: expected at least 1")
    id_scores, ood_scores = _checked(id_scores, "id_scores"), _checked(ood_scores, "ood_scores")
    distinct, ranks = np.unique(-np.concatenate([id_scores, ood_scores]), return_inverse=True)  # highest score first
    rng = np.random.default_rng(seed)

    def resample(ranks: np.ndarray) -> np.ndarray:
        """The number of resampled images at each distinct score."""
        return np.bincount(ranks[rng.integers(len(ranks), size=len(ranks))], minlength=len(distinct))

    id_ranks, ood_ranks = np.split(ranks, [len(id_scores)])
    values = [_METRIC_OF_COUNTS[metric](resample(id_ranks), resample(ood_ranks)) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _auroc(id_counts: np.ndarray, ood_counts: np.ndarray) -> float:
    lower_ood = ood_counts.sum() - ood_counts.cumsum() + ood_counts / 2
    return float(id_counts @ lower_ood / (id_counts.sum() * ood_counts.sum()))


def _fpr95(id_counts: np.ndarray, ood_counts: np.ndarray) -> float:
    tpr, fpr = (np.concatenate([[0], counts.cumsum() / counts.sum()]) for counts in (id_counts, ood_counts))
    return float(np.interp(0.95, tpr, fpr))


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    true_positives = positive.cumsum()
    precision = true_positives / np.maximum(true_positives + negative.cumsum(), 1)
    return float(positive @ precision / positive.sum())


# Each metric from the numbers of ID and of OOD images at every distinct score, highest score first.
_METRIC_OF_COUNTS = {
    "AUROC": _auroc,
    "FPR95": _fpr95,
    "AUPR_IN": _average_precision,
    "AUPR_OUT": lambda id_counts, ood_counts: _average_precision(ood_counts[::-1], id_counts[::-1]),
}


def _checked(scores: np.ndarray, name: str) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64).ravel()
    if not len(scores):
        raise ValueError(f"{name}: empty; both ID and OOD scores are needed")
    bad = np.sum(~np.isfinite(scores))
    if bad:
        raise ValueError(f"{name}: {bad} of {len(scores)} scores are NaN or infinite")
    return scores
