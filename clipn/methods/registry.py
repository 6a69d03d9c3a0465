"""Every method by name. Scores of logits are in clipn.scores.SCORES; METHODS says how the others are made.

To add a method: put a function of logits into SCORES, anything else into METHODS. Probabilities
that float32 rounds to 1 are made and compared as log odds: such a score is also in LOG_ODDS, or has Method.log_odds.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipn.config.evaluation import EvalConfig, ProbeConfig, TagoodConfig
from clipn.features.columns import Rows
from clipn.methods.from_features import Score, fit_knn, fit_mahalanobis, fit_react, fit_residual, fit_vim
from clipn.methods.from_images import gl_mcm, odin
from clipn.methods.negatives import CSP, NEGLABEL, Negatives, Pool, mine, neglabel_log_odds, read_words, save_negatives
from clipn.methods.probe import PROMPTS, Probe, fit_probe, pseudo_labels, stored_probe
from clipn.methods.probe_scores import (
    logit_distances,
    nearest_cosine,
    probe_atd_log_odds,
    probe_ctw_log_odds,
    probe_energy_clipn,
)
from clipn.methods.taggers import Tagger, make_tagger
from clipn.methods.tagood_fit import stored_tagood
from clipn.methods.tokens import ROWS, TagScore, TrainingTokens, fit_row
from clipn.model.base import get_tokenizer
from clipn.model.clipn import CLIPN
from clipn.model.head import Head, class_weights
from clipn.runtime.console import shortened
from clipn.runtime.distributed import is_main
from clipn.scores import DECISIONS, LOG_ODDS, SCORES, energy, l1, max_logit, mcm, msp_log_odds

log = logging.getLogger(__name__)

_ROWS = 1024  # images scored at once


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
    train_tower: Rows | None = None  # the image tower's outputs [M, W] for the training images
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    probe_folder: str | Path | None = None  # where fitted probes are kept
    tokens: TrainingTokens | None = None  # of the training images, by `tagger`
    tagood: TagoodConfig = field(default_factory=TagoodConfig)
    tagood_folder: str | Path | None = None  # where fitted projectors are kept
    results: dict[str, Any] = field(default_factory=dict)  # what several methods share

    @property
    def tagger(self) -> Tagger:
        """The tagger of TagOOD, made once."""
        arguments = self.tagood, self.model, self.head, self.class_names, self.scale
        return self.once("tagger", lambda: make_tagger(*arguments))

    @property
    def classes(self) -> int:
        """The number of classes C."""
        return len(self.head.weight_yes)

    def use_only(self, numbers: Tensor) -> None:
        """Leave out all training images but these."""
        self.train = self.train[numbers]
        rows = (self.train_tower, self.labels)
        self.train_tower, self.labels = (x if x is None else x[numbers.to(x.device)] for x in rows)
        self.tokens = self.tokens and self.tokens.subset(numbers)

    def use_kept_by(self, decision: str) -> None:
        """Leave out the training images that a decision, CTW or ATD, calls OOD. Raises ValueError if none is left."""
        blocks = (block.to(self.head.weight_yes.device) for block in self.train.split(_ROWS))
        says_ood = torch.cat([DECISIONS[decision](*self.head(block, self.scale)).cpu() for block in blocks])
        kept = (~says_ood).nonzero()[:, 0]
        log.info("train_filter=%s keeps %d of %d training images", decision, len(kept), len(says_ood))
        if not len(kept):
            raise ValueError(f"train_filter={decision}: calls each of the {len(says_ood)} training images OOD")
        self.use_only(kept)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, computed once for all methods that ask for this key."""
        if key not in self.results:
            self.results[key] = compute()
        return self.results[key]


class Method(NamedTuple):
    """How a score is made, and which inputs it needs.

    takes: what the score is a function of: "features" [B, D], "images" [B, 3, H, W], or a name of CLASSIFIERS: the
        logits [B, C] of that classifier and the features, or "tower": the tower's outputs [B, W] and the features,
        or "tags": what the tagger says of the images.
    """

    make: Callable[[MethodInputs], Callable[..., Tensor]]
    needs: tuple[str, ...] = ()  # of "train", "tower", "tokens", "labels", "words"; "probe": as many images as classes
    takes: str = "features"
    log_odds: bool = False  # the score is a probability, and its log odds are what is made


def _against_words(inputs: MethodInputs, pool: Pool, head: Head | None = None) -> Score:
    def mine_words() -> Negatives:
        words = read_words(inputs.words, pool.left_out)
        negatives = mine(inputs.model, get_tokenizer(inputs.model.architecture), words, inputs.class_names, pool)
        if inputs.folder and is_main():
            save_negatives(negatives, Path(inputs.folder) / f"negatives_{pool.name}.tsv")
        return negatives

    negatives = inputs.once(f"negatives {pool.name}", mine_words)
    return partial(neglabel_log_odds, negatives=negatives, scale=inputs.scale, head=head)


class _Fitted(NamedTuple):
    """A probe, and the training images that it was fitted to."""

    probe: Probe
    tower: Rows
    labels: Tensor


def _fitted(inputs: MethodInputs, kind: str) -> _Fitted:
    """The probe on pseudo-labels ("PLP") or on the class folders' labels ("LP"), fitted once."""

    def fit() -> _Fitted:
        tower, labels = inputs.train_tower, inputs.labels
        if tower is None or (kind == "LP" and labels is None):
            lacks = "labels" if tower is not None else "tower outputs"
            raise ValueError(f"{kind}: the {lacks} of the training images are missing")
        if kind == "PLP":
            labels = _pseudo_labels(inputs)
        _warn_of_empty_classes(inputs, kind, labels)
        arguments = tower, labels, inputs.classes, inputs.probe
        probe = stored_probe(inputs.probe_folder, *arguments) if inputs.probe_folder else fit_probe(*arguments)
        return _Fitted(probe, tower, labels)

    return inputs.once(f"probe {kind}", fit)


def _warn_of_empty_classes(inputs: MethodInputs, kind: str, labels: Tensor) -> None:
    counts = torch.bincount(labels, minlength=inputs.classes).tolist()
    empty = [name for name, count in zip(inputs.class_names, counts, strict=False) if not count]
    if empty:
        message = "%s: no training image has the label of %d of %d classes, which it does not learn: %s"
        log.warning(message, kind, len(empty), len(counts), shortened(empty))


def _pseudo_labels(inputs: MethodInputs) -> Tensor:
    return inputs.once("pseudo-labels", lambda: pseudo_labels(inputs.train, _prompt_weights(inputs)))


def _prompt_weights(inputs: MethodInputs) -> Tensor:
    """The class weights [C, D] of the probe's own prompts."""
    tokenizer = get_tokenizer(inputs.model.architecture)
    arguments = inputs.model.encode_text, tokenizer, inputs.class_names, PROMPTS
    return inputs.once("prompt weights", lambda: class_weights(*arguments))


def _prompt_logits(inputs: MethodInputs) -> Callable[[Tensor, Tensor], Tensor]:
    weights = _prompt_weights(inputs)
    return lambda features, tower: inputs.scale * features @ weights.T


def _probe_logits(kind: str, inputs: MethodInputs) -> Callable[[Tensor, Tensor], Tensor]:
    probe = _fitted(inputs, kind).probe
    return lambda features, tower: probe.logits(tower)


# A function of features [B, D] and tower outputs [B, W] -> logits [B, C], whose largest is the predicted class.
CLASSIFIERS: dict[str, Callable[[MethodInputs], Callable[[Tensor, Tensor], Tensor]]] = {
    "PLP": partial(_probe_logits, "PLP"),
    "LP": partial(_probe_logits, "LP"),
    "prompts": _prompt_logits,
}


def _of_logits(score: Callable[[Tensor], Tensor]) -> Callable[[MethodInputs], Callable[..., Tensor]]:
    return lambda inputs: lambda logits, features: score(logits)


def _distances(kind: str, relative: bool, inputs: MethodInputs) -> Callable[..., Tensor]:
    name = f"{kind}-{'RMD' if relative else 'Mahalanobis'}"
    score = logit_distances(*_fitted(inputs, kind), relative, name)
    return lambda logits, features: score(logits)


def _with_clipn(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[MethodInputs], Callable[..., Tensor]]:
    return lambda inputs: lambda logits, features: score(logits, *inputs.head(features, inputs.scale))


def _probe_methods(kind: str, needs: tuple[str, ...]) -> dict[str, Method]:
    scores = {"MSP": msp_log_odds, "Energy": energy, "MaxLogit": max_logit, "L1": l1}
    methods = {
        f"{kind}-{name}": Method(_of_logits(score), needs, kind, log_odds=name in LOG_ODDS)
        for name, score in scores.items()
    }
    distances = {"Mahalanobis": False, "RMD": True}
    return methods | {
        f"{kind}-{name}": Method(partial(_distances, kind, relative), needs, kind)
        for name, relative in distances.items()
    }


def _mahalanobis(relative: bool, inputs: MethodInputs) -> Score:
    return fit_mahalanobis(inputs.train, inputs.labels, inputs.classes, relative, inputs.class_names)


def _tag_score(kind: str, row: str, inputs: MethodInputs) -> TagScore:
    """One of ROWS, learned from the class folders' labels ("TagOOD") or from pseudo-labels ("TagOOD-PL")."""
    labels = inputs.labels if kind == "TagOOD" else _pseudo_labels(inputs)
    if inputs.tokens is None or labels is None:
        lacks = "labels" if inputs.tokens is not None else "tokens"
        raise ValueError(f"{kind}: the {lacks} of the training images are missing")
    inputs.once(f"classes of {kind}", lambda: _warn_of_empty_classes(inputs, kind, labels))
    arguments = row, inputs.tokens, labels, inputs.classes, inputs.tagood, inputs.tagood_folder
    return inputs.once(f"{kind} {row}", lambda: fit_row(*arguments))


def _tag_methods(kind: str, needs: tuple[str, ...]) -> dict[str, Method]:
    return {f"{kind}-{row}".strip("-"): Method(partial(_tag_score, kind, row), needs, "tags") for row in ROWS}


_TOWER = ("train", "tower")
_PLP, _LP = (*_TOWER, "probe"), (*_TOWER, "probe", "labels")

METHODS: dict[str, Method] = {
    "NegLabel": Method(lambda x: _against_words(x, NEGLABEL), ("words",), log_odds=True),
    "CSP": Method(lambda x: _against_words(x, CSP), ("words",), log_odds=True),
    "NegLabel+CLIPN": Method(lambda x: _against_words(x, NEGLABEL, x.head), ("words",), log_odds=True),
    "CSP+CLIPN": Method(lambda x: _against_words(x, CSP, x.head), ("words",), log_odds=True),
    "kNN": Method(lambda x: fit_knn(x.train), ("train",)),
    "Mahalanobis": Method(partial(_mahalanobis, False), ("train", "labels")),
    "RMD": Method(partial(_mahalanobis, True), ("train", "labels")),
    "ViM": Method(lambda x: fit_vim(x.train, x.head.weight_yes, x.scale), ("train",)),
    "Residual": Method(lambda x: fit_residual(x.train), ("train",)),
    "ReAct": Method(lambda x: fit_react(x.train, x.head.weight_yes, x.scale), ("train",)),
    "GL-MCM": Method(lambda x: partial(gl_mcm, x.model, x.head, scale=x.scale), takes="images"),
    "ODIN": Method(lambda x: partial(odin, x.model, x.head, scale=x.scale), takes="images"),
    "MCM-5": Method(lambda x: lambda logits, features: mcm(logits, None, x.scale), takes="prompts"),
    "1NN": Method(lambda x: _of_logits(nearest_cosine(x.train_tower))(x), _TOWER, "tower"),
    **_probe_methods("PLP", _PLP),
    **_probe_methods("LP", _LP),
    "PLP+CTW": Method(_with_clipn(probe_ctw_log_odds), _PLP, "PLP", log_odds=True),
    "PLP+ATD": Method(_with_clipn(probe_atd_log_odds), _PLP, "PLP", log_odds=True),
    "PLP-Energy+CLIPN": Method(_with_clipn(probe_energy_clipn), _PLP, "PLP"),
    "TagOOD-tag": Method(lambda x: TagScore(x.tagood), takes="tags"),
    **_tag_methods("TagOOD", ("train", "tokens", "labels")),
    **_tag_methods("TagOOD-PL", ("train", "tokens")),
}
METHOD_NAMES = (*SCORES, *METHODS)
BY_LOG_ODDS = (*LOG_ODDS, *(name for name, method in METHODS.items() if method.log_odds))
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
    """Those of the methods that need "train", "tower", "tokens", "probe", "labels" or "words"."""
    return [method for method in methods if method in METHODS and name in METHODS[method].needs]


def methods_that_take(takes: str, methods: Sequence[str]) -> list[str]:
    """Those of the methods that are functions of this, such as "features"."""
    return [method for method in methods if method in METHODS and METHODS[method].takes == takes]


def make_methods(takes: str, methods: Sequence[str], inputs: MethodInputs) -> dict[str, Callable[..., Tensor]]:
    """The scores among the methods that take this, such as "features"; raises as their `make` does."""
    return {name: METHODS[name].make(inputs) for name in methods_that_take(takes, methods)}


def save_fits(inputs: MethodInputs, probe_folder: str | Path, tagood_folder: str | Path) -> None:
    """Write what these inputs have been fitted to, for their fields of these names."""
    for fitted in inputs.results.values():
        if isinstance(fitted, _Fitted):
            stored_probe(probe_folder, fitted.tower, fitted.labels, inputs.classes, inputs.probe, fitted.probe)
        elif isinstance(fitted, TagScore) and fitted.fit:
            stored_tagood(tagood_folder, *fitted.fit)
