"""OOD scores and decisions from logits. A higher score means in-distribution, for every score.

Each score takes logits_yes, logits_no [B, C] = scale * cosine, and returns [B]. Only MCM reads `scale`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def p_yes(logits_yes: Tensor, logits_no: Tensor) -> Tensor:
    """[B, C]: the probability that the image holds class c rather than "no c" (CLIPN, equation 5)."""
    return torch.sigmoid(logits_yes - logits_no)


def msp(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0) -> Tensor:
    """Maximum softmax probability (Hendrycks and Gimpel, ICLR 2017)."""
    return logits_yes.softmax(dim=1).amax(dim=1)


def max_logit(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0) -> Tensor:
    """Maximum logit (Hendrycks et al., ICML 2022)."""
    return logits_yes.amax(dim=1)


def energy(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0) -> Tensor:
    """Negative free energy at temperature 1 (Liu et al., NeurIPS 2020)."""
    return logits_yes.logsumexp(dim=1)


def mcm(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0) -> Tensor:
    """Maximum concept matching: softmax of the cosines at temperature 1 (Ming et al., NeurIPS 2022)."""
    return (logits_yes / scale).softmax(dim=1).amax(dim=1)


def entropy(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0) -> Tensor:
    """Negative entropy of the softmax, in nats: 0 for a sure image, -log C where all classes are alike.

    A baseline of the released code of MCM (Ming et al., NeurIPS 2022), there of the softmax of the cosines.
    """
    log_chance = logits_yes.log_softmax(dim=1)
    return (log_chance.exp() * log_chance).sum(dim=1)


def variance(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0) -> Tensor:
    """Variance of the C softmax probabilities about their mean 1 / C, divided by C.

    A baseline of the released code of MCM (Ming et al., NeurIPS 2022), there of the softmax of the cosines.
    """
    return logits_yes.softmax(dim=1).var(dim=1, correction=0)


def ctw(logits_yes: Tensor, logits_no: Tensor, scale: float = 100.0) -> Tensor:
    """Competing to win: p_yes of the most likely class (CLIPN, ICCV 2023, section 3.4)."""
    top = logits_yes.argmax(dim=1, keepdim=True)
    return p_yes(logits_yes.gather(1, top), logits_no.gather(1, top)).squeeze(1)


def atd(logits_yes: Tensor, logits_no: Tensor, scale: float = 100.0) -> Tensor:
    """Agreeing to differ: 1 minus the probability of an added class "unknown" (CLIPN, ICCV 2023, section 3.4)."""
    return (p_yes(logits_yes, logits_no) * logits_yes.softmax(dim=1)).sum(dim=1)


def ctw_says_ood(logits_yes: Tensor, logits_no: Tensor) -> Tensor:
    """[B] bool, threshold-free: p_no of the most likely class is above one half."""
    return ctw(logits_yes, logits_no) < 0.5


def atd_says_ood(logits_yes: Tensor, logits_no: Tensor) -> Tensor:
    """[B] bool, threshold-free: the class "unknown" is more probable than every class."""
    known = p_yes(logits_yes, logits_no) * logits_yes.softmax(dim=1)
    return 1 - known.sum(dim=1) > known.amax(dim=1)


SCORES: dict[str, Callable[..., Tensor]] = {
    "MSP": msp,
    "MaxLogit": max_logit,
    "Energy": energy,
    "MCM": mcm,
    "Entropy": entropy,
    "Variance": variance,
    "CTW": ctw,
    "ATD": atd,
}

DECISIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"CTW": ctw_says_ood, "ATD": atd_says_ood}
