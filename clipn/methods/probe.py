"""Pseudo-label probing (PLP) and linear probing (LP), TMLR 2024, arXiv 2303.05828. Higher means in-distribution.

A linear probe is trained on the image tower's outputs [N, W] (before projection, not normalised; a tensor or mapped
rows) of ID training images. Its labels are CLIP's own zero-shot predictions (PLP) or true labels (LP). Nothing here
depends on the no tower, so one probe serves all checkpoints of a base.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from clipn.config.evaluation import ProbeConfig
from clipn.features.columns import IN_MEMORY, Rows
from clipn.model.hashing import tensor_hash
from clipn.runtime.distributed import barrier, is_main
from clipn.runtime.files import atomic_write
from clipn.runtime.signals import stop_if_asked

log = logging.getLogger(__name__)

PROMPTS = (  # of the pseudo-labels and of MCM-5, whatever eval.templates are
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a photo of many {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
)

_ROWS = 8192  # images in a block


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier of standardised outputs: weight [C, W], bias [C], mean [W], std [W]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, tower: Tensor) -> Tensor:
        """Outputs of the image tower [B, W] -> [B, C], on the probe's device."""
        rows = (tower.to(self.weight.device).float() - self.mean) / self.std
        return torch.addmm(self.bias, rows, self.weight.T)


def pseudo_labels(features: Tensor, weight_yes: Tensor) -> Tensor:
    """The class [N] of the largest cosine: features [N, D] and class weights [C, D], both L2-normalised.

    Raises ValueError for features that are not finite.
    """
    labels = []
    for block in features.split(_ROWS):
        if not block.isfinite().all():
            raise ValueError("pseudo-labels: the image features hold NaN or infinity")
        labels.append((block.to(weight_yes.device).float() @ weight_yes.T).argmax(dim=1))
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.long)


def learning_rate(step: int, steps: int, settings: ProbeConfig) -> float:
    """Linear growth from 0 in the first steps, then a cosine to 0; steps count from 0."""
    warmup = int(settings.warmup * steps)
    if step < warmup:
        return settings.lr * step / max(warmup - 1, 1)
    return settings.lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def fit_probe(
    tower: Rows,
    labels: Tensor,
    num_classes: int,
    settings: ProbeConfig,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    batches: Sequence[Tensor] | None = None,
) -> Probe:
    """Fit a linear probe to tower outputs [N, W] and labels [N], on the device of the outputs.

    The outputs are standardised with their mean and unbiased standard deviation (0 counts as 1). The objective is the
    mean cross-entropy plus weight_decay / 2 * (|weight|^2 + |bias|^2). "adam" takes the steps of the paper's code, with
    the decay in the gradient, and stops short of the optimum. "lbfgs" finds the optimum: for three classes or more,
    that of scikit-learn's LogisticRegression(C=1 / (weight_decay * N), fit_intercept=False) on the standardised
    outputs with a column of ones for the bias.

    weight, bias: a given start; by default that of nn.Linear. batches: the row numbers of each step of "adam", instead
    of drawn ones. Raises ValueError for outputs and labels that do not fit, fewer images than classes, and outputs
    that are not finite.
    """
    _check(tower, labels, num_classes)
    device, labels = tower.device, labels.to(tower.device).long()
    mean, std = (value.float() for value in _moments(tower))
    generator, width = torch.Generator().manual_seed(settings.seed), tower.shape[1]
    drawn = nn.init.kaiming_uniform_(torch.empty(num_classes, width), a=math.sqrt(5), generator=generator)
    weight = (drawn if weight is None else weight.detach().float()).to(device, copy=True)
    drawn = torch.empty(num_classes).uniform_(-(width**-0.5), width**-0.5, generator=generator)
    bias = (drawn if bias is None else bias.detach().float()).to(device, copy=True)

    def standardised(rows: Tensor | slice) -> Tensor:
        return (tower[rows].float() - mean).div_(std)

    take = standardised
    if 4 * len(tower) * width <= IN_MEMORY:
        take = standardised(slice(None)).__getitem__  # float32 only where it is small
    if settings.solver == "lbfgs":
        weight, bias = _minimise(take, labels, weight, bias, settings)
    else:
        _descend(take, labels, weight, bias, settings, batches)
    return Probe(weight, bias, mean, std)


def stored_probe(
    folder: str | Path,
    tower: Rows,
    labels: Tensor,
    num_classes: int,
    settings: ProbeConfig,
    probe: Probe | None = None,
) -> Probe:
    """The probe in a folder that was fitted to the same data with the same settings; fits and writes it if missing.

    probe: what was fitted to them already. Rank 0 fits. Raises ValueError as `fit_probe` does, and for a damaged file.
    """
    _check(tower, labels, num_classes)
    options = dataclasses.asdict(settings) | {"classes": num_classes, "format": 1}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode() + tensor_hash(labels.long()).encode())
    for start in range(0, len(tower), _ROWS):
        digest.update(tensor_hash(tower[start : start + _ROWS]).encode())
    path = Path(folder) / f"{digest.hexdigest()[:16]}.safetensors"
    if is_main() and not path.is_file():
        probe = probe or fit_probe(tower, labels, num_classes, settings)
        with atomic_write(path) as file:
            file.write(save({name: value.cpu().contiguous() for name, value in vars(probe).items()}))
    barrier()
    try:
        return Probe(**{name: value.to(tower.device) for name, value in load_file(path).items()})
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path}: not a probe ({error}); delete it, and it is fitted again") from error


def _check(tower: Rows, labels: Tensor, num_classes: int) -> None:
    count = len(tower)
    if len(tower.shape) != 2 or count < 2:
        raise ValueError(f"probe: expected outputs [N, W] of two training images or more, got {[*tower.shape]}")
    if labels.shape != (count,):
        raise ValueError(f"probe: {count} training images, but labels of shape {[*labels.shape]}")
    if num_classes < 2:
        raise ValueError(f"probe: {num_classes} class; a probe tells classes apart and needs two or more")
    if count < num_classes:
        raise ValueError(f"probe: {count} training images are too few for {num_classes} classes")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"probe: labels from {labels.min()} to {labels.max()}; there are {num_classes} classes")


def _moments(tower: Rows) -> tuple[Tensor, Tensor]:
    """Mean [W] and unbiased standard deviation [W], 0 as 1, in float64 about the first row, block by block."""
    first = tower[:1].double()[0]
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for start in range(0, len(tower), _ROWS):
        differences = tower[start : start + _ROWS].double() - first
        if not differences.sum().isfinite():
            row = start + int((~differences.isfinite().all(dim=1)).nonzero()[0])
            hint = "; with features.dtype=float16, try float32" if tower[:1].dtype == torch.float16 else ""
            raise ValueError(f"probe: the outputs of training image number {row} hold NaN or infinity{hint}")
        total += differences.sum(dim=0)
        squares += differences.square_().sum(dim=0)
    count = len(tower)
    std = ((squares - total.square() / count) / (count - 1)).clamp(min=0).sqrt()
    return first + total / count, torch.where(std == 0, torch.ones_like(std), std)


def _descend(
    take: Callable[[Tensor], Tensor],
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    settings: ProbeConfig,
    batches: Sequence[Tensor] | None,
) -> None:
    """Take the steps of Adam in place. The gradient is explicit: softmax minus one-hot."""
    optimizer = torch.optim.Adam([weight, bias], weight_decay=settings.weight_decay, fused=True)
    steps = len(batches) if batches else settings.epochs * math.ceil(len(labels) / settings.batch_size)
    cost = 4 * len(labels) * weight.numel() / 1e12
    message = "probe: %d images x %d outputs, %d classes: %d steps, about %.3g TFLOP an epoch, %.3g in all"
    log.info(message, len(labels), weight.shape[1], len(weight), steps, cost, cost * settings.epochs)
    for step, rows in enumerate(_progress(batches or _draw_batches(labels, settings), steps)):
        stop_if_asked()
        outputs, targets = take(rows.to(labels.device)), labels[rows.to(labels.device)]
        error = torch.addmm(bias, outputs, weight.T).softmax(dim=1)
        error[torch.arange(len(targets), device=error.device), targets] -= 1
        error /= len(targets)
        weight.grad, bias.grad = error.T @ outputs, error.sum(dim=0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        optimizer.step()


def _draw_batches(labels: Tensor, settings: ProbeConfig) -> Iterator[Tensor]:
    """The row numbers of each step: every epoch in another random order, the short last batch kept."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        yield from torch.randperm(len(labels), generator=generator).to(labels.device).split(settings.batch_size)


def _minimise(
    take: Callable[[slice], Tensor], labels: Tensor, weight: Tensor, bias: Tensor, settings: ProbeConfig
) -> tuple[Tensor, Tensor]:
    """The weight and bias of least objective, by L-BFGS in float64 from this start."""
    weight, bias, count = weight.double(), bias.double(), len(labels)
    options = {"max_iter": 10_000, "max_eval": 10_000, "tolerance_grad": 1e-8, "tolerance_change": 1e-13}
    optimizer = torch.optim.LBFGS([weight, bias], history_size=20, line_search_fn="strong_wolfe", **options)
    message = "probe: %d images x %d outputs, %d classes: L-BFGS, about %.3g TFLOP a step"
    log.info(message, count, weight.shape[1], len(weight), 4 * count * weight.numel() / 1e12)
    bar = _progress(None, None)

    def objective() -> Tensor:
        stop_if_asked()
        decay = settings.weight_decay
        weight.grad, bias.grad = decay * weight, decay * bias
        value = decay / 2 * (weight.square().sum() + bias.square().sum())
        for start in range(0, count, _ROWS):
            outputs, targets = take(slice(start, start + _ROWS)).double(), labels[start : start + _ROWS]
            logits = torch.addmm(bias, outputs, weight.T)
            value += F.cross_entropy(logits, targets, reduction="sum") / count
            error = (logits.softmax(dim=1) - F.one_hot(targets, len(bias))) / count
            weight.grad += error.T @ outputs
            bias.grad += error.sum(dim=0)
        bar.update()
        return value

    with bar:
        optimizer.step(objective)
    return weight.float(), bias.float()


def _progress(steps: Iterator[Tensor] | Sequence[Tensor] | None, total: int | None) -> tqdm:
    disable = None if is_main() else True  # None: where there is no terminal
    return tqdm(steps, total=total, desc="probe", unit="step", disable=disable, leave=False)
