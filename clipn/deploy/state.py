"""The state of a Detector: method, classes, and what was learned from in-distribution images; its predictions."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipn.config.checks import require
from clipn.config.evaluation import ProbeConfig, TagoodConfig
from clipn.deploy.result import Result, make_results
from clipn.methods.registry import BY_LOG_ODDS, METHOD_NAMES, METHODS, MethodInputs
from clipn.methods.scoring import Scorer, lacking, make_scorer
from clipn.model.precision import plain_mode
from clipn.scores import COMPARED, DECISIONS, SCORES

log = logging.getLogger(__name__)

DETECTOR_METHODS = tuple(  # the others need words
    name for name in METHOD_NAMES if name not in METHODS or "words" not in METHODS[name].needs
)
_FEW = 20  # fewer images give a rough threshold
_ROUNDING = 1e-4  # difference of a score between batch sizes, relative to its size or spread
_LEARNS = "method %s learns from in-distribution images%s: call detector.fit(%s)"


class State(NamedTuple):
    """All that a prediction reads at once, so that another thread may change the classes meanwhile."""

    method: str
    templates: tuple[str, ...]
    inputs: MethodInputs  # classes, head, and what was learned
    scorer: Scorer | None  # of a method that is not in SCORES, if nothing is lacking
    lacks: str | None  # why the method cannot score yet
    threshold: float | None = None  # of the score, or of its log odds for a method of BY_LOG_ODDS


def make_state(method: str, templates: Sequence[str], inputs: MethodInputs) -> State:
    """The state without a threshold; `lacks` says what the method has yet to learn from. Raises as its fit does."""
    if lacking(method, inputs):
        labelled = "labels" in METHODS[method].needs and inputs.labels is None
        words = (" with labels", "id_images, labels") if labelled else ("", "id_images")
        return State(method, tuple(templates), inputs, None, _LEARNS % (method, *words))
    with plain_mode(inputs.head.weight_yes.device):
        return State(method, tuple(templates), inputs, make_scorer(method, inputs) if method in METHODS else None, None)


def classify(state: State, pixels: Tensor) -> list[Result]:
    """The results of B preprocessed images [B, 3, H, W]."""
    inputs, scorer, tower, own_logits = state.inputs, state.scorer, None, None
    with torch.inference_mode():
        pixels = pixels.to(inputs.model.logit_scale.device)
        if scorer and scorer.needs_tower:
            features, tower = inputs.model.encode_image_with_tower(pixels)
        else:
            features = inputs.model.encode_image(pixels)
        logits = inputs.head(features, inputs.scale)
        scores = {name: score(*logits, inputs.scale) for name, score in SCORES.items()}
        if scorer:
            compared, own_logits = scorer(pixels, features, tower)
            scores[state.method] = compared.sigmoid() if state.method in BY_LOG_ODDS else compared
        else:
            compared = COMPARED[state.method](*logits, inputs.scale)
        if state.threshold is not None:
            says_ood = (compared < state.threshold).tolist()
        elif state.method in DECISIONS:
            says_ood = DECISIONS[state.method](*logits).tolist()
        else:
            says_ood = [None] * len(pixels)
    log_odds = compared if state.method in BY_LOG_ODDS else None
    return make_results(state.method, scores, says_ood, (*logits, own_logits), inputs.class_names, log_odds)


def find_threshold(state: State, results: Sequence[Result], keep: float) -> float:
    """The threshold that at least a share `keep` of the images reaches, but for those that the method always rejects.

    Raises ValueError for scores that are not finite.
    """
    scores = [result.score if result.log_odds is None else result.log_odds for result in results]
    if not np.isfinite(scores).all():
        raise ValueError(f"calibrate: {state.method} gives scores that are not finite; fit it again")
    if len(scores) < _FEW:
        log.warning("calibrate: only %d images set the threshold, which is rough", len(scores))
    threshold = float(np.quantile(scores, 1 - keep, method="lower"))
    threshold -= _ROUNDING * max(abs(threshold), float(np.std(scores)))  # also in batches of another size
    rejected = state.scorer.rejected if state.scorer else -math.inf
    if threshold > rejected:
        return threshold
    share = 100 * np.mean(np.array(scores) <= rejected)
    log.warning("calibrate: %.1f %% of the images have no tag, and are OOD at any threshold", share)
    return float(np.nextafter(np.float32(rejected), np.float32(math.inf)))  # scores are float32


def shown_threshold(state: State) -> float | None:
    """The threshold as a score: a probability where log odds are compared."""
    if state.threshold is None or state.method not in BY_LOG_ODDS:
        return state.threshold
    return float(torch.tensor(state.threshold, dtype=torch.float64).sigmoid())


def learned(state: State, class_names: Sequence[str], templates: Sequence[str]) -> dict[str, Any]:
    """The fields of MethodInputs that hold for other class names and templates too."""
    kept = ["train", "train_tower", "probe", "probe_folder", "tagood", "tagood_folder"]
    if list(class_names) == list(state.inputs.class_names):
        kept.append("labels")  # they number these names
        if tuple(templates) == state.templates:
            kept += ["tokens", "results"]
    return {name: getattr(state.inputs, name) for name in kept}


def unfitted(inputs: MethodInputs, settings: ProbeConfig | TagoodConfig | None) -> MethodInputs:
    """Inputs of the same classes that have learned nothing yet, with these settings in place of theirs."""
    names = {ProbeConfig: "probe", TagoodConfig: "tagood"}
    if settings is not None and type(settings) not in names:
        raise ValueError(f"settings={settings!r}: expected ProbeConfig or TagoodConfig")
    own = {name: getattr(inputs, name) for name in names.values()}
    own |= {} if settings is None else {names[type(settings)]: settings}
    return MethodInputs(inputs.model, inputs.head, inputs.class_names, inputs.scale, **own)


def check_method(method: str, scale: float) -> None:
    """Raise ValueError for a method that a Detector does not have, and for an impossible scale."""
    if method not in DETECTOR_METHODS:
        reason = f"{method} works in `clipn eval` alone" if method in METHODS else "no such method"
        raise ValueError(f"method={method!r}: {reason}; expected one of {', '.join(DETECTOR_METHODS)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: expected a positive number")


def check_choices(on_error: str, train_filter: str | None) -> None:
    """Raise ValueError for an unknown choice of `Detector.fit` and `Detector.calibrate`."""
    require(on_error in ("raise", "skip"), "on_error", on_error, "raise or skip")
    require(train_filter in (None, *DECISIONS), "train_filter", train_filter, f"None or {', '.join(DECISIONS)}")
