"""The training loop: batches -> optimizer steps -> metrics and checkpoints in the run's folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clipn.config.loading import save_config, to_dict
from clipn.config.schema import Config
from clipn.data.pairs import Pairs, check_bad_fraction, epoch_batches, fingerprint, open_pairs, training_loader
from clipn.data.shards import CAUSES
from clipn.features.pairs import count_causes, feature_loader, pair_features
from clipn.model.base import get_tokenizer
from clipn.model.checkpoint import last_checkpoint
from clipn.runtime.distributed import barrier, choose_device, gather_rows, is_main, mean_over_ranks, world_size
from clipn.runtime.signals import Interrupted, stop_signals
from clipn.training.objectives import OBJECTIVES, Batch, Objective
from clipn.training.optimizer import build_optimizer, learning_rate
from clipn.training.run_folder import Checkpoints, find_resume, locked
from clipn.training.run_log import RunLog

log = logging.getLogger(__name__)

_SKIPPED_IN_A_ROW = 20  # steps that a loss scale halves itself in before the numbers are called bad


def train(config: Config) -> Path:
    """Train as the config says, or go on where its run stopped; returns the last checkpoint.

    Raises ValueError or FileNotFoundError for data, weights or a run folder that do not fit, before any step;
    ValueError when more pairs are bad than data.max_bad_fraction; OSError when a checkpoint cannot be written;
    FloatingPointError when the loss is not finite; Interrupted after SIGINT or SIGTERM.
    """
    with locked(config.run.dir) if is_main() else nullcontext():
        _train(config)
    log.info("trained: %s", last_checkpoint(config.run.dir))
    return last_checkpoint(config.run.dir)


def _train(config: Config) -> None:
    device = choose_device(config.run.device)
    from_features = config.data.source == "features"
    pairs = open_pairs(config.data) if config.data.shards or not from_features else None
    if pairs is not None:
        epoch_batches(config, len(pairs))  # sizes that do not fit are told before any weight is loaded
    resumed = find_resume(config)
    torch.manual_seed(config.run.seed)
    objective: Objective = OBJECTIVES[config.train.objective](config, device)
    run = Run(config, objective, device, pairs)
    if resumed:
        objective.load(resumed["state_dict"], "train.resume")
    tokenizer = get_tokenizer(objective.architecture)
    if from_features:
        features = pair_features(config, objective.model, tokenizer, pairs)
        run.left_out |= count_causes(features.skipped)
    run.available = len(features if from_features else pairs)
    run.fingerprint = features.fingerprint if from_features else fingerprint(pairs)
    if resumed:
        run.restore(resumed["training"])
    if from_features:
        loader, run.steps_per_epoch = feature_loader(config, features, run.step)
    else:
        loader, run.steps_per_epoch = training_loader(config, pairs, objective.preprocess, tokenizer, run.step)
    if is_main():
        save_config(config, Path(config.run.dir) / "config.yaml")
    run.introduce()
    with stop_signals() as stop:
        run.take_steps(loader, stop)


class Step(NamedTuple):
    """What an optimizer step found, alike on every rank except for the terms."""

    loss: float
    terms: dict[str, torch.Tensor]  # of this rank
    grad_norm: float
    stop: bool  # some rank was asked to stop before the step was over
    due: bool  # some rank asks for a checkpoint


class Run:
    """One run under way: what changes with each step, and what is told and kept of it."""

    def __init__(self, config: Config, objective: Objective, device: torch.device, pairs: Pairs | None = None) -> None:
        self.config, self.objective, self.device = config, objective, device
        self.optimizer = build_optimizer(objective.trained, config.train)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.trained = objective.trained if world_size() == 1 else DistributedDataParallel(objective.trained)
        self.name: Callable[[int], str] = pairs.name if pairs else "pair {}".format
        self.step, self.steps_per_epoch, self.available, self.fingerprint = 0, 1, 0, ""
        # Over all ranks and since the run began: pairs skipped by cause, and steps that an fp16 loss scale skipped.
        self.skipped, self.skipped_steps, self.skipped_in_a_row = torch.zeros(len(CAUSES)), 0, 0
        self.left_out = dict(pairs.faults) if pairs else {}  # pairs that no epoch gets to see, by cause
        self.extra: dict[str, float] = {}
        self.checkpoints: Checkpoints | None = None
        self.numbers: torch.Tensor | None = None  # of the pairs in this rank's share of the batch
        self.since, self.since_step = time.perf_counter(), 0  # the last metrics

    @property
    def total(self) -> int:
        return self.config.train.epochs * self.steps_per_epoch

    def restore(self, training: dict[str, Any]) -> None:
        """Take up where a checkpoint was written. Raises ValueError when the pairs have changed since."""
        if (training["pairs"], training["fingerprint"]) != (self.available, self.fingerprint):
            other = "others" if training["pairs"] == self.available else str(training["pairs"])
            raise ValueError(
                f"data.shards: {self.available} pairs are there now, {other} when this run began, so it cannot go on; "
                "bring them back, or choose another run.dir"
            )
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        self.step, self.since_step = training["step"], training["step"]
        for cause, count in training["skipped"].items():
            self.skipped[CAUSES.index(cause)] = count
        self.skipped_steps = training["skipped_steps"]
        if training["ranks"] != world_size():
            share = self.config.train.batch_size // world_size()
            log.warning(
                "going on with %d ranks instead of %d: each now has %d pairs of the same global batches, and sums are "
                "rounded in another order",
                world_size(),
                training["ranks"],
                share,
            )

    def introduce(self) -> None:
        """Say what is about to be trained."""
        log.info(
            "training %s (%s, %.1f M parameters learn) on %d x %s: %d pairs, %d epochs of %d steps, from step %d",
            self.config.train.objective,
            self.config.model.name,
            sum(p.numel() for p in self.objective.trained.parameters() if p.requires_grad) / 1e6,
            world_size(),
            self.device,
            self.config.data.num_pairs or self.available,
            self.config.train.epochs,
            self.steps_per_epoch,
            self.step,
        )
        unused = (self.config.data.num_pairs or self.available) % self.config.train.batch_size
        if unused:
            log.info("%d pairs fill no batch: each epoch leaves out that many, and every epoch others", unused)

    def take_steps(self, loader: Any, stop: list[int]) -> None:
        """Take every step that is left; returns when its checkpoint is on disk."""
        train, folder = self.config.train, self.config.run.dir
        self.checkpoints = Checkpoints(folder, train) if is_main() else None
        run_log = RunLog(folder, self.step) if is_main() else None
        bar = tqdm(total=self.total, initial=self.step, unit="step", disable=None if is_main() else True)
        bar.set_description(f"{train.objective} {Path(folder).name}")
        self.since = saved = time.perf_counter()
        with self.checkpoints or nullcontext(), closing(run_log) if run_log else nullcontext(), bar:
            for batch in loader:
                minutes = (time.perf_counter() - saved) / 60
                due = bool(train.checkpoint_every_minutes) and minutes >= train.checkpoint_every_minutes
                done = self.take_step(batch, bool(stop), due)
                bar.update()
                ends_epoch = self.step % self.steps_per_epoch == 0
                if ends_epoch or self.step % train.log_every_steps == 0:
                    self.tell(done, run_log, bar)
                every = train.checkpoint_every_steps
                if ends_epoch or done.stop or done.due or (every and self.step % every == 0):
                    self.save(ends_epoch)
                    saved = time.perf_counter()
                if self.checkpoints:
                    self.checkpoints.check()
                if done.stop:  # not `stop`, which may be news to this rank alone
                    break
        barrier()
        if self.step < self.total:
            signal = f"signal {stop[0]}" if stop else "another rank's signal"
            raise Interrupted(
                f"stopped by {signal} after step {self.step} of {self.total}; nothing is lost: "
                f"{last_checkpoint(folder)} is written, and the same command goes on from there"
            )

    def take_step(self, batch: Batch, stop: bool = False, due: bool = False) -> Step:
        """One optimizer step on this rank's share of a global batch. What a rank asks for, all are told."""
        skipped, self.numbers = batch.pop("skipped").sum(dim=0), batch.pop("number")
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
        told = torch.tensor([float(stop), float(due), *skipped.tolist()])
        shared = mean_over_ranks(torch.cat([torch.stack([loss, grad_norm]), told.to(loss)])).cpu()
        loss, grad_norm, stop, due = shared[:4].tolist()
        self.skipped += (shared[4:] * world_size()).round()
        self._check_numbers(loss, grad_norm)
        self.extra = self.objective.after_step()
        self.step += 1
        return Step(loss, terms, grad_norm, bool(stop), bool(due))

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

    def tell(self, step: Step, run_log: RunLog | None, bar: tqdm) -> None:
        """Log the step that was just taken. Raises ValueError when too many pairs are bad."""
        train, now = self.config.train, time.perf_counter()
        pairs_per_s = (self.step - self.since_step) * train.batch_size / (now - self.since)
        self.since, self.since_step = now, self.step
        means = mean_over_ranks(torch.stack([*step.terms.values()])).tolist() if step.terms else []
        terms = dict(zip(step.terms, means, strict=True))
        skipped, epoch = self.skipped_causes(), self.step / self.steps_per_epoch
        line = {"step": self.step, "epoch": round(epoch, 4), "loss": step.loss, **terms}
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": step.grad_norm, **self.extra}
        line |= {"pairs_per_s": round(pairs_per_s, 1), "skipped": skipped, "left_out": self.left_out}
        if self.scaler.is_enabled():
            line["skipped_steps"] = self.skipped_steps
        if run_log:
            run_log.write(line)
        losses = {name: f"{value:.3f}" for name, value in {"loss": step.loss, **terms}.items() if "logit" not in name}
        bar.set_postfix(losses | {"pairs/s": f"{pairs_per_s:.0f}"})
        bad, seen = sum(skipped.values()), self.step * train.batch_size
        if epoch.is_integer():
            counts = ", ".join(f"{count} {cause}" for cause, count in (self.left_out | skipped).items()) or "none"
            log.info("epoch %d of %d: loss %.4f; pairs skipped: %s", epoch, train.epochs, step.loss, counts)
        else:
            seen = max(seen, 1000)  # a bad start does not yet make the whole bad
        check_bad_fraction(bad, bad + seen, skipped, self.config.data)

    def skipped_causes(self) -> dict[str, int]:
        """How many pairs were skipped since the run began, by cause."""
        return {cause: int(count) for cause, count in zip(CAUSES, self.skipped.tolist(), strict=True) if count}

    def save(self, ends_epoch: bool) -> None:
        """Keep a checkpoint of this step. Raises FloatingPointError, on every rank, for weights that are not finite."""
        if not all(p.isfinite().all() for p in self.objective.trained.parameters()):
            self._stop_on_bad_number("a weight", math.nan)
        epoch = self.step // self.steps_per_epoch
        kept = ends_epoch and (epoch % self.config.train.keep_every_epochs == 0 or self.step == self.total)
        if self.checkpoints:
            self.checkpoints.write(self.content(), self.step, epoch if kept else None)

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
                "pairs": self.available,
                "fingerprint": self.fingerprint,
                "ranks": world_size(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "skipped": self.skipped_causes(),
                "skipped_steps": self.skipped_steps,
            },
        }

    def _check_numbers(self, loss: float, grad_norm: float) -> None:
        if not math.isfinite(loss):
            self._stop_on_bad_number("the loss", loss)
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        # The scaler has left the weights as they were, and halved its scale.
        self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
        if not self.scaler.is_enabled() or self.skipped_in_a_row > _SKIPPED_IN_A_ROW:
            self._stop_on_bad_number("the gradient", grad_norm)

    def _stop_on_bad_number(self, what: str, value: float) -> None:
        numbers = gather_rows(self.numbers.to(self.device)).tolist()
        file, last = Path(self.config.run.dir) / "bad_batch.txt", last_checkpoint(self.config.run.dir)
        if self.checkpoints:
            self.checkpoints.wait()
            file.write_text("".join(f"{self.name(number)}\n" for number in numbers), encoding="utf-8")
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was written before"
        raise FloatingPointError(
            f"{what} is {value} at step {self.step + 1} of {self.total}; {kept}; the batch's {len(numbers)} pairs are "
            f"listed in {file}; try a lower train.lr, or train.precision=fp32"
        )
