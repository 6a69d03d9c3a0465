"""One process or many: who am I, on which device, and the few exchanges that training needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def choose_device(name: str) -> torch.device:
    """The device for `run.device`: auto takes this rank's GPU if there is one, else the CPU.

    Raises ValueError for another kind of device, and when a GPU is asked for that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name}: this machine has {torch.cuda.device_count()} visible GPUs")
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started (NCCL on CUDA, gloo on the CPU); a single process joins nothing."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ranks may wait long for one that indexes shards or draws a world; torchrun ends them when one of them dies.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's rows [b, ...] in rank order -> [world_size * b, ...]. Carries no gradient."""
    if world_size() == 1:
        return rows.detach()
    everyone = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(everyone, rows.detach().contiguous())
    return torch.cat(everyone)


def gather_values(value: Any) -> list[Any]:
    """Every rank's small Python value, in rank order."""
    if world_size() == 1:
        return [value]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise mean of a small tensor over the ranks."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values
