"""Mixed precision: the values of train.precision, features.precision and eval.precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast context of "bf16" or "fp16"; an empty context for "fp32"."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()


@contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """A context with gradients and full precision, whatever the caller's own contexts."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield
