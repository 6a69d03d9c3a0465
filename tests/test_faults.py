"""Fault tolerance: stop requests, full disks, broken files, bad pairs and bad numbers; and what is logged of them."""

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_clipn
from helpers import files, image_bytes, numbered_samples, write_shard
from test_train import assert_same, metrics, weights
from torch.utils._python_dispatch import TorchDispatchMode

import clipn.runtime.files
import clipn.training.run_folder
from clipn.config.loading import load_config
from clipn.data.pairs import PairDataset
from clipn.model.checkpoint import last_checkpoint, read_checkpoint
from clipn.runtime.signals import Interrupted
from clipn.training.loop import Run, train
from clipn.training.objectives import ClipnObjective
from clipn.training.run_folder import locked, newest_checkpoint

FEW = ["train.epochs=1"]


@pytest.fixture
def killed(config_file, monkeypatch):
    """The config of a run that was killed when it was about to take a step, counted from 0."""

    def _killed(step, *words):
        config, prepare = load_config(config_file, words), ClipnObjective.prepare

        def prepare_or_fail(self, batch, number):
            if number == step:
                raise MemoryError
            return prepare(self, batch, number)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(ClipnObjective, "prepare", prepare_or_fail)
            train(config)
        return config

    return _killed


# Stop requests


def test_a_stop_request_ends_workers_whose_reads_stall(config_file, straight, monkeypatch):
    read = PairDataset.__getitem__

    def stall_in_epoch_1(self, item):
        if item[0] == 1:
            os.kill(os.getppid(), signal.SIGTERM)
            threading.Event().wait()
        return read(self, item)

    config = load_config(config_file, ["data.workers=2"])
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="by signal 15 after step [0-3] of 6"):
        patch.setattr(PairDataset, "__getitem__", stall_in_epoch_1)
        train(config)
    assert not multiprocessing.active_children()
    assert_same(weights(train(config)), straight["clipn"])


# Checkpoints


def test_a_killed_run_loses_only_the_steps_after_its_checkpoint(killed, straight, caplog):
    config = killed(5)
    caplog.set_level(logging.INFO)
    assert_same(weights(train(config)), straight["clipn"])
    assert "step_4.pt" in caplog.text and "from step 4" in caplog.text


def test_the_newest_and_every_mth_epochs_are_kept(config_file):
    words = ["train.epochs=5", "train.checkpoint_every_steps=1", "train.keep_checkpoints=3"]
    config = load_config(config_file, [*words, "train.keep_every_epochs=2"])
    folder = last_checkpoint(config.run.dir).parent
    folder.mkdir(parents=True)
    (folder / "step_9.pt.123.partial").write_bytes(b"of a killed run")
    last = train(config)
    names = ["epoch_2.pt", "epoch_4.pt", "epoch_5.pt", "last.pt", "step_13.pt", "step_14.pt", "step_15.pt"]
    assert files(folder) == names
    steps = [read_checkpoint(last.parent / name)["training"]["step"] for name in names]
    assert steps == [6, 12, 15, 15, 13, 14, 15]


@pytest.mark.parametrize("minutes, checkpoints", [(1e-9, 3), (0, 1)])
def test_checkpoints_are_written_by_time_too(config_file, minutes, checkpoints):
    words = [*FEW, "train.checkpoint_every_steps=0", "train.keep_checkpoints=9"]
    last = train(load_config(config_file, [*words, f"train.checkpoint_every_minutes={minutes}"]))
    assert len(list(last.parent.glob("step_*"))) == checkpoints


def test_training_continues_while_a_checkpoint_is_written(config_file, finished_run, monkeypatch):
    next_step, write, prepare = threading.Event(), clipn.training.run_folder.write_checkpoint, ClipnObjective.prepare

    def slow_write(content, path):
        assert path.name == "step_6.pt" or next_step.wait(60), "training waited for the disk"
        next_step.clear()
        write(content, path)

    def prepared(self, batch, step):
        if step in (2, 3, 4):  # the step after a checkpoint
            next_step.set()
        return prepare(self, batch, step)

    monkeypatch.setattr(clipn.training.run_folder, "write_checkpoint", slow_write)
    monkeypatch.setattr(ClipnObjective, "prepare", prepared)
    last = train(load_config(config_file))
    for name in ("epoch_1.pt", "last.pt"):
        assert_same(weights(last.with_name(name)), weights(finished_run / "checkpoints" / name))


def test_a_full_disk_stops_the_run_and_loses_no_checkpoint(config_file, straight, monkeypatch):
    config, sync = load_config(config_file), os.fsync

    def full(descriptor):
        if "step_4" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    folder = last_checkpoint(config.run.dir).parent
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(clipn.runtime.files.os, "fsync", full)
        train(config)
    assert files(folder) == ["epoch_1.pt", "last.pt", "step_2.pt", "step_3.pt"]
    assert newest_checkpoint(folder)[1]["training"]["step"] == 3
    assert_same(weights(train(config)), straight["clipn"])


def test_a_truncated_checkpoint_is_replaced_by_the_one_before(finished, straight, caplog):
    folder = last_checkpoint(finished.run.dir).parent
    for name in ("step_6.pt", "last.pt", "epoch_2.pt"):
        (folder / name).unlink()
    os.truncate(folder / "step_4.pt", 1000)
    caplog.set_level(logging.INFO)
    assert_same(weights(train(finished)), straight["clipn"])
    assert "step_4.pt: not a whole checkpoint file" in caplog.text and "from step 3" in caplog.text
    assert [line["step"] for line in metrics(finished.run.dir)] == [1, 2, 3, 4, 5, 6]


def test_unreadable_and_crafted_checkpoints_are_neither_executed_nor_overwritten(finished, tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for path in last_checkpoint(finished.run.dir).parent.iterdir():
        path.write_bytes(b"" if path.name == "step_4.pt" else pickle.dumps(Crafted(), protocol=2))
    with pytest.raises(ValueError, match="none of its 5 checkpoints can be read; move them away to start again"):
        train(finished)
    assert not (tmp_path / "executed").exists()


def test_the_beginning_of_another_run_is_not_overwritten(config_file, killed):
    config = killed(1)
    with pytest.raises(ValueError, match=r"the beginning of a run with other settings: train\.lr: 0\.001 -> 0\.1"):
        train(load_config(config_file, ["train.lr=0.1"]))
    assert len(metrics(config.run.dir)) == 1
    train(config)


def test_a_folder_in_which_another_process_trains_is_refused(config_file):
    config = load_config(config_file, FEW)
    with locked(config.run.dir):
        pass
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(Path(config.run.dir) / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"run\.dir=.*another process is training there"):
            train(config)
        other.kill()
    train(config)


# Bad pairs


def damage(config_file: Path, count: int, more=None, **parts: bytes) -> None:
    """Replace the .jpg or .txt of the config's first pairs; more: further samples."""
    samples = numbered_samples(20, first=40)
    for sample in list(samples.values())[:count]:
        sample.update(parts)
    write_shard(config_file.parent / "pairs.tar", samples | (more or {}))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_and_missing_pairs_are_logged_by_cause_in_every_epoch(config_file, caplog, workers):
    damage(config_file, 1, txt=b" ", more={"x": {"jpg": image_bytes()}, "y": {"txt": b"alone"}})
    caplog.set_level(logging.INFO)
    config = load_config(config_file, [f"data.workers={workers}", "train.batch_size=20", "data.max_bad_fraction=0.2"])
    train(config)
    first, second = metrics(config.run.dir)
    assert first["left_out"] == second["left_out"] == {"image or caption missing": 2}
    count = first["skipped"]["empty caption"]
    assert 1 <= count < second["skipped"]["empty caption"]
    assert "epoch 1 of 2: loss" in caplog.text
    assert f"pairs skipped: 2 image or caption missing, {count} empty caption" in caplog.text


def test_too_many_bad_pairs_stop_the_run_with_the_counts(config_file):
    damage(config_file, 3, jpg=b"no image")
    words = [*FEW, "train.batch_size=20"]
    config = load_config(config_file, words)
    with pytest.raises(ValueError, match=r"(\d) of 2\d pairs are bad \(\1 broken image\).*max_bad_fraction=0\.05"):
        train(config)
    train(load_config(config_file, [*words, "data.max_bad_fraction=0.5", f"run.dir={config.run.dir}2"]))


def test_the_count_of_bad_pairs_survives_a_resume(config_file, killed):
    damage(config_file, 1, jpg=b"")
    words = ["train.batch_size=20", "train.epochs=4", "data.max_bad_fraction=0.5"]
    config, straight = killed(2, *words), load_config(config_file, [*words, f"run.dir={config_file.parent}/straight"])
    train(config)
    train(straight)
    counts = [line["skipped"]["empty image file"] for line in metrics(config.run.dir)]
    assert counts == [line["skipped"]["empty image file"] for line in metrics(straight.run.dir)] and counts[-1] >= 4


def test_missing_data_is_reported_before_weights_are_read(config_file):
    (config_file.parent / "empty.tar").write_bytes(b"")
    for word, error, message in (
        ("data.shards=gone/*.tar", FileNotFoundError, "gone"),
        ("train.batch_size=63", ValueError, r"train\.batch_size=63: an epoch has only 20 pairs"),
        (f"data.shards={config_file.parent}/empty.tar", ValueError, r"no pair in 1 shards.*empty\.tar"),
    ):
        with pytest.raises(error, match=message):
            train(load_config(config_file, ["model.pretrained=nowhere.pt", word]))


# Bad numbers


@pytest.mark.parametrize("factor, log_every", [("nan", 1), ("inf", 1), ("nan", 100)])
def test_a_bad_loss_stops_the_run_and_names_its_step_and_pairs(config_file, monkeypatch, factor, log_every):
    loss, losses, batches, take_step = ClipnObjective.loss, [], [], Run.take_step

    def broken(self, trained, batch, rows):
        total, terms = loss(self, trained, batch, rows)
        losses.append(total)
        return total * (float(factor) if len(losses) == 4 else 1), terms

    def noted(self, batch):
        batches.append([self.pair_name(pair) for pair in batch["number"].tolist()])
        take_step(self, batch)

    monkeypatch.setattr(ClipnObjective, "loss", broken)
    monkeypatch.setattr(Run, "take_step", noted)
    config = load_config(config_file, [f"train.log_every_steps={log_every}", "train.checkpoint_every_steps=0"])
    with pytest.raises(FloatingPointError, match=rf"{factor} at step 4 of 6; the last good checkpoint is .*last\.pt"):
        train(config)
    assert len(losses) == (4 if log_every == 1 else 6), "the number is read when the step is logged"
    assert (Path(config.run.dir) / "bad_batch.txt").read_text().splitlines() == batches[3]
    content = read_checkpoint(last_checkpoint(config.run.dir))
    assert content["training"]["step"] == 3
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(config_file):
    config = load_config(config_file, ["train.lr=1e39", "train.checkpoint_every_steps=1"])
    with pytest.raises(FloatingPointError, match="no checkpoint was written before"):
        train(config)
    assert not last_checkpoint(config.run.dir).exists()


def overflow(monkeypatch, steps) -> None:
    """Make the gradient infinite in these steps, counted from 1."""
    backward, calls = torch.Tensor.backward, []

    def overflowing(self, *args, **options):
        calls.append(1)
        backward(self * float("inf") if len(calls) in steps else self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "backward", overflowing)


def test_steps_that_a_loss_scale_skips_are_counted(config_file, tmp_path, monkeypatch):
    words = ["train.precision=fp16", "train.epochs=6", f"model.pretrained={write_clipn(tmp_path / 'start.pt')}"]
    plain, bad = (load_config(config_file, [*words, f"run.dir={tmp_path}/{name}"]) for name in ("plain", "bad"))
    train(plain)
    overflow(monkeypatch, {12, 13, 15})
    last = train(bad)
    assert metrics(bad.run.dir)[-1]["skipped_steps"] == metrics(plain.run.dir)[-1]["skipped_steps"] + 3
    assert all(value.isfinite().all() for value in weights(last).values())


def test_a_gradient_that_stays_infinite_stops_the_run(config_file, monkeypatch):
    overflow(monkeypatch, range(1, 100))
    with pytest.raises(FloatingPointError, match="the gradient is (nan|inf) at step 21"):
        train(load_config(config_file, ["train.precision=fp16", "train.epochs=8"]))


class _Reads(TorchDispatchMode):
    """Counts the floating-point numbers that Python reads from tensors: on a GPU each read waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            _Reads.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["clipn", "clip"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_does_not_wait_for_the_device(config_file, monkeypatch, objective, precision):
    take_step, steps = Run.take_step, []

    def counted(self, batch):
        with _Reads():
            take_step(self, batch)
        steps.append(_Reads.count)

    monkeypatch.setattr(_Reads, "count", 0)
    monkeypatch.setattr(Run, "take_step", counted)
    train(load_config(config_file, [*FEW, f"train.objective={objective}", f"train.precision={precision}"]))
    assert steps == [0, 0, 0]


# Logs


def test_tensorboard_has_the_same_numbers(finished_run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = reader.EventAccumulator(str(finished_run / "tensorboard"))
    board.Reload()
    values = [event.value for event in board.Scalars("loss")]
    assert values == pytest.approx([line["loss"] for line in metrics(finished_run)])


def test_tensorboard_is_not_needed(config_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = load_config(config_file, FEW)
    train(config)
    assert len(metrics(config.run.dir)) == 3 and not (Path(config.run.dir) / "tensorboard").exists()
