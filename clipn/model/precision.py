"""Mixed precision: the values of train.precision, features.precision and eval.precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast context of "bf16" or "fp16"; an empty context for "fp32"."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()
