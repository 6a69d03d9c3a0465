"""One process or many: this process's rank and device, and the exchanges that training needs.

Two process groups: the default one (NCCL on CUDA, gloo on the CPU) for tensors of a training step, with a timeout of
minutes; and a gloo group for values on the host, where a rank may wait for hours.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_STEP_TIMEOUT = timedelta(minutes=10)
_HOST_TIMEOUT = timedelta(days=2)  # one rank indexes shards, makes a world or writes; torchrun ends ranks that wait

_host_group = None  # the gloo group


def choose_device(name: str) -> torch.device:
    """The device for `run.device`: auto is this rank's CUDA GPU if there is one, else the CPU.

    Raises ValueError for an unknown device, and for one that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name}: this machine has {torch.cuda.device_count()} visible GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps: not available; it needs a Mac with Apple silicon and PyTorch built for it")
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started; a single process joins nothing. Raises ValueError for ranks on mps."""
    global _host_group
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "mps":
        raise ValueError("device=mps: runs in one process; use NPROC=1, or run.device=cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_STEP_TIMEOUT)
    _host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
    try:
        yield
    finally:
        _host_group = None
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait for every rank, for hours if need be."""
    if dist.is_initialized():
        dist.barrier(_host_group)


def gather_values(value: Any) -> list[Any]:
    """Every rank's small Python value, in rank order; on the host."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def sum_over_ranks(values: list[float]) -> list[float]:
    """The elementwise sum of numbers over the ranks; on the host, so without waiting for the device."""
    total = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total, group=_host_group)
    return total.tolist()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's rows [b, ...] in rank order -> [world_size * b, ...]. Carries no gradient."""
    if world_size() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise mean of a small tensor over the ranks."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values
