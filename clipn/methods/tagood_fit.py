"""The training of TagOOD's projector and class centres, and a folder of fits."""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from clipn.config.evaluation import TagoodConfig
from clipn.features.columns import RaggedRows
from clipn.methods.tagood import Projector, centre_loss, update_centres
from clipn.model.checkpoint import write_checkpoint
from clipn.model.hashing import tensor_hash
from clipn.runtime.distributed import barrier, is_main
from clipn.runtime.files import atomic_write
from clipn.runtime.random import stream
from clipn.runtime.signals import stop_if_asked

log = logging.getLogger(__name__)

_ROWS = 1024  # images in a block
_SAVE_EVERY = 60.0  # seconds between two states of an unfinished fit
# Settings that the fitted weights do not depend on, beyond the tokens themselves.
_NOT_OF_THE_FIT = (
    "tagger",
    "weights",
    "tags",
    "tag_threshold",
    "attention",
    "attention_threshold",
    "score",
    "untagged",
)

Encoder = Callable[[Tensor, Tensor], Tensor]  # tokens [B, n, D] and mask [B, n] -> features [B, W]


class Fitted(NamedTuple):
    """A projector in evaluation mode, and the centres [C, groups, width / groups], those of empty classes included."""

    projector: Projector
    centres: Tensor


def fit_tagood(
    tokens: RaggedRows,
    labels: Tensor,
    num_classes: int,
    settings: TagoodConfig,
    unfinished: str | Path | None = None,
) -> Fitted:
    """Train a projector and class centres on the tokens of N images and their labels [N], on the device of the tokens.

    The loss is cross-entropy + centre_weight * centre_loss, of one forward pass. The centres start as N(0, 1); with a
    decay of 0.999 they hardly leave their start in a short training, and are then fixed anchors.

    unfinished: a file that holds the state of the fit from time to time; the same call resumes from it, exactly.
    Raises ValueError for tokens and labels that do not fit, and where the training does not stay finite.
    """
    _check(tokens, labels, num_classes)
    device, path = tokens.values.device, Path(unfinished) if unfinished else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        projector, centres = _new(tokens.values.shape[1], num_classes, settings)
        fitted = Fitted(projector.to(device).train(), centres.to(device))
        _train(fitted, tokens, labels.to(device).long(), settings, path)
    projector.eval().requires_grad_(False)
    features = projector(*tokens.take(torch.arange(min(_ROWS, len(tokens)))))
    if not all(value.isfinite().all() for value in (*projector.parameters(), fitted.centres, features)):
        raise ValueError(f"tagood: tokens that are not finite, or a training that diverged at tagood.lr={settings.lr}")
    return fitted


def stored_tagood(
    folder: str | Path,
    tokens: RaggedRows,
    labels: Tensor,
    num_classes: int,
    settings: TagoodConfig,
    fitted: Fitted | None = None,
) -> Fitted:
    """The fit in a folder of the same tokens, labels and settings; makes and writes it if missing.

    fitted: what was fitted to them already. Rank 0 fits, and resumes a fit that was stopped. Raises ValueError as
    `fit_tagood` does, and for a damaged file.
    """
    _check(tokens, labels, num_classes)
    device = tokens.values.device
    path = Path(folder) / f"{_fit_hash(tokens, labels, num_classes, settings)}.safetensors"
    if is_main() and not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        fitted = fitted or fit_tagood(tokens, labels, num_classes, settings, unfinished)
        with atomic_write(path) as file:
            state = fitted.projector.state_dict() | {"centres": fitted.centres}
            file.write(save({name: value.cpu().contiguous() for name, value in state.items()}))
        unfinished.unlink(missing_ok=True)
    barrier()
    projector, _ = _new(tokens.values.shape[1], num_classes, settings)
    try:
        state = load_file(path)
        centres = state.pop("centres").to(device)
        projector.load_state_dict(state)
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a projector ({reason}); delete it, and it is fitted again") from error
    return Fitted(projector.to(device).eval().requires_grad_(False), centres)


@torch.no_grad()
def class_means(encoder: Encoder, tokens: RaggedRows, labels: Tensor, num_classes: int, groups: int = 1) -> Tensor:
    """The mean feature of each class's images as centres [C, groups, W / groups]; zeros for a class without images."""
    sums = None
    for numbers in torch.arange(len(tokens)).split(_ROWS):
        stop_if_asked()
        features = encoder(*tokens.take(numbers))
        sums = features.new_zeros(num_classes, features.shape[1]) if sums is None else sums
        sums.index_add_(0, labels[numbers].to(features.device), features)
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1).to(sums.device)
    return (sums / counts[:, None]).unflatten(1, (groups, -1))


def learning_rate(step: int, steps: int, settings: TagoodConfig) -> float:
    """A cosine from lr, at step 0, to lr_min."""
    return settings.lr_min + (settings.lr - settings.lr_min) / 2 * (1 + math.cos(math.pi * step / steps))


def _new(dim: int, num_classes: int, settings: TagoodConfig) -> tuple[Projector, Tensor]:
    """An untrained projector and centres, from PyTorch's generator."""
    shape = settings.width, settings.layers, settings.heads, settings.max_tokens + 2  # CLS, and the whole image's token
    return Projector(dim, num_classes, *shape), torch.randn(num_classes, settings.groups, shape[0] // settings.groups)


def _train(fitted: Fitted, tokens: RaggedRows, labels: Tensor, settings: TagoodConfig, unfinished: Path | None) -> None:
    """Take the steps of AdamW, from the state in the file if there is one."""
    (projector, centres), count = fitted, len(tokens)
    optimizer = torch.optim.AdamW(projector.parameters(), weight_decay=settings.weight_decay, fused=True)
    steps, done = settings.epochs * math.ceil(count / settings.batch_size), 0
    if unfinished and unfinished.is_file():
        done = _resume(unfinished, fitted, optimizer)
    size = int(tokens.counts.sum())
    log.info("tagood: %d images, %d tokens x %d: %d steps", count, size, tokens.values.shape[1], steps - done)
    saved = time.monotonic()
    with tqdm(total=steps, initial=done, desc="TagOOD", unit="step", disable=None if is_main() else True) as bar:
        for step, numbers in enumerate(islice(_draw_batches(count, settings), done, None), start=done):
            stop_if_asked()
            torch.manual_seed(int(stream("tagood dropout", settings.seed, step).integers(2**63)))
            targets = labels[numbers.to(labels.device)]
            features = projector(*tokens.take(numbers))
            loss = F.cross_entropy(projector.classify(features), targets)
            loss = loss + settings.centre_weight * centre_loss(features, centres, targets)
            update_centres(centres, features.detach(), targets, settings.centre_decay)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings)
            optimizer.step()
            bar.update()
            if unfinished and time.monotonic() - saved > _SAVE_EVERY:
                state = {"projector": projector.state_dict(), "centres": centres, "optimizer": optimizer.state_dict()}
                write_checkpoint(state | {"step": step + 1}, unfinished)
                saved = time.monotonic()


def _resume(path: Path, fitted: Fitted, optimizer: torch.optim.Optimizer) -> int:
    """Restore the state in a file; returns the number of its steps. Raises ValueError for a damaged file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        fitted.projector.load_state_dict(state["projector"])
        fitted.centres.copy_(state["centres"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{path}: not the state of a fit; delete it, and the fit starts again") from error
    log.info("tagood: resuming from %s, after %d steps", path, state["step"])
    return state["step"]


def _draw_batches(count: int, settings: TagoodConfig) -> Iterator[Tensor]:
    """The image numbers of each step: every epoch in another random order, the short last batch kept."""
    for epoch in range(settings.epochs):
        order = stream("tagood order", settings.seed, epoch).permutation(count)
        yield from torch.from_numpy(order).split(settings.batch_size)


def _fit_hash(tokens: RaggedRows, labels: Tensor, num_classes: int, settings: TagoodConfig) -> str:
    """A hash of all that a fit depends on."""
    options = {key: value for key, value in dataclasses.asdict(settings).items() if key not in _NOT_OF_THE_FIT}
    digest = hashlib.sha256(json.dumps(options | {"classes": num_classes, "format": 1}, sort_keys=True).encode())
    for value in (labels.long(), tokens.counts, tokens.starts):
        digest.update(tensor_hash(value).encode())
    for start in range(0, len(tokens.values), 64 * _ROWS):
        digest.update(tensor_hash(tokens.values[start : start + 64 * _ROWS]).encode())
    return digest.hexdigest()[:16]


def _check(tokens: RaggedRows, labels: Tensor, num_classes: int) -> None:
    count = len(tokens)
    if labels.shape != (count,) or not count:
        raise ValueError(f"tagood: the tokens of {count} training images, but labels of shape {[*labels.shape]}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"tagood: labels from {labels.min()} to {labels.max()}; there are {num_classes} classes")
