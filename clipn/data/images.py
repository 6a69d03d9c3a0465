"""Images: from bytes, files, arrays and tensors to RGB images, and to the tensors of a model."""

import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

PIXELS_SUFFIX = ".npy"  # of files with float pixels [3, H, W] in 0..1, in the size of a model
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_MAX_ASPECT_RATIO = 1000  # beyond it, resizing the short side would fill the memory

Transform = Callable[[Image.Image], Tensor]
AnyImage = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor  # what `to_image` takes


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images. The defaults are the paper's: a mild crop and nothing else."""

    crop_scale: Sequence[float] = (0.9, 1.0)  # share of the image's area
    flip: float = 0.0  # probability
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation
    erase: float = 0.0  # probability


def open_image(source: str | Path | bytes) -> Image.Image:
    """The RGB image of a file or a file's bytes. Raises OSError, ValueError or DecompressionBombError."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return to_rgb(image)


def decode_pixels(content: bytes) -> Tensor:
    """The RGB pixels [3, H, W] in uint8 of a file's bytes, those of `open_image`; raises what it raises.

    JPEGs are decoded by torchvision, which is faster. PIL decodes the other kinds, CMYK, what EXIF data rotates, and
    what torchvision refuses.
    """
    with Image.open(io.BytesIO(content)) as image:  # reads the header only
        _check_shape(image)
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        if image.format == "JPEG" and image.mode in ("RGB", "L") and not turned:
            with suppress(RuntimeError):
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        return v2.functional.pil_to_tensor(to_rgb(image))


def _check_shape(image: Image.Image) -> None:
    if min(image.size) < 1 or max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        limit = f"{_MAX_ASPECT_RATIO} times as long as wide"
        raise ValueError(f"{image.width} x {image.height} pixels: empty, or more than {limit}")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits a channel, rotated as its EXIF data says. Raises ValueError for an empty or thin one."""
    _check_shape(image)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits or a float a pixel, which PIL would clip, not scale
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode == "F" and values.max() <= 1:
            values = values * 255
        elif image.mode not in "IF" or values.max() > 255:
            values = values / 256
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def to_image(image: AnyImage) -> Image.Image | Tensor:
    """Any kind of image as an RGB image; a preprocessed tensor is returned as it is.

    Paths, a file's bytes and open files are decoded. Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], of 0..255 in
    uint8 or 0..1 in floats. Tensors are pixels [1 or 3, H, W] in uint8, or outputs of `val_transform` in floats. URLs
    are refused. Raises ValueError or FileNotFoundError for an unreadable image.
    """
    if isinstance(image, Tensor):
        return _from_tensor(image) if image.dtype == torch.uint8 else image
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, str) and "://" in image:
        raise ValueError(f"{image}: URLs are not downloaded; pass the path or bytes of a local file")
    if isinstance(image, (str, Path)):
        name = str(image)
        if not Path(image).exists():
            raise FileNotFoundError(f"{name}: no such file")
        if not Path(image).is_file():  # a pipe or a device may never end
            kind = "a folder; give a list of its images" if Path(image).is_dir() else "not a file"
            raise ValueError(f"{name}: {kind}")
    elif isinstance(image, Image.Image):
        name = "PIL image"
    elif hasattr(image, "read"):
        image, name = image.read(), "open file"
        if not isinstance(image, bytes):
            raise ValueError(f"{name}: read() returns {type(image).__name__}, expected bytes; open it in binary mode")
    elif isinstance(image, (bytes, bytearray, memoryview)):
        image, name = bytes(image), "bytes"
    else:
        kinds = "a path, bytes, an open file, a PIL image, an array or a tensor"
        raise ValueError(f"{type(image).__name__}: not an image; expected {kinds}")
    try:
        return to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: no image, or of an unknown format") from error
    except Exception as error:  # PIL raises many kinds
        reason = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"{name}: no readable image: {reason}") from error


def is_one_image(images: Any) -> bool:
    """Whether `images` is one image for `to_image`, not several. Raises ValueError for any other value."""
    if isinstance(images, np.ndarray):
        return images.ndim in (2, 3)
    if isinstance(images, Tensor):
        return images.ndim < 4
    if isinstance(images, (str, Path, bytes, bytearray, memoryview, Image.Image)) or hasattr(images, "read"):
        return True
    if not isinstance(images, Iterable):
        raise ValueError(f"{images!r}: expected an image, or a list or iterator of images")
    return False


def _from_array(array: np.ndarray) -> Image.Image:
    grey = array.ndim == 2 or array.ndim == 3 and array.shape[2] == 1
    if not array.size or not grey and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"array of shape {list(array.shape)}: expected [height, width] or [height, width, 1, 3 or 4]")
    if array.dtype == bool or array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"array of {array.dtype}: expected values of 0..1, or of 0..255 in uint8")
        array = (array * 255.0).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"array of {array.dtype}: expected values of 0..255 in uint8, or of 0..1 in floats")
    return Image.fromarray(array[..., 0] if grey and array.ndim == 3 else array).convert("RGB")


def _from_tensor(pixels: Tensor) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel():
        raise ValueError(f"uint8 tensor of shape {list(pixels.shape)}: expected [1 or 3, height, width]")
    return _from_array(pixels.permute(1, 2, 0).cpu().numpy())


def pixel_transform(
    preprocess: dict, augmentation: Augmentation | None = None
) -> Callable[[Image.Image | Tensor], Tensor]:
    """RGB image, or its uint8 pixels [3, H, W] -> augmented uint8 pixels in the size of `preprocess`, open_clip's dict.

    Both kinds of input make the same draws. A tensor's pixels differ from those of a PIL image by rounding only, and
    are resized several times faster.
    """
    cfg, augmentation = PreprocessCfg(**preprocess), augmentation or Augmentation()
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [v2.RandomResizedCrop(cfg.size, scale=tuple(augmentation.crop_scale), interpolation=bicubic)]
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    if augmentation.color_jitter:
        steps.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))
    steps.append(v2.PILToTensor())
    if augmentation.erase:
        mean = [round(255 * value) for value in cfg.mean]
        steps.append(v2.RandomErasing(augmentation.erase, scale=(0.02, 0.25), value=mean))
    return v2.Compose(steps)


def pixel_input(preprocess: dict, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from uint8 pixels [..., 3, H, W] to a model's input on `device`, as `val_transform` normalises it."""
    mean, std = (torch.tensor(preprocess[name], device=device)[:, None, None] for name in ("mean", "std"))
    return lambda pixels: pixels.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)


def train_transform(preprocess: dict) -> Transform:
    """RGB image -> randomly cropped, normalised [3, H, W]: open_clip's training transform, with the paper's crop."""
    to_float = transforms.ConvertImageDtype(torch.float32)
    return transforms.Compose([pixel_transform(preprocess), to_float, normalise(preprocess)])


def val_transform(preprocess: dict) -> Transform:
    """Image -> resized, centre-cropped, normalised [3, H, W]: open_clip's inference transform."""
    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def normalise(preprocess: dict) -> Callable[[Tensor], Tensor]:
    """Pixels [..., 3, H, W] in 0..1 -> the input of a model, with the statistics of `preprocess`."""
    return transforms.Normalize(preprocess["mean"], preprocess["std"])


def merge_preprocess(own: dict, stored: dict, source: str) -> dict:
    """A tower's own preprocessing, updated with the statistics and resizing stored in a checkpoint.

    Raises ValueError for unknown keys, impossible values, or a size that is not the tower's.
    """
    merged = {**own, **stored}
    try:
        val_transform(merged)  # fails for keys and values that open_clip does not know
        mean, std = (np.array(merged[key], dtype=float) for key in ("mean", "std"))
        ok = mean.shape == std.shape == (3,) and np.isfinite([mean, std]).all() and (std > 0).all()
        ok = ok and np.all(np.array(merged["size"]) == np.array(own["size"]))
    except (TypeError, ValueError, KeyError, AssertionError):
        ok = False
    if not ok:
        expected = f"open_clip's keys, 3 means, 3 deviations above 0, and the tower's size {own['size']}"
        raise ValueError(f"{source}: preprocess={stored!r}: expected {expected}")
    return merged
