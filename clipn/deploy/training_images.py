"""What a Detector keeps of in-distribution training images: their features and labels."""

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from clipn.features.store import Columns
from clipn.methods.tokens import open_tokens
from clipn.model.clipn import CLIPN
from clipn.runtime.console import shortened

log = logging.getLogger(__name__)


@torch.no_grad()
def encode_training(
    model: CLIPN,
    batches: Iterable[list[Tensor | Exception]],
    labels: Sequence[int | str] | None,
    class_names: Sequence[str],
    on_error: str = "raise",
    find_tokens: Callable[[Tensor], Columns] | None = None,
) -> dict[str, Any]:
    """The fields of MethodInputs that describe training images: train [M, D], train_tower [M, W], labels [M] or None.

    batches: normalised images [3, H, W], or the errors of unreadable ones. labels: a number or a name for each image.
    on_error: "raise", or "skip" to leave unreadable images out with a warning. find_tokens: images [B, 3, H, W] -> the
    columns of `open_tokens`, which are then the field `tokens`.

    Raises ValueError for no images, and for labels that are not the classes' or of another number.
    """
    numbers = None if labels is None else _numbers(labels, class_names)
    features, tower, tokens, kept, total = [], [], [], [], 0
    for batch in batches:
        for image in batch:
            if not isinstance(image, Exception):
                kept.append(total)
            elif on_error == "raise":
                raise image
            else:
                log.warning("left out: %s", image)
            total += 1
        images = [image for image in batch if isinstance(image, Tensor)]
        if images:
            pixels = torch.stack(images).to(model.logit_scale.device)
            of_images, outputs = model.encode_image_with_tower(pixels)
            features.append(of_images.cpu())
            tower.append(outputs)
            if find_tokens:
                tokens.append(find_tokens(pixels))
    if not kept:
        raise ValueError(f"fit: expected in-distribution images, got {total}, none of them readable")
    if numbers is not None and len(numbers) != total:
        raise ValueError(f"fit: {len(numbers)} labels for {total} images")
    labels = None if numbers is None else numbers[kept]
    training = {"train": torch.cat(features), "train_tower": torch.cat(tower), "labels": labels}
    return training | {"tokens": open_tokens(tokens, model.logit_scale.device) if find_tokens else None}


def _numbers(labels: Sequence[int | str], class_names: Sequence[str]) -> Tensor:
    """Class names or numbers as numbers [M]."""
    if not isinstance(labels, Iterable) or isinstance(labels, (str, bytes, dict)):
        raise ValueError(f"fit: labels={labels!r}: expected a name or a number for each image")
    by_name, numbers = {name: number for number, name in reversed(list(enumerate(class_names)))}, []
    for label in labels:
        try:
            number = by_name[label] if isinstance(label, str) else operator.index(label)
        except (KeyError, TypeError, ValueError):
            number = -1
        if isinstance(label, bool) or not 0 <= number < len(class_names):
            choices = f"0 to {len(class_names) - 1}, or {shortened(class_names, 5)}"
            raise ValueError(f"fit: label {label!r} is no class: expected {choices}")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.long)
