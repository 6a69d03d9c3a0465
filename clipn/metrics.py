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
