"""OOD scores fitted on the image features of in-distribution training images. A higher score means in-distribution.

A fit takes training features [M, D], L2-normalised, and returns a score: image features [B, D] -> [B], float32.
Covariances, their inverses and distances are computed in float64: float32 sums over a million images lose the smallest
variances first, and those become the largest numbers of an inverse.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipn.methods.neighbours import nearest
from clipn.runtime.console import shortened

Score = Callable[[Tensor], Tensor]

IMAGES_PER_NEIGHBOUR = 1000  # kNN takes the M / 1000-th neighbour, at least the first
REACT_PERCENTILE = 90.0  # of all numbers in the training features

_ROWS = 1024  # training images in a block of a sum
_NEGLIGIBLE = 1e-12  # variances below this share of the features' mean square are rounding errors


def fit_knn(features: Tensor) -> Score:
    """Negative distance to the k-th nearest training image (Sun et al., ICML 2022).

    k is M / IMAGES_PER_NEIGHBOUR, rounded, at least 1: the paper's for CIFAR-10 (50 of 50 000) and for ImageNet (1000,
    and 10 for a hundredth of it), but for CIFAR-100 the paper has 200.
    """
    _check_features(features, "kNN")
    k = max(1, round(len(features) / IMAGES_PER_NEIGHBOUR))

    def score(block: Tensor) -> Tensor:
        cosines, _ = nearest(block, features, k)
        return -(2 - 2 * cosines[:, -1]).clamp(min=0).sqrt()

    return _on_device(features, score)


def fit_mahalanobis(
    features: Tensor,
    labels: Tensor | None,
    num_classes: int,
    relative: bool = False,
    class_names: Sequence[str] | None = None,
) -> Score:
    """Negative squared Mahalanobis distance to the nearest class mean (Lee et al., NeurIPS 2018).

    All classes share one covariance. Only these features count: no other layers, no input perturbation.
    relative: RMD, which subtracts the score of one Gaussian of all images (Ren et al., 2021). class_names: in messages.
    Raises ValueError without labels [M], for a class without images, and for fewer than D + C images: the shared
    covariance then lacks some directions, and an outlier in such a direction would not be detected.
    """
    names = class_names or [f"number {number}" for number in range(num_classes)]
    _check_labels(features, labels, names, "RMD" if relative else "Mahalanobis")
    if relative and num_classes < 2:
        raise ValueError("RMD: one class, of which the relative distance is always 0; use Mahalanobis")
    labels = labels.to(features.device).long()
    means = features.new_zeros(num_classes, features.shape[1], dtype=torch.float64)
    # products, because index_add adds in any order on a GPU
    for block, block_labels in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        means += F.one_hot(block_labels, num_classes).double().T @ block.double()
    mean = means.sum(dim=0) / len(features)
    means /= torch.bincount(labels, minlength=num_classes)[:, None]
    whiten, whiten_all = _whitening(features, means, labels), _whitening(features, mean) if relative else None
    centres = (means - mean) @ whiten

    def score(block: Tensor) -> Tensor:
        centred = block.double() - mean
        points = centred @ whiten
        squares = points.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1) - 2 * points @ centres.T
        nearest = squares.clamp(min=0).amin(dim=1)
        return (centred @ whiten_all).square().sum(dim=1) - nearest if relative else -nearest

    return _on_device(features, score)


def principal_dim(width: int) -> int:
    """Dimensions of ViM's principal space: as in its code from a width of 768 on, half below, as in OpenOOD for 512."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


def fit_vim(features: Tensor, weights: Tensor, scale: float) -> Score:
    """Energy minus the virtual logit: alpha times the length of the residual (Wang et al., CVPR 2022).

    weights: of the classes, [C, D]. alpha is the absolute mean of the training images' largest logit over their mean
    residual; absolute, because a base with negative cosines must not flip the score. The paper's origin -pinv(W) b is
    0, since the logits have no bias b. Raises ValueError as `fit_residual` does.
    """
    residual, logits = _residual(features, "ViM"), _logits(weights.to(features.device), scale)
    largest = sum(float(logits(block).amax(dim=1).sum()) for block in features.split(_ROWS))
    alpha = abs(largest) / sum(float(residual(block).sum()) for block in features.split(_ROWS))
    return _on_device(features, lambda block: logits(block).logsumexp(dim=1) - alpha * residual(block))


def fit_residual(features: Tensor) -> Score:
    """Negative length of the part outside ViM's principal space (Wang et al., CVPR 2022).

    Raises ValueError for training images that span no more than that space.
    """
    residual = _residual(features, "Residual")
    return _on_device(features, lambda block: -residual(block))


def fit_react(features: Tensor, weights: Tensor, scale: float) -> Score:
    """Energy of features clipped from above at one number (Sun et al., NeurIPS 2021).

    The number is the REACT_PERCENTILE of all numbers in the training features, as in OpenOOD. ReAct was made for
    activations that are not negative: negative numbers stay, and clipped features are not normalised again.
    """
    _check_features(features, "ReAct")
    # numpy's, because torch.quantile takes no more than 16 million numbers
    limit = float(np.percentile(features.float().cpu().numpy(), REACT_PERCENTILE))
    logits = _logits(weights.to(features.device), scale)
    return _on_device(features, lambda block: logits(block.clamp(max=limit)).logsumexp(dim=1))


def _on_device(train: Tensor, score: Score) -> Score:
    """The score on the device of the training features, in float32."""
    return lambda features: score(features.to(train.device)).float()


def _logits(weights: Tensor, scale: float) -> Score:
    return lambda features: scale * features.float() @ weights.T


def _check_features(features: Tensor, method: str) -> None:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{method}: expected training features [M, D] of at least one image, got {[*features.shape]}")


def _check_labels(features: Tensor, labels: Tensor | None, names: Sequence[str], method: str) -> None:
    _check_features(features, method)
    (count, width), num_classes = features.shape, len(names)
    if labels is None:
        raise ValueError(f"{method}: the labels of the training images are missing")
    if labels.shape != (count,):
        raise ValueError(f"{method}: {count} training images, but labels of shape {[*labels.shape]}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{method}: labels from {labels.min()} to {labels.max()}; there are {num_classes} classes")
    empty = [names[number] for number in sorted(set(range(num_classes)) - set(labels.tolist()))]
    if empty:
        counts = f"{len(empty)} of {num_classes} classes have no training image"
        raise ValueError(f"{method}: {counts}: {shortened(empty)}")
    if count < width + num_classes:
        need = f"{num_classes} means and a covariance of {width} dimensions need at least {width + num_classes}"
        raise ValueError(f"{method}: {count} training images are too few: {need}")


def _principal_axes(features: Tensor, means: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Variances [D] about one mean [D] or each class's [C, D], the smallest first; their directions; which count."""
    covariance = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    square = 0.0
    for start in range(0, len(features), _ROWS):
        block = features[start : start + _ROWS].double()
        square += float(block.square().sum())
        centred = block - (means if labels is None else means[labels[start : start + _ROWS]])
        covariance += centred.T @ centred
    variances, directions = torch.linalg.eigh(covariance / len(features))
    return variances, directions, variances > _NEGLIGIBLE * (square / len(features))


def _whitening(features: Tensor, means: Tensor, labels: Tensor | None = None) -> Tensor:
    """[D, r]: squared lengths after it are Mahalanobis distances. Directions of negligible variance are left out."""
    variances, directions, varies = _principal_axes(features, means, labels)
    return directions[:, varies] / variances[varies].sqrt()


def _residual(features: Tensor, method: str) -> Score:
    """[b, D] -> [b]: the length of the part outside the principal space of the training features."""
    _check_features(features, method)
    _, directions, varies = _principal_axes(features, features.new_zeros(features.shape[1]))
    dim, rank = principal_dim(features.shape[1]), int(varies.sum())
    if rank <= dim:
        need = f"their features span {rank} dimensions, and must span more than the {dim} of the principal space"
        raise ValueError(f"{method}: the {len(features)} training images are too few or too alike: {need}")
    outside = directions[:, : features.shape[1] - dim]
    return lambda block: (block.double() @ outside).norm(dim=1)
