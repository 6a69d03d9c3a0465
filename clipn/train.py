"""The training loop: batches -> optimizer steps -> metrics.jsonl and checkpoints in the run's folder."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .checkpoint import read_checkpoint, write_checkpoint
from .config import Config, TrainConfig, save_config, to_dict
from .distributed import barrier, choose_device, is_main, mean_over_ranks, world_size
from .features import feature_loader, pair_features
from .model import get_tokenizer
from .objectives import OBJECTIVES, Batch, Objective
from .pairs import open_pairs, training_loader

log = logging.getLogger(__name__)

# Settings that may differ between a run and its resumption: they do not change what is computed.
_FREE_KEYS = {
    "run.dir",
    "run.device",
    "run.seeds",
    "data.workers",
    "data.index_dir",
    "features.dir",
    "features.batch_size",
    "features.part_size",
    "train.micro_batch_size",
    "train.grad_checkpointing",
    "train.compile",
    "train.resume",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
}


class Interrupted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has written a checkpoint to go on from."""


def last_checkpoint(run_dir: str | Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return Path(run_dir) / "checkpoints" / "last.pt"


def train(config: Config) -> Path:
    """Train as the config says, or go on where its run stopped; returns the last checkpoint.

    Raises ValueError or FileNotFoundError for data, weights or a run folder that do not fit, before any step;
    FloatingPointError when the loss is not finite; Interrupted after SIGINT or SIGTERM.
    """
    device = choose_device(config.run.device)
    from_features = config.data.source == "features"
    pairs = open_pairs(config.data) if config.data.shards or not from_features else None
    resumed = _find_resume(config)
    torch.manual_seed(config.run.seed)
    objective: Objective = OBJECTIVES[config.train.objective](config, device)
    optimizer = build_optimizer(objective.trained, config.train)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    if resumed:
        objective.load(resumed["state_dict"], "train.resume")
    tokenizer = get_tokenizer(objective.architecture)
    features = pair_features(config, objective.model, tokenizer, pairs) if from_features else None
    available = len(features if from_features else pairs)
    step = _restore(resumed["training"], optimizer, scaler, available) if resumed else 0
    if from_features:
        loader, steps_per_epoch = feature_loader(config, features, step)
    else:
        loader, steps_per_epoch = training_loader(config, pairs, objective.preprocess, tokenizer, step)
    if is_main():
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        save_config(config, Path(config.run.dir) / "config.yaml")
        _keep_metrics(config, step)
    learning = sum(p.numel() for p in objective.trained.parameters() if p.requires_grad)
    log.info(
        "training %s (%s, %.1f M parameters learn) on %s: %d pairs, %d epochs of %d steps, from step %d",
        config.train.objective,
        config.model.name,
        learning / 1e6,
        f"{world_size()} x {device}",
        config.data.num_pairs or available,
        config.train.epochs,
        steps_per_epoch,
        step,
    )
    run = Run(config, objective, optimizer, scaler, device, steps_per_epoch, available, step)
    with _stop_signals() as stop:
        run.steps(loader, stop)
    log.info("trained: %s", last_checkpoint(config.run.dir))
    return last_checkpoint(config.run.dir)


def build_optimizer(trained: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on tensors of two or more dimensions: none on norms, biases and scalars."""
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=tuple(train.betas), eps=train.eps, fused=True)


def learning_rate(step: int, total: int, train: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from train.lr to 0."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))


class Run:
    """One run under way: what changes with each step, and where it is written."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        steps_per_epoch: int,
        pairs: int,
        step: int,
    ) -> None:
        self.config, self.objective, self.optimizer, self.scaler = config, objective, optimizer, scaler
        self.device, self.steps_per_epoch, self.pairs, self.step = device, steps_per_epoch, pairs, step
        self.total = config.train.epochs * steps_per_epoch
        self.trained = objective.trained
        if world_size() > 1:
            self.trained = DistributedDataParallel(self.trained)
        self.extra: dict[str, float] = {}
        self.skipped, self.since, self.since_step = 0, time.perf_counter(), step

    def steps(self, loader: Any, stop: list[int]) -> None:
        """Take every step that is left."""
        train = self.config.train
        bar = tqdm(total=self.total, initial=self.step, unit="step", disable=None if is_main() else True)
        bar.set_description(f"{train.objective} {Path(self.config.run.dir).name}")
        self.since = time.perf_counter()
        with bar:
            for batch in loader:
                loss, terms, grad_norm = self.take_step(batch, stop)
                bar.update()
                if self.step % train.log_every_steps == 0 or self.step == self.total:
                    self.write_metrics(loss, terms, grad_norm)
                    bar.set_postfix(loss=f"{loss:.3f}")
                ends_epoch = self.step % self.steps_per_epoch == 0
                if ends_epoch:
                    log.info("epoch %d of %d: loss %.4f", self.step // self.steps_per_epoch, train.epochs, loss)
                every = train.checkpoint_every_steps
                if ends_epoch or stop or (every and self.step % every == 0):
                    self.save(ends_epoch)
                if stop:
                    raise Interrupted(
                        f"stopped by signal {stop[0]} after step {self.step} of {self.total}; nothing is lost: "
                        f"{last_checkpoint(self.config.run.dir)} is written, and the same command goes on from there"
                    )

    def take_step(self, batch: Batch, stop: list[int]) -> tuple[float, dict[str, torch.Tensor], float]:
        """One optimizer step on this rank's share of a global batch; `stop` becomes the same on every rank."""
        self.skipped += int(batch.pop("skipped").sum())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.config.train)
        torch.manual_seed(self.config.run.seed * 1_000_003 + self.step)  # dropout, if a tower has any
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms = self.backward(self.objective.prepare(batch, self.step))
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Read only now, when the device has all its work: to read is to wait for it.
        stopped = float(stop[0] if stop else 0)
        loss, grad_norm, stopped = mean_over_ranks(torch.stack([loss, grad_norm, loss.new_tensor(stopped)])).tolist()
        if not math.isfinite(loss):
            self._stop_on_bad_number("the loss", loss)
        if not self.scaler.is_enabled() and not math.isfinite(grad_norm):  # a scaler skips such steps by itself
            self._stop_on_bad_number("the gradient", grad_norm)
        if stopped and not stop:
            stop.append(signal.SIGTERM)
        self.extra = self.objective.after_step()
        self.step += 1
        return loss, terms, grad_norm

    def backward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The gradient of the loss over the whole batch, a micro-batch at a time; returns the loss and its terms."""
        share = len(batch["tokens"])
        size = self.config.train.micro_batch_size or share
        loss, terms = 0.0, {}
        for first in range(0, share, size):
            rows = slice(first, min(first + size, share))
            last = rows.stop == share
            with nullcontext() if last or world_size() == 1 else self.trained.no_sync():
                part, parts = self.objective.loss(self.trained, batch, rows)
                self.scaler.scale(part).backward()
            loss = loss + part.detach()
            terms = {name: terms.get(name, 0.0) + value.detach() for name, value in parts.items()}
        return loss, terms

    def write_metrics(self, loss: float, terms: dict[str, torch.Tensor], grad_norm: float) -> None:
        """Append a line to metrics.jsonl."""
        now = time.perf_counter()
        pairs = (self.step - self.since_step) * self.config.train.batch_size
        shared = mean_over_ranks(torch.stack([*terms.values(), torch.tensor(float(self.skipped), device=self.device)]))
        line = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "loss": loss,
            **dict(zip(terms, map(float, shared), strict=False)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            **self.extra,
            "pairs_per_s": round(pairs / (now - self.since), 1),
            "skipped_pairs": round(float(shared[-1]) * world_size()),
        }
        self.since, self.since_step = now, self.step
        if is_main():
            with open(_metrics_file(self.config), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, ends_epoch: bool) -> None:
        """Write checkpoints/last.pt, and keep it as checkpoints/epoch_N.pt at the end of an epoch."""
        if not all(p.isfinite().all() for p in self.objective.trained.parameters()):
            self._stop_on_bad_number("a weight", math.nan)
        if is_main():
            last = last_checkpoint(self.config.run.dir)
            write_checkpoint(self.content(), last)
            if ends_epoch:
                _keep_as(last, last.with_name(f"epoch_{self.step // self.steps_per_epoch}.pt"))
        barrier()

    def content(self) -> dict[str, Any]:
        """A checkpoint: the published layout, and what an exact resume needs."""
        return {
            "epoch": self.step // self.steps_per_epoch,
            "name": Path(self.config.run.dir).name,
            "state_dict": self.objective.published_state(),
            "preprocess": dict(self.objective.preprocess),
            "architecture": self.objective.architecture,
            "config": to_dict(self.config),
            "training": {
                "step": self.step,
                "pairs": self.pairs,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        }

    def _stop_on_bad_number(self, what: str, value: float) -> None:
        last = last_checkpoint(self.config.run.dir)
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was written before"
        raise FloatingPointError(
            f"{what} is {value} at step {self.step + 1} of {self.total}; {kept}; "
            "try a lower train.lr, or train.precision=fp32"
        )


def _find_resume(config: Config) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any. Raises ValueError where going on would mix two different runs."""
    resume, last = config.train.resume, last_checkpoint(config.run.dir)
    if resume == "never":
        if last.is_file():
            raise ValueError(f"train.resume=never: {last} holds a run already; choose another run.dir, or delete it")
        return None
    path = last if resume == "auto" or last.is_file() else Path(resume)  # after a stop, a run goes on from its own
    if resume == "auto" and not path.is_file():
        return None
    content = read_checkpoint(path)
    if "training" not in content or "config" not in content:
        raise ValueError(f"{path}: holds weights but no state of a training run to resume; use it as model.pretrained")
    # A setting that is newer than the run had its default then.
    before, now = _flatten(to_dict(Config())) | _flatten(content["config"]), _flatten(to_dict(config))
    kept = [
        key
        for key in now
        if key.startswith(("run.", "model.", "data.", "features.", "train.")) and key not in _FREE_KEYS
    ]
    changes = [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in kept if before.get(key) != now[key]]
    if changes:
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(changes)}. Choose another run.dir, or set them back"
        )
    return content


def _restore(
    training: dict[str, Any], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, pairs: int
) -> int:
    if training["pairs"] != pairs:
        raise ValueError(
            f"data.shards: {pairs} pairs are there now, {training['pairs']} when this run began, so it cannot go on; "
            "bring them back, or choose another run.dir"
        )
    optimizer.load_state_dict(training["optimizer"])
    scaler.load_state_dict(training["scaler"])
    return training["step"]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _metrics_file(config: Config) -> Path:
    return Path(config.run.dir) / "metrics.jsonl"


def _keep_metrics(config: Config, step: int) -> None:
    """Drop the lines of steps that a killed run took after its last checkpoint: they are taken again."""
    file = _metrics_file(config)
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    kept = [line for line in lines if _step_of(line) <= step]
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that was cut off by the kill
        return math.inf


def _keep_as(last: Path, kept: Path) -> None:
    """Keep the file under a second name: `last` is replaced as a whole, so a hard link costs no space until then."""
    kept.unlink(missing_ok=True)
    try:
        os.link(last, kept)
    except OSError:  # a file system without hard links
        shutil.copyfile(last, kept)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM is put into, so that the step under way ends well; a second one kills."""
    stop: list[int] = []
    since: list[float] = []

    def note(number: int, frame: Any) -> None:
        # torchrun passes on what the whole process group has got already: only a later repetition means "at once".
        if stop and time.monotonic() - since[0] > 5:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        elif not stop:
            stop.append(number)
            since.append(time.monotonic())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
