"""OOD scores and threshold-free decisions from logits. For every score, higher means in-distribution.

Each score takes logits_yes and logits_no, [B, C] = scale * cosine, and returns [B]. Only MCM uses `scale`. Only CTW and
ATD use logits_no and `bias`, a number that is added to them; logits_no of a `clipn.Head` include the model's own bias
already. Entropy and variance are baselines in the released code of MCM, there for the softmax of the cosines.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def p_yes(logits_yes: Tensor, logits_no: Tensor, bias: float = 0.0) -> Tensor:
    """The probabilities [B, C] that the image shows class c rather than "no c" (CLIPN, ICCV 2023, equation 5)."""
    return torch.sigmoid(logits_yes - logits_no - bias)


def msp(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Maximum softmax probability (Hendrycks and Gimpel, ICLR 2017)."""
    return logits_yes.softmax(dim=1).amax(dim=1)


def max_logit(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Maximum logit (Hendrycks et al., ICML 2022)."""
    return logits_yes.amax(dim=1)


def energy(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Negative free energy at temperature 1 (Liu et al., NeurIPS 2020)."""
    return logits_yes.logsumexp(dim=1)


def mcm(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Maximum concept matching: maximum softmax of the cosines at temperature 1 (Ming et al., NeurIPS 2022)."""
    return (logits_yes / scale).softmax(dim=1).amax(dim=1)


def entropy(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Negative entropy of the softmax, in nats: 0 if one class has probability 1, -log C for equal probabilities."""
    log_probability = logits_yes.log_softmax(dim=1)
    return (log_probability.exp() * log_probability).sum(dim=1)


def variance(logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Population variance of the C softmax probabilities, whose mean is 1 / C."""
    return logits_yes.softmax(dim=1).var(dim=1, correction=0)


def ctw(logits_yes: Tensor, logits_no: Tensor, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Competing to win: p_yes of the class with the highest logits_yes (CLIPN, ICCV 2023, section 3.4)."""
    top = logits_yes.argmax(dim=1, keepdim=True)
    return p_yes(logits_yes.gather(1, top), logits_no.gather(1, top), bias).squeeze(1)


def atd(logits_yes: Tensor, logits_no: Tensor, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """Agreeing to differ: 1 minus the probability of an added class "unknown" (CLIPN, ICCV 2023, section 3.4)."""
    return (p_yes(logits_yes, logits_no, bias) * logits_yes.softmax(dim=1)).sum(dim=1)


def msp_log_odds(
    logits_yes: Tensor, logits_no: Tensor | None = None, scale: float = 100.0, bias: float = 0.0
) -> Tensor:
    """log(MSP / (1 - MSP)), the largest number for a single class."""
    top = logits_yes.argmax(dim=1, keepdim=True)
    others = logits_yes.scatter(1, top, -torch.inf) - logits_yes.gather(1, top)
    return -others.logsumexp(dim=1).clamp(min=torch.finfo(others.dtype).min)


def ctw_log_odds(logits_yes: Tensor, logits_no: Tensor, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """log(CTW / (1 - CTW)): -d of the class with the highest logits_yes."""
    top = logits_yes.argmax(dim=1, keepdim=True)
    return (logits_yes - logits_no).gather(1, top).squeeze(1) - bias


def atd_log_odds(logits_yes: Tensor, logits_no: Tensor, scale: float = 100.0, bias: float = 0.0) -> Tensor:
    """log(ATD / (1 - ATD))."""
    return mean_log_odds(logits_yes.log_softmax(dim=1), logits_yes - logits_no - bias)


def mean_log_odds(log_weights: Tensor, log_odds: Tensor) -> Tensor:
    """Log odds [B] of the mean of C probabilities with these log odds [B, C]; the weights [B, C] have the sum 1."""
    log_mean, log_rest = ((log_weights + F.logsigmoid(sign * log_odds)).logsumexp(dim=1) for sign in (1, -1))
    return log_mean - log_rest


def l1(logits: Tensor) -> Tensor:
    """Sum of the logits' distances to the smallest one [B]: the L1 score of pseudo-label probing (TMLR 2024)."""
    return (logits - logits.amin(dim=1, keepdim=True)).sum(dim=1)


def ctw_says_ood(logits_yes: Tensor, logits_no: Tensor, bias: float = 0.0) -> Tensor:
    """CTW's decision, [B] bool: p_no of the class with the highest logits_yes is above 1/2."""
    return ctw(logits_yes, logits_no, bias=bias) < 0.5


def atd_says_ood(logits_yes: Tensor, logits_no: Tensor, bias: float = 0.0) -> Tensor:
    """ATD's decision, [B] bool: the added class "unknown" is more probable than every other class."""
    probabilities = p_yes(logits_yes, logits_no, bias) * logits_yes.softmax(dim=1)
    return 1 - probabilities.sum(dim=1) > probabilities.amax(dim=1)


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

# Log odds have the order of the scores, which float32 rounds to 1 where logits are far apart: such images would tie.
LOG_ODDS: dict[str, Callable[..., Tensor]] = {"MSP": msp_log_odds, "CTW": ctw_log_odds, "ATD": atd_log_odds}
COMPARED = SCORES | LOG_ODDS  # what metrics and thresholds compare

DECISIONS: dict[str, Callable[..., Tensor]] = {"CTW": ctw_says_ood, "ATD": atd_says_ood}
