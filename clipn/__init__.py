"""CLIPN: teach CLIP to say no. Convention: a higher score always means in-distribution."""

from . import losses, metrics, scores
from .base import get_tokenizer
from .detector import Detector
from .head import Head, build_head
from .images import open_image
from .model import CLIPN, create_model_and_transforms
from .result import Result

__version__ = "0.1.0"

__all__ = [
    "CLIPN",
    "Detector",
    "Head",
    "Result",
    "build_head",
    "create_model_and_transforms",
    "get_tokenizer",
    "losses",
    "metrics",
    "open_image",
    "scores",
]
