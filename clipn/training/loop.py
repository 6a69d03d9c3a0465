"""The training loop: batches -> optimizer steps -> metrics and checkpoints in the run's folder."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clipn.config.loading import save_config, to_dict
from clipn.config.schema import Config
from clipn.data.pairs import Pairs, check_bad_fraction, epoch_batches, fingerprint, open_pairs, training_loader
from clipn.data.shards import CAUSES
from clipn.features.pairs import count_causes, feature_loader, pair_features
from clipn.model.base import get_tokenizer
from clipn.model.checkpoint import last_checkpoint
from clipn.runtime.distributed import (
    barrier,
    choose_device,
    gather_values,
    is_main,
    mean_over_ranks,
    sum_over_ranks,
    world_size,
)
from clipn.runtime.signals import Interrupted, StopSignals, killed_children
from clipn.training.objectives import OBJECTIVES, Batch, Objective
from clipn.training.optimizer import build_optimizer, learning_rate, restride
from clipn.training.run_folder import FORMAT, Checkpoints, find_resume, locked
from clipn.training.run_log import RunLog
from clipn.training.validation import Validation

log = logging.getLogger(__name__)

_SKIPPED_IN_A_ROW = 20  # steps that an fp16 loss scale may skip, halving itself, before the run stops


def train(config: Config) -> Path:
    """Train, or resume the run in the config's folder; returns the last checkpoint.

    Raises ValueError or FileNotFoundError for data, weights or a run folder that do not fit, before any step;
    ValueError when more pairs are bad than data.max_bad_fraction; OSError when a checkpoint cannot be written;
    FloatingPointError when the loss is not finite; Interrupted after SIGINT or SIGTERM.
    """
    with locked(config.run.dir) if is_main() else nullcontext():
        _train(config)
    last = last_checkpoint(config.run.dir)
    log.info("trained: %s", last)
    return last


def _train(config: Config) -> None:
    device = choose_device(config.run.device)
    from_features = config.data.source == "features"
    pairs = open_pairs(config.data) if config.data.shards or not from_features else None
    if pairs is not None:
        epoch_batches(config, len(pairs))  # sizes that do not fit are an error before any weight is loaded
    resumed = find_resume(config)
    torch.manual_seed(config.run.seed)
    objective = OBJECTIVES[config.train.objective](config, device)
    run = Run(config, objective, device, pairs)
    if resumed:
        objective.load(resumed["state_dict"], "train.resume")
    tokenizer = get_tokenizer(objective.architecture)
    if from_features:
        features = pair_features(config, objective.model, tokenizer, pairs)
        run.left_out |= count_causes(features.skipped)
        run.available, run.fingerprint = len(features), features.fingerprint
    else:
        run.available, run.fingerprint = len(pairs), fingerprint(pairs)
    if resumed:
        run.restore(resumed["training"])
    if from_features:
        loader, run.steps_per_epoch = feature_loader(config, features, run.step)
    else:
        loader, run.steps_per_epoch = training_loader(config, pairs, objective.preprocess, tokenizer, run.step)
    if config.data.val_shards:
        run.validation = Validation(config, objective.model, tokenizer)
    if is_main():
        save_config(config, Path(config.run.dir) / "config.yaml")
    run.log_summary()
    with StopSignals() as stop:
        run.take_steps(loader, stop)


class Step(NamedTuple):
    """A step's values on this rank. They stay on the device: to read one is to wait for the device."""

    number: int  # counted from 1
    pairs: Tensor  # [b], the pairs in this rank's share of the batch
    loss: Tensor
    grad_norm: Tensor
    terms: dict[str, Tensor]


class Run:
    """The state of a run, and what is logged and saved of it.

    Numbers are read and checked only when a step is logged and before a checkpoint is written, so that a device does
    not wait. A run may compute some steps after a bad number, but it keeps none of them.
    """

    def __init__(self, config: Config, objective: Objective, device: torch.device, pairs: Pairs | None = None) -> None:
        self.config, self.objective, self.device = config, objective, device
        self.optimizer = build_optimizer(objective.trained, config.train)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        barrier()  # ranks load weights at different speeds, and DistributedDataParallel waits for minutes only
        self.trained = objective.trained if world_size() == 1 else DistributedDataParallel(objective.trained)
        self.pair_name: Callable[[int], str] = pairs.name if pairs else "pair {}".format
        self.step, self.steps_per_epoch, self.available, self.fingerprint = 0, 1, 0, ""
        self.skipped = torch.zeros(len(CAUSES))  # pairs by cause: of this rank, on rank 0 also those before a resume
        self.skipped_steps, self.skipped_in_a_row = 0, 0  # by an fp16 loss scale
        self.left_out = dict(pairs.faults) if pairs else {}  # pairs that no epoch contains, by cause
        self.checkpoints: Checkpoints | None = None
        self.validation: Validation | None = None
        self.unchecked: list[Step] = []  # the steps since the last check
        self.last: Step | None = None  # the newest step
        self.logged_at, self.logged_step = time.perf_counter(), 0

    @property
    def total(self) -> int:
        return self.config.train.epochs * self.steps_per_epoch

    def restore(self, training: dict[str, Any]) -> None:
        """Restore the state in a checkpoint. Raises ValueError when the pairs have changed since."""
        if (training["pairs"], training["fingerprint"]) != (self.available, self.fingerprint):
            before = "others" if training["pairs"] == self.available else str(training["pairs"])
            raise ValueError(
                f"data.shards: {self.available} pairs are there now, {before} when this run began, so it "
                "cannot resume; bring them back, or choose another run.dir"
            )
        self.optimizer.load_state_dict(training["optimizer"])
        restride(self.optimizer)
        self.scaler.load_state_dict(training["scaler"])
        self.step = self.logged_step = training["step"]
        for cause, count in training["skipped"].items() if is_main() else ():
            self.skipped[CAUSES.index(cause)] = count
        self.skipped_steps = training["skipped_steps"]
        if training["ranks"] != world_size():
            share = self.config.train.batch_size // world_size()
            log.warning(
                f"resuming with {world_size()} ranks instead of {training['ranks']}: each now has {share} pairs of the "
                "same global batches, and sums are rounded in another order"
            )

    def log_summary(self) -> None:
        """Log what is about to be trained."""
        train, num_pairs = self.config.train, self.config.data.num_pairs or self.available
        learning = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        log.info(
            f"training {train.objective} ({self.config.model.name}, {learning / 1e6:.1f} M parameters learn) on "
            f"{world_size()} x {self.device}: {num_pairs} pairs, {train.epochs} epochs of {self.steps_per_epoch} "
            f"steps, from step {self.step}"
        )
        if unused := num_pairs % train.batch_size:
            log.info(f"each epoch leaves out {unused} pairs that fill no batch, and every epoch leaves out others")

    def take_steps(self, loader: Any, stop: StopSignals) -> None:
        """Take the remaining steps; returns when the last checkpoint is on disk. Raises Interrupted on a stop."""
        train, folder, every = self.config.train, self.config.run.dir, self.config.train.checkpoint_every_steps
        self.checkpoints = Checkpoints(folder, train) if is_main() else None
        run_log = RunLog(folder, self.step) if is_main() else None
        name, disable = f"{train.objective} {Path(folder).name}", None if is_main() else True
        bar = tqdm(desc=name, total=self.total, initial=self.step, unit="step", disable=disable)
        self.logged_at = saved_at = time.perf_counter()
        saved_step = self.step
        with self.checkpoints or nullcontext(), closing(run_log) if run_log else nullcontext(), bar:
            with killed_children():
                batches = iter(loader)
                while self.step < self.total:
                    batch = stop.next(batches)
                    minutes = (time.perf_counter() - saved_at) / 60
                    due = 0 < train.checkpoint_every_minutes <= minutes
                    stopped, due = sum_over_ranks([batch is None, due])  # a rank that waits for data can still stop all
                    if stopped:
                        break
                    self.take_step(batch)
                    bar.update()
                    ends_epoch = self.step % self.steps_per_epoch == 0
                    if ends_epoch or self.step % train.log_every_steps == 0:
                        self.log_metrics(run_log, bar)
                    if ends_epoch or due or (every and self.step % every == 0):
                        self.save(ends_epoch)
                        saved_at, saved_step = time.perf_counter(), self.step
                    if self.checkpoints:
                        self.checkpoints.check()
            if self.step != saved_step or not self.step:
                self.save()
        barrier()
        if self.step < self.total:
            signal = f"signal {stop.received}" if stop.received else "another rank's signal"
            raise Interrupted(
                f"stopped by {signal} after step {self.step} of {self.total}; no step is lost: "
                f"{last_checkpoint(folder)} is written, and the same command resumes from it"
            )

    def take_step(self, batch: Batch) -> None:
        """One optimizer step on this rank's share of a global batch."""
        self.skipped += batch.pop("skipped").sum(dim=0)
        pairs = batch.pop("number")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.config.train)
        torch.manual_seed(self.config.run.seed * 1_000_003 + self.step)  # dropout, if a tower has any
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms = self.backward(self.objective.prepare(batch, self.step), len(pairs))
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.after_step()
        self.step += 1
        self.last = Step(self.step, pairs, loss, grad_norm, terms)
        self.unchecked.append(self.last)

    def backward(self, batch: Batch, share: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the loss over a batch of `share` pairs, a micro-batch at a time; the loss and its terms."""
        size = self.config.train.micro_batch_size or share
        loss, terms = 0.0, {}
        for first in range(0, share, size):
            rows = slice(first, min(first + size, share))
            with nullcontext() if rows.stop == share or world_size() == 1 else self.trained.no_sync():
                part, parts = self.objective.loss(self.trained, batch, rows)
                self.scaler.scale(part).backward()
            loss = loss + part.detach()
            terms = {name: terms.get(name, 0.0) + value.detach() for name, value in parts.items()}
        return loss, terms

    def log_metrics(self, run_log: RunLog | None, bar: tqdm) -> None:
        """Check and log the last step. Raises ValueError when too many pairs are bad."""
        loss, grad_norm = self.check_numbers()
        train, now = self.config.train, time.perf_counter()
        pairs_per_s = (self.step - self.logged_step) * train.batch_size / (now - self.logged_at)
        self.logged_at, self.logged_step = now, self.step
        terms = self.last.terms
        terms = dict(zip(terms, mean_over_ranks(torch.stack([*terms.values()])).tolist(), strict=True)) if terms else {}
        skipped, epoch = self.skipped_causes(), self.step / self.steps_per_epoch
        line = {"step": self.step, "epoch": round(epoch, 4), "loss": loss, **terms}
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": grad_norm, **self.objective.log_values()}
        line |= {"pairs_per_s": round(pairs_per_s, 1), "skipped": skipped, "left_out": self.left_out}
        val = self.validation.measure() if self.validation and run_log and epoch.is_integer() else {}
        line, self.logged_at = line | val, self.logged_at + time.perf_counter() - now
        if self.scaler.is_enabled():
            line["skipped_steps"] = self.skipped_steps
        if run_log:
            run_log.write(line)
        losses = {name: f"{value:.3f}" for name, value in {"loss": loss, **terms}.items() if "logit" not in name}
        bar.set_postfix(losses | {"pairs/s": f"{pairs_per_s:.0f}"})
        bad, seen = sum(skipped.values()), self.step * train.batch_size
        if epoch.is_integer():
            counts = ", ".join(f"{count} {cause}" for cause, count in (self.left_out | skipped).items()) or "none"
            held_out = "".join(f"; {name} {value:.4f}" for name, value in val.items())
            log.info(f"epoch {epoch:.0f} of {train.epochs}: loss {loss:.4f}{held_out}; pairs skipped: {counts}")
        else:
            seen = max(seen, 1000)  # a few bad pairs at the start do not stop a run
        check_bad_fraction(bad, bad + seen, skipped, self.config.data)

    def skipped_causes(self) -> dict[str, int]:
        """How many pairs the run has skipped on all ranks, by cause."""
        counts = sum_over_ranks(self.skipped.tolist())
        return {cause: int(count) for cause, count in zip(CAUSES, counts, strict=True) if count}

    def check_numbers(self) -> tuple[float, float]:
        """The last step's loss and gradient norm. Raises FloatingPointError, on every rank, for a bad step since."""
        steps, self.unchecked = self.unchecked, []
        numbers = mean_over_ranks(torch.stack([torch.stack([step.loss, step.grad_norm]) for step in steps])).tolist()
        for step, (loss, grad_norm) in zip(steps, numbers, strict=True):
            if not math.isfinite(loss):
                self._stop_on_bad_number("the loss", loss, step)
            if math.isfinite(grad_norm):
                self.skipped_in_a_row = 0
                continue
            # The scaler has left the weights unchanged, and halved its scale.
            self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
            if not self.scaler.is_enabled() or self.skipped_in_a_row > _SKIPPED_IN_A_ROW:
                self._stop_on_bad_number("the gradient", grad_norm, step)
        return loss, grad_norm

    def _stop_on_bad_number(self, name: str, value: float, step: Step) -> None:
        pairs = [pair for pairs in gather_values(step.pairs.tolist()) for pair in pairs]
        file, last = Path(self.config.run.dir) / "bad_batch.txt", last_checkpoint(self.config.run.dir)
        if self.checkpoints:
            self.checkpoints.wait()
            file.write_text("".join(f"{self.pair_name(pair)}\n" for pair in pairs), encoding="utf-8")
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was written before"
        raise FloatingPointError(
            f"{name} is {value} at step {step.number} of {self.total}; {kept}; the batch's {len(pairs)} pairs are "
            f"listed in {file}; try a lower train.lr, or train.precision=fp32"
        )

    def save(self, ends_epoch: bool = False) -> None:
        """Write a checkpoint of this step, on every rank. Raises FloatingPointError for numbers that are not finite."""
        if self.unchecked:
            self.check_numbers()
        weights = self.objective.trained.parameters()
        if self.last and not torch.stack([weight.isfinite().all() for weight in weights]).all():
            self._stop_on_bad_number("a weight", math.nan, self.last)
        content, epoch = self.checkpoint(), self.step // self.steps_per_epoch
        keep = ends_epoch and (epoch % self.config.train.keep_every_epochs == 0 or self.step == self.total)
        if self.checkpoints:
            self.checkpoints.write(content, self.step, epoch if keep else None)

    def checkpoint(self) -> dict[str, Any]:
        """The content of a checkpoint: the published layout, and what an exact resume needs."""
        return {
            "epoch": self.step // self.steps_per_epoch,
            "name": Path(self.config.run.dir).name,
            "state_dict": self.objective.published_state(),
            "preprocess": dict(self.objective.preprocess),
            "architecture": self.objective.architecture,
            "config": to_dict(self.config),
            "training": {
                "format": FORMAT,
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
