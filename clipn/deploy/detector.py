"""Detector: classify images as one of the given classes or as none of them."""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipn.data.images import AnyImage, Transform, is_one_image, to_image, val_transform
from clipn.data.prompts import check_class_names, load_templates
from clipn.deploy.batches import map_batches
from clipn.deploy.class_weights import ClassWeights
from clipn.deploy.result import Result
from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.model.weights import open_model
from clipn.runtime.distributed import choose_device
from clipn.scores import DECISIONS, SCORES

log = logging.getLogger(__name__)

_ROUNDING = 1e-4  # relative difference of a score between batch sizes


class _State(NamedTuple):
    """All that a prediction reads at once, so that another thread may change the classes meanwhile."""

    method: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    head: Head
    threshold: float | None = None


class Detector:
    """Classifies images as one of `class_names` or as none of them.

    CTW and ATD decide without calibration (CLIPN, section 3.4). Any thread may predict at any time.
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
        self._class_weights = ClassWeights(model)
        self._lock = threading.Lock()  # held while `_state` is replaced
        self._state = self._new_state(method, class_names, templates)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        class_names: Sequence[str],
        model_name: str | None = None,
        templates: str | Sequence[str] | None = None,
        method: str = "ATD",
        device: str | torch.device = "auto",
        scale: float = 100.0,
        base: str | Path | None = None,
    ) -> Detector:
        """Load weights and encode the class names.

        checkpoint: a file, a run folder, a folder of `clipn export share`, "hf://user/repo", or an open_clip tag.
        model_name: an open_clip name or a JSON model config, for a checkpoint without its architecture.
        templates: texts with "{}", a file of them, clipn-release (the 128 of the paper), openai or simple (7, default).
        method: one of clipn.scores.SCORES.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N or mps.
        scale: factor of the cosines; the paper's code uses 100.
        base: the frozen CLIP of a shared file, which holds the no tower alone; default: the one that the file names.

        Raises ValueError or FileNotFoundError, in one line, for what does not exist or does not fit.
        """
        check_class_names(class_names)  # before the weights are loaded
        _check(method, scale)
        templates = load_templates("simple" if templates is None else templates, "templates")
        model = open_model(checkpoint, model_name, base, choose_device(str(device)))
        return cls(model, class_names, templates, method, scale)

    @property
    def method(self) -> str:
        return self._state.method

    @property
    def class_names(self) -> list[str]:
        return list(self._state.class_names)

    @property
    def templates(self) -> list[str]:
        return list(self._state.templates)

    @property
    def head(self) -> Head:
        return self._state.head

    @property
    def threshold(self) -> float | None:
        """Images with a lower score are OOD. None: the method's own decision."""
        return self._state.threshold

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def set_classes(self, class_names: Sequence[str], templates: str | Sequence[str] | None = None) -> None:
        """Replace the classes and remove the threshold. Names that were encoded before are not encoded again.

        templates: as in `from_pretrained`; None keeps them. Raises ValueError for no names or an empty one.
        """
        state = self._new_state(self.method, class_names, self.templates if templates is None else templates)
        with self._lock:
            self._state = state

    def with_classes(
        self, class_names: Sequence[str], templates: str | Sequence[str] | None = None, method: str | None = None
    ) -> Detector:
        """Another detector on the same weights in memory, with its own classes, method and threshold.

        Raises ValueError for an unknown method, no names or an empty one.
        """
        other = copy.copy(self)
        other._lock = threading.Lock()
        templates = self.templates if templates is None else templates
        other._state = self._new_state(method or self.method, class_names, templates)
        return other

    def predict(
        self, images: AnyImage | Iterable[AnyImage], batch_size: int = 32, on_error: str = "raise"
    ) -> Result | list[Result] | Iterator[Result]:
        """Classify one image (returns a Result), a list, tuple or batch (a list), or an iterator (an iterator).

        images: paths, bytes of a file, open files, PIL images, arrays or tensors, see `clipn.data.images.to_image`.
            An iterator is read one batch ahead, so memory does not grow with its length.
        on_error: "raise", or "return" to get the ValueError or OSError in place of the result.

        Raises ValueError or FileNotFoundError that names an unreadable image. URLs are never fetched.
        """
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error={on_error!r}: expected raise or return")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a whole number, 1 or more")
        if is_one_image(images):
            return next(self._results([images], self._state, 1, on_error))
        results = self._results(images, self._state, batch_size, on_error)
        return list(results) if isinstance(images, Sized) else results

    def calibrate(self, id_images: AnyImage | Iterable[AnyImage], keep: float = 0.95, batch_size: int = 32) -> float:
        """Set and return the threshold that a share `keep` of in-distribution images reaches.

        Raises ValueError for no images, a share outside of (0, 1], or classes that another thread changes meanwhile.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: expected a share above 0, up to 1")
        state, images = self._state, [id_images] if is_one_image(id_images) else id_images
        scores = [result.score for result in self._results(images, state, batch_size, "raise")]
        if not scores:
            raise ValueError("calibrate: expected at least one in-distribution image, got none")
        threshold = float(np.quantile(scores, 1 - keep, method="lower"))  # at least `keep` of them reach it
        threshold -= _ROUNDING * abs(threshold)  # also in batches of another size
        with self._lock:
            if self._state is not state:
                raise ValueError("calibrate: classes or threshold were changed meanwhile; calibrate again")
            self._state = state._replace(threshold=threshold)
        return threshold

    def _results(
        self, images: Iterable[AnyImage], state: _State, batch_size: int, on_error: str
    ) -> Iterator[Result | Exception]:
        for batch in map_batches(self._to_tensor, enumerate(images), batch_size):
            tensors = [item for item in batch if isinstance(item, Tensor)]
            results = iter(self._classify(torch.stack(tensors), state) if tensors else [])
            for item in batch:
                if isinstance(item, Exception) and on_error == "raise":
                    raise item
                yield item if isinstance(item, Exception) else next(results)

    def _classify(self, pixels: Tensor, state: _State) -> list[Result]:
        """[B, 3, H, W] preprocessed -> B results."""
        with torch.inference_mode():
            features = self.model.encode_image(pixels.to(self.device))
            logits = state.head(features, self.scale)
            scores = {name: score(*logits, self.scale).tolist() for name, score in SCORES.items()}
            if state.threshold is not None:
                says_ood = [score < state.threshold for score in scores[state.method]]
            elif state.method in DECISIONS:
                says_ood = DECISIONS[state.method](*logits).tolist()
            else:
                says_ood = [None] * len(pixels)
            yes, no = (values.cpu() for values in logits)
        results = []
        for n, ood in enumerate(says_ood):
            own_scores = {name: values[n] for name, values in scores.items()}
            own_logits = yes[n].clone(), no[n].clone()  # a clone does not keep the batch
            results.append(Result(state.method, own_scores, ood, *own_logits, state.class_names))
        return results

    def _to_tensor(self, numbered: tuple[int, AnyImage]) -> Tensor | Exception:
        """One image preprocessed, [3, H, W], or its error."""
        number, source = numbered
        try:
            image = to_image(source)
            return self._check_preprocessed(image) if isinstance(image, Tensor) else self.preprocess(image)
        except (ValueError, OSError, MemoryError, OverflowError) as error:
            names_path = isinstance(error, (ValueError, OSError)) and isinstance(source, (str, Path))
            return error if names_path else ValueError(f"image {number}: {error or type(error).__name__}")

    def _check_preprocessed(self, pixels: Tensor) -> Tensor:
        size, advice = self.model.preprocess["size"], "give pixels as uint8, or detector.preprocess(image)"
        shape, expected = list(pixels.shape), [3, size, size] if isinstance(size, int) else [3, *size]
        if not pixels.is_floating_point() or shape != expected:
            raise ValueError(f"{pixels.dtype} tensor of shape {shape}: expected {expected} floats; {advice}")
        if not pixels.isfinite().all():
            raise ValueError(f"float tensor with values that are not finite; {advice}")
        pixels = pixels.float().cpu()
        mean, std = (torch.tensor(self.model.preprocess[key])[:, None, None] for key in ("mean", "std"))
        largest, unprocessed = float(pixels.max()), "a float tensor of values %s is used as already normalised; %s"
        if (pixels * std + mean).max() > 2:  # at most 1 if they are normalised
            log.warning(unprocessed, f"up to {largest:g}", advice)
        elif mean.any() and pixels.min() >= 0 and largest <= 1:
            log.warning(unprocessed, "in 0..1", advice)
        return pixels

    def _new_state(self, method: str, class_names: Sequence[str], templates: str | Sequence[str] | None) -> _State:
        _check(method, self.scale)
        templates = tuple(load_templates("simple" if templates is None else templates, "templates"))
        names = tuple(check_class_names(class_names))
        return _State(method, names, templates, self._class_weights.head(names, templates))


def _check(method: str, scale: float) -> None:
    if method not in SCORES:
        raise ValueError(f"method={method!r}: expected one of {', '.join(SCORES)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: expected a positive number")
