"""Any kind of image -> the normalised pixels that the image tower reads."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from clipn.config.checks import require
from clipn.data.images import AnyImage, Transform, to_image
from clipn.deploy.batches import map_batches

log = logging.getLogger(__name__)


class PixelReader:
    """Reads images with the preprocessing of a model.

    preprocess: open_clip's description of it; transform: RGB image -> normalised [3, H, W].
    """

    def __init__(self, preprocess: dict, transform: Transform) -> None:
        self.preprocess, self.transform = preprocess, transform

    def batches(self, images: Iterable[AnyImage], size: int) -> Iterator[list[Tensor | Exception]]:
        """Lists of `size` images [3, H, W], with the error of an unreadable one in its place; read one batch ahead."""
        require(type(size) is int and size > 0, "batch_size", size, "a whole number, 1 or more")
        return map_batches(self._read, enumerate(images), size)

    def _read(self, numbered: tuple[int, AnyImage]) -> Tensor | Exception:
        number, source = numbered
        try:
            image = to_image(source)
            return self._check(image) if isinstance(image, Tensor) else self.transform(image)
        except (ValueError, OSError, MemoryError, OverflowError) as error:
            names_path = isinstance(error, (ValueError, OSError)) and isinstance(source, (str, Path))
            return error if names_path else ValueError(f"image {number}: {error or type(error).__name__}")

    def _check(self, pixels: Tensor) -> Tensor:
        size, advice = self.preprocess["size"], "give pixels as uint8, or detector.preprocess(image)"
        shape, expected = list(pixels.shape), [3, size, size] if isinstance(size, int) else [3, *size]
        if not pixels.is_floating_point() or shape != expected:
            raise ValueError(f"{pixels.dtype} tensor of shape {shape}: expected {expected} floats; {advice}")
        if not pixels.isfinite().all():
            raise ValueError(f"float tensor with values that are not finite; {advice}")
        pixels = pixels.float().cpu()
        mean, std = (torch.tensor(self.preprocess[key])[:, None, None] for key in ("mean", "std"))
        largest, unprocessed = float(pixels.max()), "a float tensor of values %s is used as already normalised; %s"
        if (pixels * std + mean).max() > 2:  # at most 1 if they are normalised
            log.warning(unprocessed, f"up to {largest:g}", advice)
        elif mean.any() and pixels.min() >= 0 and largest <= 1:
            log.warning(unprocessed, "in 0..1", advice)
        return pixels
