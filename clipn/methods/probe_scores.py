"""Scores of a probe's logits, alone and with CLIPN, and of the image tower's outputs. Higher means in-distribution."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from clipn.features.columns import Rows
from clipn.methods.neighbours import nearest
from clipn.methods.probe import Probe
from clipn.scores import energy, mean_log_odds

_ROWS = 8192  # training images in a block of a sum
_SINGULAR = 1e-11  # a covariance with a smaller ratio of its variances is singular up to the rounding of the logits


def probe_ctw_log_odds(logits: Tensor, logits_yes: Tensor, logits_no: Tensor) -> Tensor:
    """Log odds [B] of CLIPN's p_yes of the class that the probe predicts: CTW with the probe's classifier."""
    return (logits_yes - logits_no).gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


def probe_atd_log_odds(logits: Tensor, logits_yes: Tensor, logits_no: Tensor) -> Tensor:
    """Log odds [B] of CLIPN's p_yes, averaged with the probe's class probabilities: ATD with the probe's classifier."""
    return mean_log_odds(logits.log_softmax(dim=1), logits_yes - logits_no)


def probe_energy_clipn(logits: Tensor, logits_yes: Tensor, logits_no: Tensor) -> Tensor:
    """The probe's energy plus the log of CLIPN's p_yes of the class that the probe predicts [B]."""
    return energy(logits) + F.logsigmoid(probe_ctw_log_odds(logits, logits_yes, logits_no))


def logit_distances(
    probe: Probe, tower: Rows, labels: Tensor, relative: bool = False, method: str = "Mahalanobis"
) -> Callable[[Tensor], Tensor]:
    """Logits [B, C] -> negative squared Mahalanobis distance [B] to the nearest class, in float64.

    The covariance is the unweighted mean of the unbiased covariances of the classes of two training images or more;
    the other classes are left out. relative: each distance less that to one Gaussian of all training images. Raises
    ValueError for a singular covariance.
    """
    size, labels = len(probe.weight), labels.to(probe.weight.device).long()

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(tower), _ROWS):
            yield probe.logits(tower[start : start + _ROWS]).double(), labels[start : start + _ROWS]

    counts = torch.bincount(labels, minlength=size)
    if int((counts - 1).clamp(min=0).sum()) < size or size > tower.shape[1]:
        need = f"as many outputs of the image tower ({tower.shape[1]}) and {size} images beside one of each class"
        raise ValueError(f"{method}: {len(tower)} training images; the covariance of {size} logits needs {need}")
    means = sum(F.one_hot(y, size).double().T @ z for z, y in blocks())
    mean, means = means.sum(dim=0) / len(tower), means / counts.clamp(min=1)[:, None]
    kept = counts > 1
    shares = (kept / (counts - 1).clamp(min=1) / kept.sum()).double()  # of an image of each class
    within, whole = torch.zeros(2, size, size, dtype=torch.float64, device=mean.device)
    for z, y in blocks():
        within += (z - means[y]).T @ ((z - means[y]) * shares[y, None])
        whole += (z - mean).T @ (z - mean) / (len(tower) - 1)
    inverse, centres = _inverse(within, method), means[kept] - mean
    inverse_of_all = _inverse(whole, method) if relative else torch.zeros_like(whole)

    def score(logits: Tensor) -> Tensor:
        centred = logits.double() - mean
        of_all = ((centred @ inverse_of_all) * centred).sum(dim=1, keepdim=True)
        squares = ((centred @ inverse) * centred).sum(dim=1, keepdim=True)
        squares = squares - 2 * centred @ inverse @ centres.T + ((centres @ inverse) * centres).sum(dim=1)
        return -(squares - of_all).amin(dim=1).float()

    return score


def nearest_cosine(train: Rows) -> Callable[[Tensor], Tensor]:
    """Tower outputs [B, W] -> cosine [B] to the nearest training image, of the outputs as they are (1NN)."""
    return lambda tower: nearest(tower, train, 1)[0].squeeze(1)


def _inverse(covariance: Tensor, method: str) -> Tensor:
    """The plain inverse; raises ValueError if there is none."""
    variances = torch.linalg.eigvalsh(covariance)
    if variances[0] <= _SINGULAR * variances[-1]:
        reason = "too few or too alike images, or probe.solver=lbfgs, whose optimal weights sum to 0 over the classes"
        raise ValueError(f"{method}: the covariance of the probe's {len(covariance)} logits is singular: {reason}")
    return torch.linalg.inv(covariance)
