"""Heads for changing class names: each name is encoded once."""

import logging
import reprlib
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from clipn.data.prompts import fill, warn_of_shared_names
from clipn.model.base import context_length, get_tokenizer
from clipn.model.clipn import CLIPN
from clipn.model.head import Head, build_head
from clipn.runtime.console import shortened

log = logging.getLogger(__name__)

_CAPACITY = 100_000  # class names whose weights are kept, 4 KB each for ViT-B-16


class ClassWeights:
    """A cache of class weights. Any thread may ask; only those with new names wait for the text towers."""

    def __init__(self, model: CLIPN) -> None:
        self._model, self._tokenizer = model, get_tokenizer(model.architecture)
        self._weights: dict[tuple[tuple[str, ...], str], tuple[Tensor, Tensor]] = {}
        self._lock = threading.Lock()

    def head(self, class_names: Sequence[str], templates: tuple[str, ...]) -> Head:
        """The head of these class names; only names that are not in the cache are encoded."""
        warn_of_shared_names(class_names)
        weights = {name: self._weights.get((templates, name)) for name in class_names}
        new = [name for name, pair in weights.items() if pair is None]
        if new:
            with self._lock:
                self._warn_of_truncation(new, templates)
                head = build_head(self._model, self._tokenizer, new, templates)
                for name, yes, no in zip(new, head.weight_yes, head.weight_no, strict=True):
                    weights[name] = yes.clone(), no.clone()  # a clone does not keep the whole head
                if len(self._weights) + len(new) > _CAPACITY:
                    self._weights.clear()
                self._weights |= {(templates, name): weights[name] for name in new}
        yes_and_no = map(torch.stack, zip(*(weights[name] for name in class_names), strict=True))
        return Head(*yes_and_no, self._model.cosine_bias)

    def _warn_of_truncation(self, names: Sequence[str], templates: Sequence[str]) -> None:
        length = context_length(self._model.architecture)
        texts = [fill(max(templates, key=len), name) for name in names]
        differs = (self._tokenizer(texts) != self._tokenizer(texts, 2 * length)[:, :length]).any(dim=1)
        truncated = [reprlib.repr(name) for name, differ in zip(names, differs, strict=True) if differ]
        if truncated:
            message = "%d class names exceed the model's %d tokens and are truncated: %s"
            log.warning(message, len(truncated), length, shortened(truncated, 5))
