"""Detector: classify images as one of the given classes or as none of them."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipn.config.checks import require
from clipn.config.evaluation import ProbeConfig, TagoodConfig
from clipn.data.images import AnyImage, Transform, is_one_image, val_transform
from clipn.data.prompts import check_class_names, load_templates
from clipn.deploy.class_weights import ClassWeights
from clipn.deploy.pixels import PixelReader
from clipn.deploy.result import Result
from clipn.deploy.saved import check_tokens, is_same_model, read_settings, read_training, write_detector
from clipn.deploy.state import (
    State,
    check_choices,
    check_method,
    classify,
    find_threshold,
    learned,
    make_state,
    shown_threshold,
    unfitted,
)
from clipn.deploy.training_images import encode_training
from clipn.methods.registry import MethodInputs
from clipn.methods.scoring import token_finder
from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.model.precision import plain_mode
from clipn.model.weights import open_model
from clipn.runtime.distributed import choose_device

log = logging.getLogger(__name__)

_DEFAULTS = {"class_names": None, "templates": "simple", "method": "ATD", "scale": 100.0}


class Detector:
    """Classifies images as one of `class_names` or as none of them.

    CTW and ATD decide without calibration (CLIPN, section 3.4). Methods such as kNN and PLP-Energy learn from ID images
    first, see `fit`. Any thread may predict at any time.
    """

    def __init__(
        self,
        model: CLIPN,
        class_names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        method: str = "ATD",
        scale: float = 100.0,
    ) -> None:
        """model: on its device; it is set to evaluation mode. The rest is as in `from_pretrained`."""
        self.model, self.scale = model.eval(), scale
        self.preprocess: Transform = val_transform(model.preprocess)
        self._class_weights, self._reader = ClassWeights(model), PixelReader(model.preprocess, self.preprocess)
        self._lock = threading.Lock()  # held while `_state` is replaced
        self._state = self._new_state(method, class_names, templates, {})

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        class_names: Sequence[str] | None = None,
        model_name: str | None = None,
        templates: str | Sequence[str] | None = None,
        method: str | None = None,
        device: str | torch.device = "auto",
        scale: float | None = None,
        base: str | Path | None = None,
    ) -> Detector:
        """Load weights and encode the class names.

        checkpoint: a file, a run folder, a folder of `clipn export share`, "hf://user/repo", or an open_clip tag. Or a
            folder of `save`, which has all that is not given here; with other settings it has no threshold.
        model_name: an open_clip name or a JSON model config, for a checkpoint without its architecture.
        templates: texts with "{}", a file of them, clipn-release (the 128 of the paper), openai or simple (7, default).
        method: ATD (default), or any other of `eval.methods` but those that need a word list.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N or mps.
        scale: factor of the cosines; the paper's code uses 100 (default).
        base: the frozen CLIP of a shared file, which holds the no tower alone; default: the one that the file names.

        Raises ValueError or FileNotFoundError, in one line, for what does not exist or does not fit.
        """
        saved = read_settings(checkpoint)
        given = {"class_names": class_names, "templates": templates, "method": method, "scale": scale}
        settings = (saved or _DEFAULTS) | {name: value for name, value in given.items() if value is not None}
        if settings["class_names"] is None:
            raise ValueError(f"class_names: expected a list of names, since {checkpoint} has no detector.json")
        settings["class_names"] = check_class_names(settings["class_names"])  # before the weights are loaded
        check_method(settings["method"], settings["scale"])
        settings["templates"] = load_templates(settings["templates"], "templates")
        device = choose_device(str(device))
        with plain_mode(device):
            model = open_model(checkpoint, model_name, base, device)
            detector = cls(model, **{name: settings[name] for name in given})
            if saved:
                same = {name: settings[name] == saved[name] for name in given}
                detector._state = detector._restored(checkpoint, saved, same)
        return detector

    @property
    def method(self) -> str:
        return self._state.method

    @property
    def class_names(self) -> list[str]:
        return list(self._state.inputs.class_names)

    @property
    def templates(self) -> list[str]:
        return list(self._state.templates)

    @property
    def head(self) -> Head:
        return self._state.inputs.head

    @property
    def threshold(self) -> float | None:
        """Images with a lower score are OOD; probabilities are compared by their log odds. None: the method decides."""
        return shown_threshold(self._state)

    @property
    def lacks(self) -> str | None:
        """What the method has yet to learn from before it can predict; None if it is ready."""
        return self._state.lacks

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def set_classes(self, class_names: Sequence[str], templates: str | Sequence[str] | None = None) -> None:
        """Replace the classes and remove the threshold. Names that were encoded before are not encoded again.

        Methods learn again from the images of `fit`; labels that number other class names are dropped.
        templates: as in `from_pretrained`; None keeps them. Raises ValueError for no names or an empty one.
        """
        other = self.with_classes(class_names, templates)
        with self._lock:
            self._state = other._state

    def with_classes(
        self, class_names: Sequence[str], templates: str | Sequence[str] | None = None, method: str | None = None
    ) -> Detector:
        """Another detector on the same weights in memory, with its own classes, method and threshold.

        Raises ValueError for an unknown method, no names or an empty one.
        """
        other, state = copy.copy(self), self._state
        other._lock = threading.Lock()
        templates = state.templates if templates is None else load_templates(templates, "templates")
        training = learned(state, class_names, templates)
        other._state = self._new_state(method or state.method, class_names, templates, training)
        return other

    def fit(
        self,
        id_images: AnyImage | Iterable[AnyImage],
        labels: Sequence[int | str] | None = None,
        batch_size: int = 32,
        on_error: str = "raise",
        train_filter: str | None = None,
        settings: ProbeConfig | TagoodConfig | None = None,
    ) -> Detector:
        """Learn from in-distribution images what the method needs, remove the threshold, and return the detector.

        Their features are kept, so that `with_classes` gives a detector of another method without reading them again
        (TagOOD* alone also need tokens). Calibrate with other images: a method scores those it learned from too high.

        id_images: as in `predict`; they are read one batch ahead. labels: the class of each image, a name or a number;
            only some methods need them. on_error: "skip" leaves unreadable images out, with a warning.
        train_filter: CTW or ATD leaves out images that this decision calls OOD. settings: of the probe, or of TagOOD*.

        Raises ValueError for no images, another number of labels, and images or labels that the method cannot use.
        """
        check_choices(on_error, train_filter)
        state, images = self._state, [id_images] if is_one_image(id_images) else id_images
        inputs = unfitted(state.inputs, settings)
        batches, find_tokens = self._reader.batches(images, batch_size), token_finder(state.method, inputs)
        with plain_mode(self.model.logit_scale.device):
            training = encode_training(self.model, batches, labels, inputs.class_names, on_error, find_tokens)
        inputs = replace(inputs, **training)
        if train_filter:
            inputs.use_kept_by(train_filter)
        fitted = make_state(state.method, state.templates, inputs)
        if fitted.lacks:
            raise ValueError(f"fit: {fitted.lacks}")
        with self._lock:
            if self._state is not state:
                raise ValueError("fit: classes or threshold were changed meanwhile; fit again")
            self._state = fitted
        return self

    def save(self, folder: str | Path) -> None:
        """Write weights, classes, templates, method, threshold and what was fitted to a folder for `from_pretrained`.

        Raises ValueError for a folder that holds something else, OSError for a full disk.
        """
        state = self._state
        settings = {"class_names": list(state.inputs.class_names), "templates": list(state.templates)}
        settings |= {"method": state.method, "scale": float(self.scale), "threshold": state.threshold}
        write_detector(folder, state.inputs, settings)

    def predict(
        self, images: AnyImage | Iterable[AnyImage], batch_size: int = 32, on_error: str = "raise"
    ) -> Result | list[Result] | Iterator[Result]:
        """Classify one image (returns a Result), a list, tuple or batch (a list), or an iterator (an iterator).

        images: paths, bytes of a file, open files, PIL images, arrays or tensors, see `clipn.data.images.to_image`.
            An iterator is read one batch ahead, so memory does not grow with its length.
        on_error: "raise", or "return" to get the ValueError or OSError in place of the result.

        Raises ValueError or FileNotFoundError that names an unreadable image. URLs are never fetched.
        """
        require(on_error in ("raise", "return"), "on_error", on_error, "raise or return")
        if is_one_image(images):
            return next(self._results([images], self._ready(), 1, on_error))
        results = self._results(images, self._ready(), batch_size, on_error)
        return list(results) if isinstance(images, Sized) else results

    def calibrate(
        self,
        id_images: AnyImage | Iterable[AnyImage],
        keep: float = 0.95,
        batch_size: int = 32,
        on_error: str = "raise",
        train_filter: str | None = None,
    ) -> float:
        """Set and return the threshold that a share `keep` of in-distribution images reaches.

        on_error: "raise", or "skip" to leave unreadable images out, with a warning. train_filter: as in `fit`.
        Raises ValueError for no images, a share outside of (0, 1], or classes that another thread changes meanwhile.
        """
        require(0 < keep <= 1, "keep", keep, "a share above 0, up to 1")
        check_choices(on_error, train_filter)
        state, images = self._ready(), [id_images] if is_one_image(id_images) else id_images
        kept, number_ood = [], 0
        for result in self._results(images, state, batch_size, "return" if on_error == "skip" else "raise"):
            if isinstance(result, Exception):
                log.warning("left out: %s", result)
            elif train_filter and result.decides(train_filter):
                number_ood += 1
            else:
                kept.append(result)
        if number_ood and not kept:
            raise ValueError(f"calibrate: train_filter={train_filter} calls each of the {number_ood} images OOD")
        if not kept:
            raise ValueError("calibrate: expected at least one in-distribution image, got none")
        calibrated = state._replace(threshold=find_threshold(state, kept, keep))
        with self._lock:
            if self._state is not state:
                raise ValueError("calibrate: classes or threshold were changed meanwhile; calibrate again")
            self._state = calibrated
        return shown_threshold(calibrated)

    def _ready(self) -> State:
        """The state. Raises ValueError for a method that has not learned what it needs."""
        state = self._state
        if state.lacks:
            raise ValueError(state.lacks)
        return state

    def _results(
        self, images: Iterable[AnyImage], state: State, batch_size: int, on_error: str
    ) -> Iterator[Result | Exception]:
        for batch in self._reader.batches(images, batch_size):
            tensors = [item for item in batch if isinstance(item, Tensor)]
            results = iter(classify(state, torch.stack(tensors)) if tensors else [])
            for item in batch:
                if isinstance(item, Exception) and on_error == "raise":
                    raise item
                yield item if isinstance(item, Exception) else next(results)

    def _restored(self, folder: str | Path, saved: dict[str, Any], same: dict[str, bool]) -> State:
        """The state with what was saved in a folder; same: which settings are those that were saved."""
        training = read_training(folder, saved, self.model)
        if not same["class_names"]:
            training |= {"labels": None}  # they number the saved classes
        if not (same["class_names"] and same["templates"] and same["scale"]):
            training |= {"tokens": None}  # they show the saved classes
        state = self._new_state(self.method, self.class_names, self.templates, training)
        check_tokens(folder, saved, state.inputs)
        if saved["threshold"] is None:
            return state
        if all(same.values()) and is_same_model(saved, self.model):
            return state._replace(threshold=saved["threshold"])
        reason = "weights or settings are not those that it was set with"
        log.warning("%s: the saved threshold is dropped: %s", folder, reason)
        return state

    def _new_state(
        self, method: str, class_names: Sequence[str], templates: str | Sequence[str] | None, training: dict[str, Any]
    ) -> State:
        """training: the fields of MethodInputs that were learned from ID images."""
        check_method(method, self.scale)
        templates = tuple(load_templates("simple" if templates is None else templates, "templates"))
        names = tuple(check_class_names(class_names))
        inputs = MethodInputs(self.model, self._class_weights.head(names, templates), names, self.scale, **training)
        return make_state(method, templates, inputs)
