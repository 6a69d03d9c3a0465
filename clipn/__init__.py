"""CLIPN: teach CLIP to say no. Convention: a higher score always means in-distribution."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipn import losses, metrics, scores
    from clipn.data.images import open_image
    from clipn.deploy.detector import Detector
    from clipn.deploy.result import Result
    from clipn.model.base import get_tokenizer
    from clipn.model.clipn import CLIPN, create_model_and_transforms
    from clipn.model.head import Head, build_head

__version__ = "0.2.0"

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

_MODULES = {  # where each public name is defined; losses, metrics and scores are modules themselves
    "CLIPN": "model.clipn",
    "Detector": "deploy.detector",
    "Head": "model.head",
    "Result": "deploy.result",
    "build_head": "model.head",
    "create_model_and_transforms": "model.clipn",
    "get_tokenizer": "model.base",
    "open_image": "data.images",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `clipn --help` does not load PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES.get(name, name)}")
    return getattr(module, name) if name in _MODULES else module
