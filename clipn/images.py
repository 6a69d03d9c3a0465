"""Images: bytes or files -> RGB pictures -> the tensors that a model was trained on."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied. The defaults are the paper's: a mild crop and nothing else."""

    crop_scale: Sequence[float] = (0.9, 1.0)  # share of the image's area
    flip: float = 0.0  # probability
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation
    erase: float = 0.0  # probability


def open_image(source: str | Path | bytes) -> Image.Image:
    """Decode a file or a file's bytes to RGB: the first frame, upright as its EXIF data says, 8 bits a channel.

    Raises OSError, ValueError or PIL's DecompressionBombError when it is no readable image.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image)  # a camera's pictures may lie on their side
        if upright.mode[0] in "IF":  # 16 bits or a float a pixel, which PIL would clip, not scale
            upright = _to_8_bits(upright)
        return upright.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F" and values.max() <= 1:
        values = values * 255
    elif image.mode not in "IF" or values.max() > 255:
        values = values / 256
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def train_transform(preprocess: dict, augmentation: Augmentation | None = None) -> Transform:
    """RGB image -> random crop, normalised [3, H, W], with the statistics of `preprocess` (open_clip's dict)."""
    cfg, augmentation = PreprocessCfg(**preprocess), augmentation or Augmentation()
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.RandomResizedCrop(cfg.size, scale=tuple(augmentation.crop_scale), interpolation=bicubic)]
    if augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip(augmentation.flip))
    if augmentation.color_jitter:
        steps.append(transforms.ColorJitter(*[augmentation.color_jitter] * 3))
    steps += [transforms.ToTensor(), transforms.Normalize(cfg.mean, cfg.std)]
    if augmentation.erase:
        steps.append(transforms.RandomErasing(augmentation.erase, scale=(0.02, 0.25)))
    return transforms.Compose(steps)


def val_transform(preprocess: dict) -> Transform:
    """Image -> resized, centre-cropped, normalised [3, H, W]: open_clip's inference transform."""
    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def default_preprocess(image_size: int | Sequence[int]) -> dict:
    """open_clip's preprocessing (OpenAI's statistics) for a model that says nothing of its own."""
    return asdict(PreprocessCfg(size=image_size))
