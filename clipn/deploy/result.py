"""Result: the prediction of a Detector for one image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from clipn.scores import DECISIONS, p_yes


class ClassScore(NamedTuple):
    """One candidate class of an image."""

    label: str
    probability: float  # softmax over the classes
    p_yes: float  # probability that the image shows this class rather than "no" such class
    p_no: float  # 1 - p_yes


@dataclass(frozen=True, eq=False)
class Result:
    """The prediction for one image. A higher score always means in-distribution."""

    method: str
    scores: dict[str, float]  # by method: the detector's, and every method of clipn.scores.SCORES
    says_ood: bool | None  # None: the method needs a threshold and none is set
    logits_yes: Tensor = field(repr=False)  # [C], on the CPU
    logits_no: Tensor = field(repr=False)  # [C]
    class_names: Sequence[str] = field(repr=False)
    probe_logits: Tensor | None = field(default=None, repr=False)  # [C] of the method's own classifier, if it has one
    log_odds: float | None = field(default=None, repr=False)  # of `score`, for a method of BY_LOG_ODDS

    @property
    def logits(self) -> Tensor:
        """The logits [C] of the method's classifier: a probe, or CLIP."""
        return self.logits_yes if self.probe_logits is None else self.probe_logits

    @property
    def label(self) -> str:
        """The most likely class, also for an OOD image."""
        return self.class_names[int(self.logits.argmax())]

    @property
    def score(self) -> float:
        """The score of the detector's method."""
        return self.scores[self.method]

    @property
    def p_yes(self) -> float:
        """The probability that the image shows `label` rather than "no" such class."""
        return float(p_yes(self.logits_yes, self.logits_no)[self.logits.argmax()])

    @property
    def p_no(self) -> float:
        return 1 - self.p_yes

    @property
    def is_ood(self) -> bool:
        """Whether the image shows none of the classes. Raises ValueError for a method without decision or threshold."""
        if self.says_ood is None:
            choices = " or ".join(DECISIONS)
            raise ValueError(f"{self.method} decides only by a threshold: call detector.calibrate, or choose {choices}")
        return self.says_ood

    def decides(self, decision: str) -> bool:
        """Whether this decision, CTW or ATD, calls the image OOD."""
        return bool(DECISIONS[decision](self.logits_yes[None], self.logits_no[None]))

    def top(self, k: int = 5) -> list[ClassScore]:
        """The k most likely classes, or all if there are fewer, most likely first. Raises ValueError for k < 1."""
        if k < 1:
            raise ValueError(f"top({k}): expected 1 or more")
        order = self.logits.argsort(descending=True, stable=True)[:k]
        probabilities, yes = self.logits.softmax(dim=0)[order], p_yes(self.logits_yes, self.logits_no)[order]
        numbers = zip(order.tolist(), probabilities.tolist(), yes.tolist(), strict=True)
        return [ClassScore(self.class_names[c], probability, p, 1 - p) for c, probability, p in numbers]

    def __str__(self) -> str:
        label = f"none of the classes (nearest: {self.label})" if self.says_ood else self.label
        return f"{label}, {self.method} {self.score:.4g}"


def make_results(
    method: str,
    scores: dict[str, Tensor],
    says_ood: Sequence[bool | None],
    logits: tuple[Tensor, Tensor, Tensor | None],
    class_names: Sequence[str],
    log_odds: Tensor | None = None,
) -> list[Result]:
    """The results of B images from scores [B] by method, logits [B, C] of yes, no and probe, and log odds [B]."""
    values = {name: score.tolist() for name, score in scores.items()}
    yes, no, probe = (part if part is None else part.float().cpu() for part in logits)
    own_log_odds = [None] * len(says_ood) if log_odds is None else log_odds.tolist()
    results = []
    for n, ood in enumerate(says_ood):
        own_scores = {name: of_images[n] for name, of_images in values.items()}
        parts = yes[n].clone(), no[n].clone(), class_names, probe if probe is None else probe[n].clone()
        results.append(Result(method, own_scores, ood, *parts, own_log_odds[n]))  # a clone does not keep the batch
    return results
