"""OOD scores fitted on the features of in-distribution training images. A higher score means in-distribution.

A fit takes features [M, D], L2-normalised, their labels [M] (only Mahalanobis and RMD read them; else they may be
None), the zero-shot head and its scale, and gives a score: image features [B, D] -> [B], float32. Nothing is drawn at
random. Covariances, their inverses and distances are in float64: an inverse makes the smallest variances the largest
numbers, and those are what float32 loses first in sums over a million images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipn.model.head import Head

Score = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor, Tensor | None, Head, float], Score]

IMAGES_PER_NEIGHBOUR = 1000  # kNN takes the M / 1000-th neighbour, at least the first
REACT_PERCENTILE = 90.0  # of all numbers in the training features

_ROWS = 1024  # images at once
_BANK = 65_536  # training images that a block of images is compared with at once
_NOTHING = 1e-12  # variances below this share of the features' mean square are rounding


def fit_knn(features: Tensor, labels: Tensor | None, head: Head, scale: float) -> Score:
    """Negative distance to the k-th nearest training image, all features normalised (Sun et al., ICML 2022).

    k grows with the number M of training images, M / IMAGES_PER_NEIGHBOUR, rounded, at least 1: about what the paper
    has for CIFAR-10 (50 of 50 000), ImageNet (1000) and a hundredth of it (10); for CIFAR-100 it has 200.
    """
    _check_features(features, "kNN")
    k = max(1, round(len(features) / IMAGES_PER_NEIGHBOUR))
    return _by_blocks(partial(_kth_distance, features, k), features.device)


def fit_mahalanobis(features: Tensor, labels: Tensor | None, head: Head, scale: float) -> Score:
    """Negative squared Mahalanobis distance to the nearest class mean (Lee et al., NeurIPS 2018).

    One covariance for all classes, on these features alone: no other layers, no input perturbation. Raises ValueError
    as RMD does.
    """
    middle, whiten, centres = _class_gaussians(features, labels, head, "Mahalanobis")

    def score(block: Tensor) -> Tensor:
        return -_squared_distances((block.double() - middle) @ whiten, centres).amin(dim=1)

    return _by_blocks(score, features.device)


def fit_rmd(features: Tensor, labels: Tensor | None, head: Head, scale: float) -> Score:
    """Relative Mahalanobis (Ren et al., 2021): Mahalanobis' score less that of one Gaussian of all training images.

    Raises ValueError without labels, for a class without images, and for fewer than D + C images: then the shared
    covariance knows nothing of some directions, and an image that stands out there would not be noticed.
    """
    middle, whiten, centres = _class_gaussians(features, labels, head, "RMD")
    whiten_all = _whitening(_covariance(features, middle))

    def score(block: Tensor) -> Tensor:
        centred = block.double() - middle
        return (centred @ whiten_all).square().sum(dim=1) - _squared_distances(centred @ whiten, centres).amin(dim=1)

    return _by_blocks(score, features.device)


def principal_dim(width: int) -> int:
    """Dimensions of ViM's principal space for features of this width.

    1000 from 2048 on, else 512, as in the released code; where 512 would leave a third or less, half of the width,
    which is also OpenOOD's choice for 512 features.
    """
    if width >= 2048:
        return 1000
    return 512 if width >= 768 else width // 2


def fit_vim(features: Tensor, labels: Tensor | None, head: Head, scale: float) -> Score:
    """Energy less the virtual logit: alpha times the part outside the principal space (Wang et al., CVPR 2022).

    alpha is the training images' mean largest logit over their mean outer part (its size: a base whose cosines are
    negative must not turn the score round). The principal space is that of the features about the origin -pinv(W) b,
    which is 0: the zero-shot head has no bias b. Raises ValueError where training images do not fill that space.
    """
    outside = _outer_space(features, "ViM")
    tops, lengths = 0.0, 0.0
    for block in features.split(_ROWS):
        tops += float(_logits(block, head, scale).amax(dim=1).sum())
        lengths += float((block.double() @ outside).norm(dim=1).sum())
    alpha = abs(tops) / lengths

    def score(block: Tensor) -> Tensor:
        return _logits(block, head, scale).logsumexp(dim=1) - alpha * (block.double() @ outside).norm(dim=1)

    return _by_blocks(score, features.device)


def fit_residual(features: Tensor, labels: Tensor | None, head: Head, scale: float) -> Score:
    """Negative length of the part outside ViM's principal space (Wang et al., CVPR 2022).

    Raises ValueError as ViM does.
    """
    outside = _outer_space(features, "Residual")
    return _by_blocks(lambda block: -(block.double() @ outside).norm(dim=1), features.device)


def fit_react(features: Tensor, labels: Tensor | None, head: Head, scale: float) -> Score:
    """Energy of features clipped from above at one number (Sun et al., NeurIPS 2021).

    That number is the REACT_PERCENTILE of all numbers in the training features, as OpenOOD takes it. ReAct was made
    for activations that are not negative; an embedding's negative numbers are left as they are, and nothing is
    normalised again.
    """
    _check_features(features, "ReAct")
    # numpy's, for torch.quantile takes no more than 16 million numbers
    limit = float(np.percentile(features.float().cpu().numpy(), REACT_PERCENTILE))
    return _by_blocks(lambda block: _logits(block.clamp(max=limit), head, scale).logsumexp(dim=1), features.device)


FEATURE_SCORES: dict[str, Fit] = {
    "kNN": fit_knn,
    "Mahalanobis": fit_mahalanobis,
    "RMD": fit_rmd,
    "ViM": fit_vim,
    "Residual": fit_residual,
    "ReAct": fit_react,
}


def _by_blocks(score: Score, device: torch.device) -> Score:
    @torch.no_grad()
    def blockwise(features: Tensor) -> Tensor:
        return torch.cat([score(block.to(device)).float() for block in features.split(_ROWS)])

    return blockwise


def _check_features(features: Tensor, method: str) -> None:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{method}: expected training features [M, D] of at least one image, got {[*features.shape]}")


def _check_labels(features: Tensor, labels: Tensor | None, classes: int, method: str) -> Tensor:
    _check_features(features, method)
    if labels is None:
        raise ValueError(f"{method}: the training images' labels are missing")
    if labels.shape != (len(features),):
        raise ValueError(f"{method}: {len(features)} training images, but labels of shape {[*labels.shape]}")
    counts = torch.bincount(labels.clamp(min=0).cpu(), minlength=classes)
    if labels.min() < 0 or len(counts) > classes:
        raise ValueError(f"{method}: labels from {labels.min()} to {labels.max()}; there are {classes} classes")
    empty = (counts == 0).nonzero().squeeze(1).tolist()
    if empty:
        numbers = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise ValueError(f"{method}: {len(empty)} of {classes} classes have no training image: number {numbers}")
    least = features.shape[1] + classes
    if len(features) < least:
        raise ValueError(
            f"{method}: {len(features)} training images are too few: {classes} means and a covariance of "
            f"{features.shape[1]} dimensions need at least {least}"
        )
    return labels.to(features.device).long()


def _kth_distance(bank: Tensor, k: int, block: Tensor) -> Tensor:
    """Training features [M, D], k <= M, image features [b, D] -> [b], negative."""
    images = F.normalize(block.float(), dim=1)
    nearest = images.new_empty(len(images), 0)  # the k largest cosines so far
    for part in bank.split(_BANK):
        cosines = images @ F.normalize(part.float(), dim=1).T
        found = torch.cat([nearest, cosines.topk(min(k, len(part)), dim=1).values], dim=1)
        nearest = found.topk(min(k, found.shape[1]), dim=1).values
    return -(2 - 2 * nearest[:, -1]).clamp(min=0).sqrt()


def _class_gaussians(features: Tensor, labels: Tensor | None, head: Head, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of all [D], a whitening of the covariance within classes [D, r], and the whitened class means [C, r]."""
    classes = len(head.weight_yes)
    labels = _check_labels(features, labels, classes, method)
    means = features.new_zeros(classes, features.shape[1], dtype=torch.float64)
    # products, not index_add: that adds in any order on a GPU
    for block, its in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        means += F.one_hot(its, classes).double().T @ block.double()
    middle = means.sum(dim=0) / len(features)
    means /= torch.bincount(labels, minlength=classes)[:, None]
    whiten = _whitening(_covariance(features, means, labels))
    return middle, whiten, (means - middle) @ whiten


def _covariance(features: Tensor, means: Tensor, labels: Tensor | None = None) -> tuple[Tensor, float]:
    """[D, D] about one mean [D], or about each class's [C, D], and the mean squared length of the features."""
    covariance = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    square = 0.0
    for start in range(0, len(features), _ROWS):
        block = features[start : start + _ROWS].double()
        square += float(block.square().sum())
        centred = block - (means if labels is None else means[labels[start : start + _ROWS]])
        covariance += centred.T @ centred
    return covariance / len(features), square / len(features)


def _whitening(covariance_and_square: tuple[Tensor, float]) -> Tensor:
    """[D, r]: squared lengths after it are Mahalanobis distances, without directions in which nothing varies."""
    covariance, square = covariance_and_square
    variances, directions = torch.linalg.eigh(covariance)
    real = variances > _NOTHING * square
    return directions[:, real] / variances[real].sqrt()


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """[b, r] and [C, r] -> [b, C]."""
    lengths = points.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return (lengths - 2 * points @ centres.T).clamp(min=0)


def _outer_space(features: Tensor, method: str) -> Tensor:
    """[D, D - principal_dim]: an orthonormal basis of what is outside the principal space of the training features."""
    _check_features(features, method)
    width = features.shape[1]
    second_moment, square = _covariance(features, features.new_zeros(width))
    values, directions = torch.linalg.eigh(second_moment)  # the smallest first
    dim, rank = principal_dim(width), int((values > _NOTHING * square).sum())
    if rank <= dim:
        raise ValueError(
            f"{method}: the {len(features)} training images are too few or too alike: their features span {rank} "
            f"dimensions, and must span more than the {dim} of the principal space"
        )
    return directions[:, : width - dim]


def _logits(features: Tensor, head: Head, scale: float) -> Tensor:
    return scale * features.float() @ head.weight_yes.to(features.device).T
