"""Methods as functions of images and their encodings: many for image sets, one for a Detector."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipn.features.columns import Rows
from clipn.features.store import Columns
from clipn.methods.registry import CLASSIFIERS, METHODS, MethodInputs, make_methods
from clipn.methods.taggers import tag
from clipn.methods.tokens import REJECTED, token_columns

_ROWS = 1024  # images scored at once


class ClassifierScores:
    """The methods that score the outputs of CLASSIFIERS or of the image tower, made once for all image sets."""

    def __init__(self, methods: Sequence[str], inputs: MethodInputs) -> None:
        self.device = inputs.head.weight_yes.device
        self.methods = {takes: make_methods(takes, methods, inputs) for takes in ("tower", *CLASSIFIERS)}
        self.classifiers = {name: make(inputs) for name, make in CLASSIFIERS.items() if self.methods[name]}

    @torch.no_grad()
    def __call__(self, features: Tensor, tower: Rows | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Features [N, D] and tower outputs [N, W] -> scores [N], and predicted classes [N], by method."""
        scores, predicted = defaultdict(list), defaultdict(list)
        for start in range(0, len(features), _ROWS):
            block = features[start : start + _ROWS].to(self.device)
            outputs = None if tower is None else tower[start : start + _ROWS].to(self.device)
            for name, score in self.methods["tower"].items():
                scores[name].append(score(outputs, block))
            for classifier, classify in self.classifiers.items():
                logits = classify(block, outputs)
                for name, score in self.methods[classifier].items():
                    scores[name].append(score(logits, block))
                    predicted[name].append(logits.argmax(dim=1))
        return tuple({name: torch.cat(parts).cpu().numpy() for name, parts in of.items()} for of in (scores, predicted))


class Scorer(NamedTuple):
    """One method of METHODS, as a function of images and their encodings."""

    score: Callable[..., Tensor]
    takes: str
    classify: Callable[[Tensor, Tensor], Tensor] | None
    rejected: float = -math.inf  # the score of images that it calls OOD whatever the threshold

    def __call__(self, images: Tensor, features: Tensor, tower: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Normalised images [B, 3, H, W], features [B, D], tower outputs [B, W] -> scores [B], its classifier's logits.

        The logits [B, C] are None for a method whose classifier is CLIP. tower: None unless `needs_tower`.
        """
        if self.classify:
            logits = self.classify(features, tower)
            return self.score(logits, features), logits
        arguments = {"images": (images,), "features": (features,), "tower": (tower, features)}[self.takes]
        return self.score(*arguments), None

    @property
    def needs_tower(self) -> bool:
        """Whether it reads the image tower's outputs."""
        return self.takes not in ("images", "features")


def make_scorer(method: str, inputs: MethodInputs) -> Scorer:
    """The scorer of a method; raises as its `make` does, and for a tagger that does not read the base's images."""
    takes, score = METHODS[method].takes, METHODS[method].make(inputs)
    if takes == "tags":
        tagger = inputs.tagger
        if tagger.preprocess != inputs.model.preprocess:
            reason = f"tagood.tagger={inputs.tagood.tagger} reads images of its own size; use `clipn eval`"
            raise ValueError(f"{method}: {reason}")
        rejected = REJECTED if inputs.tagood.untagged == "reject" else -math.inf
        return Scorer(lambda images: score(tag(tagger, images)), "images", None, rejected)
    return Scorer(score, takes, CLASSIFIERS[takes](inputs) if takes in CLASSIFIERS else None)


def lacking(method: str, inputs: MethodInputs) -> str | None:
    """The first of the method's needs that is not among the inputs: "train", "tower", "tokens", "labels" or "words"."""
    needs = METHODS[method].needs if method in METHODS else ()
    parts = {"train": inputs.train, "tower": inputs.train_tower, "labels": inputs.labels, "words": inputs.words}
    parts |= {"tokens": inputs.tokens}
    return next((need for need in needs if need in parts and parts[need] is None), None)


def token_finder(method: str, inputs: MethodInputs) -> Callable[[Tensor], Columns] | None:
    """A function of training images [B, 3, H, W] -> the columns of `open_tokens`; None if it needs no tokens."""
    if method not in METHODS or "tokens" not in METHODS[method].needs:
        return None
    tagger = inputs.tagger
    return lambda images: token_columns(tag(tagger, images), inputs.tagood)
