"""The user's door: which of these classes does a picture show, or none of them?"""

from __future__ import annotations

import copy
import logging
import math
import os
import reprlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipn.data.images import AnyImage, Transform, is_one_image, to_image, val_transform
from clipn.data.prompts import check_class_names, fill, load_templates
from clipn.deploy.result import Result
from clipn.model.base import context_length, get_tokenizer
from clipn.model.clipn import CLIPN
from clipn.model.head import Head, build_head
from clipn.model.weights import open_model
from clipn.runtime.distributed import choose_device
from clipn.scores import DECISIONS, SCORES

T = TypeVar("T")

log = logging.getLogger(__name__)

_MOST_KEPT = 100_000  # class names whose weights are kept, 4 KB each for ViT-B-16
_ROUNDING = 1e-4  # by how much, relatively, a score may differ between batches of other sizes
_DECODERS = min(8, os.cpu_count() or 1)  # threads


class _State(NamedTuple):
    """What a prediction reads, all at once, so that another thread may change the classes meanwhile."""

    method: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    head: Head
    threshold: float | None = None


class Detector:
    """Says of pictures which of `class_names` they show, or that they show none of them.

    Without calibration CTW and ATD decide by themselves (CLIPN, section 3.4). Any thread may predict at any time.
    """

    def __init__(
        self,
        model: CLIPN,
        class_names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        method: str = "ATD",
        scale: float = 100.0,
    ) -> None:
        """model: in evaluation mode, on its device. The rest is as in `from_pretrained`."""
        _check(method, scale)
        self.model, self.scale = model.eval(), scale
        self.preprocess: Transform = val_transform(model.preprocess)
        self._tokenizer = get_tokenizer(model.architecture)
        self._weights: dict[tuple[Any, str], tuple[Tensor, Tensor]] = {}
        self._encoding, self._changing = threading.Lock(), threading.Lock()
        self._state = self._state_of(method, class_names, "simple" if templates is None else templates)

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

        checkpoint: a file, a run's folder, a folder of scripts/export.py, "hf://user/repo", or an open_clip tag.
        model_name: open_clip's name or a JSON model config, for a checkpoint that does not say what it is of.
        templates: texts with "{}", a file of them, clipn-release (the 128 of the paper), openai or simple (7 of
            them, the default).
        method: one of clipn.scores.SCORES.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        scale: of the cosines; 100 as in the paper's code.
        base: the frozen CLIP for a file that holds the no tower alone; by default the one that the file names.

        Raises ValueError or FileNotFoundError, one line, for what is not there or does not fit.
        """
        check_class_names(class_names)  # before the work of loading
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
    def threshold(self) -> float | None:
        """Pictures that score below it are OOD; None: the method's own decision."""
        return self._state.threshold

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def set_classes(self, class_names: Sequence[str], templates: str | Sequence[str] | None = None) -> None:
        """Ask for other classes from now on; a name that was encoded before costs nothing. Drops the threshold.

        templates: as in `from_pretrained`; None keeps them. Raises ValueError for no names or an empty one.
        """
        state = self._state_of(self.method, class_names, self.templates if templates is None else templates)
        with self._changing:
            self._state = state

    def with_classes(
        self, class_names: Sequence[str], templates: str | Sequence[str] | None = None, method: str | None = None
    ) -> Detector:
        """Another detector on the same weights in memory, with classes, a method and a threshold of its own.

        Raises ValueError for an unknown method, no names or an empty one.
        """
        method, templates = method or self.method, self.templates if templates is None else templates
        _check(method, self.scale)
        other = copy.copy(self)
        other._changing = threading.Lock()
        other._state = self._state_of(method, class_names, templates)
        return other

    def predict(
        self, images: AnyImage | Iterable[AnyImage], batch_size: int = 32, on_error: str = "raise"
    ) -> Result | list[Result] | Iterator[Result]:
        """Classify one image (a Result), a list, tuple or batch of them (a list), or an iterator's (an iterator).

        images: paths, a file's bytes, open files, PIL images, arrays or tensors, as `clipn.images.to_image` takes
            them. An iterator is read a batch ahead, so any number of pictures needs no more memory than one batch.
        on_error: "raise", or "return" to get the ValueError or OSError in the place of a result.

        Raises ValueError or FileNotFoundError that names an image which cannot be read. URLs are never fetched.
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
        """Set, and return, the threshold that keeps this share of in-distribution pictures.

        Raises ValueError for no pictures, a share outside of (0, 1], or classes that were changed meanwhile.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: expected a share above 0, up to 1")
        state, images = self._state, [id_images] if is_one_image(id_images) else id_images
        scores = [result.score for result in self._results(images, state, batch_size, "raise")]
        if not scores:
            raise ValueError("calibrate: expected at least one in-distribution picture, found none")
        threshold = float(np.quantile(scores, 1 - keep, method="lower"))  # at least `keep` of them reach it
        threshold -= _ROUNDING * abs(threshold)  # also when they come in other batches
        with self._changing:
            if self._state is not state:
                raise ValueError("calibrate: classes or threshold were changed meanwhile; calibrate again")
            self._state = state._replace(threshold=threshold)
        return threshold

    def _results(self, images: Iterable[AnyImage], state: _State, batch_size: int, on_error: str) -> Iterator[Any]:
        ahead = 0 if batch_size == 1 else batch_size
        for batch in _batches(_map_ahead(self._tensor, enumerate(images), ahead), batch_size):
            good = [found for found in batch if not isinstance(found, Exception)]
            results = iter(self._judged(torch.stack(good), state) if good else [])
            for found in batch:
                if isinstance(found, Exception) and on_error == "raise":
                    raise found
                yield found if isinstance(found, Exception) else next(results)

    def _judged(self, pixels: Tensor, state: _State) -> list[Result]:
        """[B, 3, H, W] preprocessed -> B results."""
        with torch.inference_mode():
            logits_yes, logits_no = state.head(self.model.encode_image(pixels.to(self.device)), self.scale)
            scores = {name: score(logits_yes, logits_no, self.scale).tolist() for name, score in SCORES.items()}
            says_ood = [None] * len(pixels)
            if state.threshold is not None:
                says_ood = [score < state.threshold for score in scores[state.method]]
            elif state.method in DECISIONS:
                says_ood = DECISIONS[state.method](logits_yes, logits_no).tolist()
            logits_yes, logits_no = logits_yes.cpu(), logits_no.cpu()
        each = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
        rows = zip(each, says_ood, logits_yes, logits_no, strict=True)
        return [
            Result(state.method, own, ood, yes.clone(), no.clone(), state.class_names)  # which does not keep its batch
            for own, ood, yes, no in rows
        ]

    def _tensor(self, numbered: tuple[int, AnyImage]) -> Tensor | Exception:
        """One picture, preprocessed; or what is wrong with it."""
        number, image = numbered
        try:
            picture = to_image(image)
            return self._preprocessed(picture) if isinstance(picture, Tensor) else self.preprocess(picture)
        except (ValueError, OSError, MemoryError, OverflowError) as error:
            named = isinstance(error, (ValueError, OSError)) and isinstance(image, (str, Path))
            return error if named else ValueError(f"image {number}: {error or type(error).__name__}")

    def _preprocessed(self, pixels: Tensor) -> Tensor:
        size = self.model.preprocess["size"]
        shape = (3, size, size) if isinstance(size, int) else (3, *size)
        how = "pixels are uint8; or give detector.preprocess(picture)"
        if not pixels.is_floating_point() or tuple(pixels.shape) != shape:
            raise ValueError(
                f"{pixels.dtype} tensor of shape {list(pixels.shape)}: expected {list(shape)} floats; {how}"
            )
        if not pixels.isfinite().all():
            raise ValueError(f"float tensor with values that are not finite; {how}")
        if any(self.model.preprocess["mean"]) and pixels.min() >= 0 and pixels.max() <= 1:
            log.warning("a float tensor of values in 0..1 is taken as normalised already; %s", how)
        return pixels.float().cpu()

    def _state_of(self, method: str, class_names: Sequence[str], templates: str | Path | Sequence[str]) -> _State:
        names, templates = tuple(check_class_names(class_names)), tuple(load_templates(templates, "templates"))
        weights = {name: self._weights.get((templates, name)) for name in names}
        new = [name for name, found in weights.items() if found is None]
        if new:
            with self._encoding:  # who asks for known names does not wait
                self._warn_of_cut(new, templates)
                made = build_head(self.model, self._tokenizer, new, templates)
                rows = zip(made.weight_yes, made.weight_no, strict=True)
                weights |= {name: (yes.clone(), no.clone()) for name, (yes, no) in zip(new, rows, strict=True)}
                if len(self._weights) + len(new) > _MOST_KEPT:
                    self._weights.clear()
                self._weights |= {(templates, name): weights[name] for name in new}
        chosen = zip(*(weights[name] for name in names), strict=True)
        return _State(method, names, templates, Head(*(torch.stack(rows) for rows in chosen)))

    def _warn_of_cut(self, names: Sequence[str], templates: Sequence[str]) -> None:
        length = context_length(self.model.architecture)
        texts = [fill(max(templates, key=len), name) for name in names]
        differ = self._tokenizer(texts) != self._tokenizer(texts, 2 * length)[:, :length]
        cut = [name for name, longer in zip(names, differ.any(dim=1).tolist(), strict=True) if longer]
        if cut:
            log.warning(
                "%d class names are longer than the %d tokens that the model reads, so their ends are lost: %s",
                len(cut),
                length,
                ", ".join(map(reprlib.repr, cut[:5])),
            )


def _check(method: str, scale: float) -> None:
    if method not in SCORES:
        raise ValueError(f"method={method!r}: expected one of {', '.join(SCORES)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: expected a positive number")


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    batch, failures = [], []
    for item in _until_error(items, failures):
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
    for failure in failures:
        raise failure


def _until_error(items: Iterable[T], failures: list[Exception]) -> Iterator[T]:
    """The items; an error of theirs ends them and is put into `failures`, so that what came before it is not lost."""
    try:
        yield from items
    except Exception as error:
        failures.append(error)


def _map_ahead(function: Callable[[Any], T], items: Iterable[Any], ahead: int) -> Iterator[T]:
    """`function` of each item, in order, by threads that are up to `ahead` items before the one asked for."""
    if not ahead:
        yield from map(function, items)
        return
    pool, pending = ThreadPoolExecutor(_DECODERS), deque()
    try:
        for item in _until_error(items, failures := []):
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        for failure in failures:
            raise failure
    finally:  # nobody waits for the rest of an iterator that is given up
        pool.shutdown(wait=False, cancel_futures=True)
