"""SHA-256 hashes of weights: which base a shared file belongs to, and which weights stored features come from."""

import hashlib

import torch
from torch import Tensor, nn

from clipn.model.checkpoint import base_weights


def base_hash(state: dict[str, Tensor]) -> str:
    """The hash of the base CLIP in a flat state_dict: over names and values as float32, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(base_weights(state).items()):
        digest.update(name.encode())
        digest.update(_bytes(value.float() if value.is_floating_point() else value))
    return digest.hexdigest()


def weights_hash(*modules: nn.Module) -> str:
    """The hash of modules' weights: over names, dtypes, shapes and values."""
    named = ((name, value) for module in modules for name, value in module.state_dict().items())
    return hashlib.sha256("".join(f"{name} {tensor_hash(value)}" for name, value in named).encode()).hexdigest()


def tensor_hash(value: Tensor) -> str:
    """The hash of a tensor: over dtype, shape and values."""
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
