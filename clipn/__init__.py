"""CLIPN: teach CLIP to say no. Convention: a higher score always means in-distribution."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "base": ["get_tokenizer"],
    "detector": ["Detector"],
    "head": ["Head", "build_head"],
    "images": ["open_image"],
    "model": ["CLIPN", "create_model_and_transforms"],
    "result": ["Result"],
}


def __getattr__(name: str) -> Any:
    """A public name when it is first asked for: `clipn --help` need not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), None)
    return getattr(import_module(f".{home}", __name__), name) if home else import_module(f".{name}", __name__)
