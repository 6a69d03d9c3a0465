"""Every method by name. Scores of logits are in clipn.scores.SCORES; METHODS says how the others are made.

To add a method: put a function of logits into SCORES, anything else into METHODS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clipn.config.schema import EvalConfig
from clipn.methods.from_features import Score, fit_knn, fit_mahalanobis, fit_react, fit_residual, fit_vim
from clipn.methods.from_images import gl_mcm, odin
from clipn.methods.negatives import CSP, NEGLABEL, Negatives, Pool, mine, neglabel, read_words, save_negatives
from clipn.model.base import get_tokenizer
from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.runtime.distributed import is_main
from clipn.scores import SCORES


@dataclass
class MethodInputs:
    """What methods are made from; some parts are only for methods that need them."""

    model: CLIPN
    head: Head
    class_names: Sequence[str]
    scale: float = 100.0
    train: Tensor | None = None  # features [M, D] of ID training images
    labels: Tensor | None = None  # [M], of these images
    words: str | Path | None = None  # a word list or WordNet folder
    folder: str | Path | None = None  # where mined words are written
    results: dict[str, Any] = field(default_factory=dict)  # what several methods share

    @property
    def classes(self) -> int:
        """The number of classes C."""
        return len(self.head.weight_yes)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, computed once for all methods that ask for this key."""
        if key not in self.results:
            self.results[key] = compute()
        return self.results[key]


class Method(NamedTuple):
    """How a score is made, and which inputs it needs."""

    make: Callable[[MethodInputs], Score]
    needs: tuple[str, ...] = ()  # of "train", "labels", "words"
    takes: str = "features"  # what the score is a function of: "features" [B, D] or "images" [B, 3, H, W]


def _against_words(inputs: MethodInputs, pool: Pool, head: Head | None = None) -> Score:
    def mine_words() -> Negatives:
        words = read_words(inputs.words, pool.left_out)
        negatives = mine(inputs.model, get_tokenizer(inputs.model.architecture), words, inputs.class_names, pool)
        if inputs.folder and is_main():
            save_negatives(negatives, Path(inputs.folder) / f"negatives_{pool.name}.tsv")
        return negatives

    negatives = inputs.once(f"negatives {pool.name}", mine_words)
    return partial(neglabel, negatives=negatives, scale=inputs.scale, head=head)


METHODS: dict[str, Method] = {
    "NegLabel": Method(lambda x: _against_words(x, NEGLABEL), ("words",)),
    "CSP": Method(lambda x: _against_words(x, CSP), ("words",)),
    "NegLabel+CLIPN": Method(lambda x: _against_words(x, NEGLABEL, x.head), ("words",)),
    "CSP+CLIPN": Method(lambda x: _against_words(x, CSP, x.head), ("words",)),
    "kNN": Method(lambda x: fit_knn(x.train), ("train",)),
    "Mahalanobis": Method(lambda x: fit_mahalanobis(x.train, x.labels, x.classes), ("train", "labels")),
    "RMD": Method(lambda x: fit_mahalanobis(x.train, x.labels, x.classes, relative=True), ("train", "labels")),
    "ViM": Method(lambda x: fit_vim(x.train, x.head.weight_yes, x.scale), ("train",)),
    "Residual": Method(lambda x: fit_residual(x.train), ("train",)),
    "ReAct": Method(lambda x: fit_react(x.train, x.head.weight_yes, x.scale), ("train",)),
    "GL-MCM": Method(lambda x: partial(gl_mcm, x.model, x.head, scale=x.scale), takes="images"),
    "ODIN": Method(lambda x: partial(odin, x.model, x.head, scale=x.scale), takes="images"),
}
METHOD_NAMES = (*SCORES, *METHODS)
_SETTINGS = {
    "train": "in-distribution training images: name them in eval.train",
    "words": "candidate words: name a list or a WordNet folder in eval.words",
}


def check_methods(settings: EvalConfig) -> None:
    """Raise ValueError or FileNotFoundError for an unknown method, and for one without what it needs from `eval`."""
    if len(set(settings.methods)) < len(settings.methods):
        raise ValueError(f"eval.methods={settings.methods}: a method is named twice")
    for method in settings.methods:
        if method not in METHOD_NAMES:
            raise ValueError(f"eval.methods: unknown score {method!r}; the scores are: {', '.join(METHOD_NAMES)}")
        for key, description in _SETTINGS.items():
            if methods_that_need(key, [method]) and not getattr(settings, key):
                raise ValueError(f"eval.methods: {method} needs {description}")
    if methods_that_need("words", settings.methods):
        try:
            read_words(settings.words)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"eval.words: {error}") from error


def methods_that_need(name: str, methods: Sequence[str]) -> list[str]:
    """Those of the methods that need "train", "labels" or "words"."""
    return [method for method in methods if method in METHODS and name in METHODS[method].needs]


def make_methods(takes: str, methods: Sequence[str], inputs: MethodInputs) -> dict[str, Score]:
    """The scores among the methods that are functions of "features" or of "images"; raises as their `make` does."""
    return {name: METHODS[name].make(inputs) for name in methods if name in METHODS and METHODS[name].takes == takes}
