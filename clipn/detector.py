"""The user's door: which of these classes does a picture show, or none of them?"""

from __future__ import annotations

import copy
import logging
import os
import reprlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import context_length, get_tokenizer
from .distributed import choose_device
from .head import Head, build_head
from .images import AnyImage, Transform, any_image, val_transform
from .model import CLIPN
from .prompts import check_class_names, fill, load_templates
from .result import Result
from .scores import DECISIONS, SCORES
from .share import open_model

T = TypeVar("T")

log = logging.getLogger(__name__)

_MOST_KEPT = 100_000  # class names whose weights are kept, 4 KB each for ViT-B-16
_DECODERS = min(8, os.cpu_count() or 1)  # threads


class _Judge(NamedTuple):
    """What a prediction reads, all at once, so that another thread may change the classes meanwhile."""

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
        _check_method(method)
        self.model, self.method, self.scale = model.eval(), method, scale
        self.preprocess: Transform = val_transform(model.preprocess)
        self._tokenizer = get_tokenizer(model.architecture)
        self._weights: dict[tuple[Any, str], tuple[Tensor, Tensor]] = {}
        self._changing = threading.Lock()
        self.set_classes(class_names, "simple" if templates is None else templates)

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
        _check_method(method)
        templates = load_templates("simple" if templates is None else templates, "templates")
        model = open_model(checkpoint, model_name, base, choose_device(str(device)))
        return cls(model, class_names, templates, method, scale)

    @property
    def class_names(self) -> list[str]:
        return list(self._judge.class_names)

    @property
    def templates(self) -> list[str]:
        return list(self._judge.templates)

    @property
    def threshold(self) -> float | None:
        """Pictures that score below it are OOD; None: the method's own decision."""
        return self._judge.threshold

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def set_classes(self, class_names: Sequence[str], templates: str | Sequence[str] | None = None) -> None:
        """Ask for other classes from now on; a name that was encoded before costs nothing. Drops the threshold.

        templates: as in `from_pretrained`; None keeps them. Raises ValueError for no names or an empty one.
        """
        names = tuple(check_class_names(class_names))
        with self._changing:
            chosen = self.templates if templates is None else load_templates(templates, "templates")
            self._judge = _Judge(names, tuple(chosen), self._head(names, tuple(chosen)))

    def with_classes(
        self, class_names: Sequence[str], templates: str | Sequence[str] | None = None, method: str | None = None
    ) -> Detector:
        """Another detector on the same weights in memory, with classes, a method and a threshold of its own.

        Raises ValueError for an unknown method, no names or an empty one.
        """
        other = copy.copy(self)
        other.method = self.method if method is None else method
        _check_method(other.method)
        other.set_classes(class_names, templates)
        return other

    def predict(
        self, images: AnyImage | Iterable[AnyImage], batch_size: int = 32, on_error: str = "raise"
    ) -> Result | list[Result] | Iterator[Result]:
        """Judge one picture (a Result), a list, tuple or batch of them (a list), or an iterator's (an iterator).

        images: paths, a file's bytes, PIL images, arrays or tensors, as `clipn.images.any_image` takes them. An
            iterator is read a batch ahead, so any number of pictures needs no more memory than one batch.
        on_error: "raise", or "return" to get the ValueError or OSError in the place of a result.

        Raises ValueError or FileNotFoundError that names an image which cannot be read. URLs are never fetched.
        """
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error={on_error!r}: expected raise or return")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more")
        if _is_one(images):
            return next(self._results([images], self._judge, 1, on_error))
        results = self._results(images, self._judge, batch_size, on_error)
        return list(results) if isinstance(images, Sized) else results

    def calibrate(self, id_images: AnyImage | Iterable[AnyImage], keep: float = 0.95, batch_size: int = 32) -> float:
        """Set, and return, the threshold that keeps this share of in-distribution pictures.

        Raises ValueError for no pictures, a share outside of (0, 1], or classes that were changed meanwhile.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: expected a share above 0, up to 1")
        judge, images = self._judge, [id_images] if _is_one(id_images) else id_images
        scores = [result.score for result in self._results(images, judge, batch_size, "raise")]
        if not scores:
            raise ValueError("calibrate: expected at least one in-distribution picture, found none")
        threshold = float(np.quantile(scores, 1 - keep, method="lower"))  # at least `keep` of them reach it
        with self._changing:
            if self._judge.head is not judge.head:
                raise ValueError("calibrate: the classes were changed meanwhile; calibrate again")
            self._judge = judge._replace(threshold=threshold)
        return threshold

    def _results(self, images: Iterable[AnyImage], judge: _Judge, batch_size: int, on_error: str) -> Iterator[Any]:
        ahead = 0 if batch_size == 1 else batch_size
        for batch in _batches(_map_ahead(self._tensor, enumerate(images), ahead), batch_size):
            good = [found for found in batch if not isinstance(found, Exception)]
            results = iter(self._judged(torch.stack(good), judge) if good else [])
            for found in batch:
                if isinstance(found, Exception) and on_error == "raise":
                    raise found
                yield found if isinstance(found, Exception) else next(results)

    @torch.inference_mode()
    def _judged(self, pixels: Tensor, judge: _Judge) -> list[Result]:
        """[B, 3, H, W] preprocessed -> B results."""
        features = self.model.encode_image(pixels.to(self.device))
        logits_yes, logits_no = judge.head(features, self.scale)
        scores = {name: score(logits_yes, logits_no, self.scale).tolist() for name, score in SCORES.items()}
        says_ood = [None] * len(pixels)
        if judge.threshold is not None:
            says_ood = [score < judge.threshold for score in scores[self.method]]
        elif self.method in DECISIONS:
            says_ood = DECISIONS[self.method](logits_yes, logits_no).tolist()
        each = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
        rows = zip(each, says_ood, logits_yes.cpu(), logits_no.cpu(), strict=True)
        return [Result(self.method, *row, judge.class_names) for row in rows]

    def _tensor(self, numbered: tuple[int, AnyImage]) -> Tensor | Exception:
        """One picture, preprocessed; or what is wrong with it."""
        number, image = numbered
        try:
            picture = any_image(image)
            return self._preprocessed(picture) if isinstance(picture, Tensor) else self.preprocess(picture)
        except (ValueError, OSError) as error:
            return error if isinstance(image, (str, Path)) else type(error)(f"image {number}: {error}")

    def _preprocessed(self, pixels: Tensor) -> Tensor:
        size = self.model.preprocess["size"]
        shape = (3, size, size) if isinstance(size, int) else (3, *size)
        how = "pixels are uint8; or give detector.preprocess(picture)"
        if not pixels.is_floating_point() or tuple(pixels.shape) != shape:
            raise ValueError(
                f"{pixels.dtype} tensor of shape {list(pixels.shape)}: expected {list(shape)} floats; {how}"
            )
        if not pixels.isfinite().all() or (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"a float tensor of values in 0..1, or not finite, is not normalised: {how}")
        return pixels.float().cpu()

    def _head(self, names: tuple[str, ...], templates: tuple[str, ...]) -> Head:
        """The classes' weights, of which only those of new names are computed."""
        if len(self._weights) + len(names) > _MOST_KEPT:
            self._weights.clear()
        new = [name for name in dict.fromkeys(names) if (templates, name) not in self._weights]
        if new:
            self._warn_of_cut(new, templates)
            made = build_head(self.model, self._tokenizer, new, templates)
            rows = zip(made.weight_yes, made.weight_no, strict=True)
            self._weights |= {(templates, name): row for name, row in zip(new, rows, strict=True)}
        chosen = [self._weights[templates, name] for name in names]
        return Head(*(torch.stack(rows) for rows in zip(*chosen, strict=True)))

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


def _check_method(method: str) -> None:
    if method not in SCORES:
        raise ValueError(f"method={method!r}: expected one of {', '.join(SCORES)}")


def _is_one(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim in (2, 3)
    return isinstance(images, (str, Path, bytes, Image.Image)) or isinstance(images, Tensor) and images.ndim < 4


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch


def _map_ahead(function: Callable[[Any], T], items: Iterable[Any], ahead: int) -> Iterator[T]:
    """`function` of each item, in order, by threads that are up to `ahead` items before the one asked for."""
    if not ahead:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_DECODERS) as pool:
        pending: deque[Future[T]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # nobody waits for the rest of an iterator that is given up
            pool.shutdown(wait=False, cancel_futures=True)
