"""The images in report.html: figures, thumbnails, and which images its gallery shows."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from clipn.data.images import open_image

_WORST = 12  # images of each set in the gallery
_LARGEST_PNG = 1_000_000  # bytes; only figures of photos are larger


def figure_uri(path: Path) -> str:
    """A figure file as a data URI, recompressed as JPEG when the PNG is large."""
    large = path.stat().st_size > _LARGEST_PNG
    return _data_uri(_encoded(open_image(path), "jpeg"), "jpeg") if large else _data_uri(path.read_bytes(), "png")


def worst_mistakes(scores: np.ndarray, is_id: bool) -> list[int]:
    """The numbers of the images with the most wrong scores: the lowest of an ID set, the highest of an OOD set."""
    return np.argsort(scores if is_id else -scores, kind="stable")[:_WORST].tolist()


def thumbnail_uri(path: Path, pixels: int = 160) -> str:
    """An image file, reduced to this size, as a data URI: a JPEG, or a PNG of the exact pixels of a tiny image."""
    image = open_image(path)
    kind = "png" if max(image.size) <= pixels // 2 else "jpeg"
    image.thumbnail((pixels, pixels))
    return _data_uri(_encoded(image, kind), kind)


def _encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, quality=80)
    return stream.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
