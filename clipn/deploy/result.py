"""What a Detector says of one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from clipn.scores import DECISIONS, p_yes


class ClassScore(NamedTuple):
    """What a picture's candidate class is worth."""

    label: str
    probability: float  # softmax over the classes
    p_yes: float  # that it shows this class, rather than "no" such thing
    p_no: float  # 1 - p_yes


@dataclass(frozen=True, eq=False)
class Result:
    """What a Detector says of one picture. A higher score always means in-distribution."""

    method: str
    scores: dict[str, float]  # by every method that needs the logits alone
    says_ood: bool | None  # None: the method decides by a threshold, and there is none
    logits_yes: Tensor = field(repr=False)  # [C], on the CPU
    logits_no: Tensor = field(repr=False)  # [C]
    class_names: Sequence[str] = field(repr=False)

    @property
    def label(self) -> str:
        """The most likely class, also where `is_ood` says that it is none of them."""
        return self.class_names[int(self.logits_yes.argmax())]

    @property
    def score(self) -> float:
        """The detector's own score."""
        return self.scores[self.method]

    @property
    def p_yes(self) -> float:
        """The probability that the picture shows `label`, rather than "no" such thing."""
        return self.scores["CTW"]

    @property
    def p_no(self) -> float:
        return 1 - self.p_yes

    @property
    def is_ood(self) -> bool:
        """Whether the picture shows none of the classes.

        Raises ValueError for a method that decides only by a threshold, where `Detector.calibrate` has set none.
        """
        if self.says_ood is None:
            choices = " or ".join(DECISIONS)
            raise ValueError(f"{self.method} decides only by a threshold: call detector.calibrate, or take {choices}")
        return self.says_ood

    def top(self, k: int = 5) -> list[ClassScore]:
        """The k most likely classes, or all if there are fewer, the likeliest first. Raises ValueError for k < 1."""
        if k < 1:
            raise ValueError(f"top({k}): expected 1 or more")
        order = self.logits_yes.argsort(descending=True, stable=True)[:k]
        probabilities, chances = self.logits_yes.softmax(dim=0)[order], p_yes(self.logits_yes, self.logits_no)[order]
        return [
            ClassScore(self.class_names[c], probability, yes, 1 - yes)
            for c, probability, yes in zip(order.tolist(), probabilities.tolist(), chances.tolist(), strict=True)
        ]

    def __str__(self) -> str:
        verdict = f"none of the classes (nearest: {self.label})" if self.says_ood else self.label
        return f"{verdict}, {self.method} {self.score:.4g}"
