"""CLIPN: teach CLIP to say no. Convention: a higher score always means in-distribution."""

from . import losses, metrics, scores
from .head import Head, build_head
from .images import open_image
from .model import CLIPN, create_model_and_transforms, get_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CLIPN",
    "Head",
    "build_head",
    "create_model_and_transforms",
    "get_tokenizer",
    "losses",
    "metrics",
    "open_image",
    "scores",
]
