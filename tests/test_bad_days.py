"""What a run survives: full disks, broken files, bad pairs, bad numbers; and what it keeps and tells."""

import errno
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_clipn
from helpers import files, jpeg_bytes, numbered_samples, write_shard
from test_train import assert_same, weights

import clipn.runtime.files
import clipn.training.run_folder
import clipn.training.run_log
from clipn.config.loading import load_config
from clipn.model.checkpoint import last_checkpoint, read_checkpoint
from clipn.training.loop import train
from clipn.training.objectives import ClipnObjective
from clipn.training.run_folder import locked, newest_checkpoint


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, step: int) -> None:
    """The process is as good as killed when it is about to take this step, counted from 0."""
    prepare = ClipnObjective.prepare

    def prepared(self, batch, number):
        if number == step:
            raise MemoryError
        return prepare(self, batch, number)

    monkeypatch.setattr(ClipnObjective, "prepare", prepared)
    return prepare


# Checkpoints


def test_the_newest_and_every_mth_epochs_are_kept(config_file):
    more = ["train.epochs=5", "train.checkpoint_every_steps=1", "train.keep_checkpoints=3", "train.keep_every_epochs=2"]
    last = train(load_config(config_file, more))
    names = ["epoch_2.pt", "epoch_4.pt", "epoch_5.pt", "last.pt", "step_13.pt", "step_14.pt", "step_15.pt"]
    assert files(last.parent) == names
    steps = [read_checkpoint(last.parent / name)["training"]["step"] for name in names]
    assert steps == [6, 12, 15, 15, 13, 14, 15]


def test_checkpoints_are_written_by_the_clock_too(config_file):
    more = ["train.checkpoint_every_steps=0", "train.keep_checkpoints=9"]
    last = train(load_config(config_file, [*more, "train.checkpoint_every_minutes=1e-9"]))
    assert len(list(last.parent.glob("step_*"))) == 6
    last = train(load_config(config_file, [*more, f"run.dir={config_file.parent}/seldom"]))
    assert len(list(last.parent.glob("step_*"))) == 2, "the epochs' ends"


def test_steps_go_on_while_a_checkpoint_is_written(config_file, tmp_path, monkeypatch):
    straight = train(load_config(config_file, [f"run.dir={tmp_path}/straight"]))
    went_on, write, prepare = threading.Event(), clipn.training.run_folder.write_checkpoint, ClipnObjective.prepare

    def slow_write(content, path):
        assert path.name == "step_6.pt" or went_on.wait(60), "training waited for the disk"
        went_on.clear()
        write(content, path)

    def prepared(self, batch, step):
        if step in (2, 3, 4):  # the step after a checkpoint
            went_on.set()
        return prepare(self, batch, step)

    monkeypatch.setattr(clipn.training.run_folder, "write_checkpoint", slow_write)
    monkeypatch.setattr(ClipnObjective, "prepare", prepared)
    last = train(load_config(config_file))
    for name in ("epoch_1.pt", "last.pt"):
        assert_same(weights(last.with_name(name)), weights(straight.with_name(name)))


def test_a_full_disk_stops_the_run_and_loses_no_checkpoint(config_file, tmp_path, monkeypatch):
    straight = train(load_config(config_file, [f"run.dir={tmp_path}/straight"]))
    config, sync = load_config(config_file), os.fsync

    def full(descriptor):
        if "step_4" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(clipn.runtime.files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert files(last_checkpoint(config.run.dir).parent) == ["epoch_1.pt", "last.pt", "step_2.pt", "step_3.pt"]
    assert newest_checkpoint(last_checkpoint(config.run.dir).parent)[1]["training"]["step"] == 3
    monkeypatch.setattr(clipn.runtime.files.os, "fsync", sync)
    assert_same(weights(train(config)), weights(straight))


def test_a_broken_checkpoint_gives_way_to_the_one_before(config_file, tmp_path, monkeypatch, caplog):
    straight = train(load_config(config_file, [f"run.dir={tmp_path}/straight"]))
    config = load_config(config_file)
    prepare = stop_at(monkeypatch, 4)
    with pytest.raises(MemoryError):
        train(config)
    monkeypatch.setattr(ClipnObjective, "prepare", prepare)
    os.truncate(last_checkpoint(config.run.dir), 1000)
    caplog.set_level(logging.INFO)
    assert_same(weights(train(config)), weights(straight))
    assert "step_4.pt: not a whole checkpoint file" in caplog.text and "from step 3" in caplog.text
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_of_broken_checkpoints_is_not_trained_anew(config_file):
    config = load_config(config_file)
    for path in train(config).parent.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 5 checkpoints can be read; move them away to start anew"):
        train(config)


def test_a_crafted_checkpoint_is_not_executed_on_resume(config_file, tmp_path):
    config = load_config(config_file)

    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    last = last_checkpoint(config.run.dir)
    last.parent.mkdir(parents=True)
    last.write_bytes(pickle.dumps(Crafted()))
    with pytest.raises(ValueError, match="can be read"):
        train(config)
    assert not (tmp_path / "executed").exists()


def test_what_a_kill_left_half_written_is_cleared_away(config_file):
    config = load_config(config_file)
    left_over = last_checkpoint(config.run.dir).with_name("step_9.pt.123.partial")
    left_over.parent.mkdir(parents=True)
    left_over.write_bytes(b"half")
    train(config)
    assert not left_over.exists()


def test_the_beginning_of_another_run_is_not_overwritten(config_file, monkeypatch):
    prepare = stop_at(monkeypatch, 1)
    config = load_config(config_file)
    with pytest.raises(MemoryError):
        train(config)
    monkeypatch.setattr(ClipnObjective, "prepare", prepare)
    with pytest.raises(ValueError, match=r"the beginning of a run with other settings: train\.lr: 0\.001 -> 0\.1"):
        train(load_config(config_file, ["train.lr=0.1"]))
    assert len(lines(config)) == 1
    train(config)


def test_a_folder_in_which_another_process_trains_is_left_alone(config_file):
    config = load_config(config_file)
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


def hurt(config_file: Path, count: int, **parts: bytes) -> None:
    """The config's 20 pairs, the first few of them with another .jpg or .txt."""
    samples = numbered_samples(20, first=40)
    for sample in list(samples.values())[:count]:
        sample.update(parts)
    write_shard(config_file.parent / "pairs.tar", samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pairs_are_told_by_cause_in_every_epoch(config_file, caplog, workers):
    hurt(config_file, 1, txt=b" ")
    caplog.set_level(logging.INFO)
    config = load_config(config_file, [f"data.workers={workers}", "train.batch_size=20", "data.max_bad_fraction=0.1"])
    train(config)
    first, second = [line["skipped"]["empty caption"] for line in lines(config)]
    assert 1 <= first < second
    assert "epoch 1 of 2: loss" in caplog.text and f"pairs skipped: {first} empty caption" in caplog.text


def test_what_the_shards_lack_is_told_too(config_file):
    samples = numbered_samples(60, first=40) | {"x": {"jpg": jpeg_bytes()}, "y": {"txt": b"alone"}}
    write_shard(config_file.parent / "pairs.tar", samples)
    config = load_config(config_file)
    train(config)
    assert lines(config)[-1]["left_out"] == {"image or caption missing": 2}


def test_too_many_bad_pairs_stop_the_run_with_the_counts(config_file):
    hurt(config_file, 3, jpg=b"no image")
    config = load_config(config_file, ["train.batch_size=20"])
    with pytest.raises(ValueError, match=r"(\d) of 2\d pairs are bad \(\1 broken image\).*max_bad_fraction=0\.05"):
        train(config)
    train(load_config(config_file, ["train.batch_size=20", "data.max_bad_fraction=0.5", f"run.dir={config.run.dir}2"]))


def test_the_count_of_bad_pairs_survives_a_resume(config_file, monkeypatch):
    hurt(config_file, 1, jpg=b"")
    more = ["train.batch_size=20", "train.epochs=4", "data.max_bad_fraction=0.5"]
    config, straight = (
        load_config(config_file, [*more, *to]) for to in ([], [f"run.dir={config_file.parent}/straight"])
    )
    prepare = stop_at(monkeypatch, 2)
    with pytest.raises(MemoryError):
        train(config)
    monkeypatch.setattr(ClipnObjective, "prepare", prepare)
    train(config)
    counts = [line["skipped"]["empty image file"] for line in lines(config)]
    train(straight)
    assert counts == [line["skipped"]["empty image file"] for line in lines(straight)] and counts[-1] >= 4


def test_data_that_is_not_there_is_told_before_weights_are_read(config_file):
    more = ["model.pretrained=nowhere.pt"]
    with pytest.raises(FileNotFoundError, match="gone"):
        train(load_config(config_file, [*more, "data.shards=gone/*.tar"]))
    (config_file.parent / "empty.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.batch_size=63: an epoch has only 20 pairs"):
        train(load_config(config_file, [*more, "train.batch_size=63"]))
    with pytest.raises(ValueError, match=r"no pair in 1 shards.*empty\.tar"):
        train(load_config(config_file, [*more, f"data.shards={config_file.parent}/empty.tar"]))


# Bad numbers


def test_a_bad_number_names_its_batch(config_file, monkeypatch):
    loss, numbers = ClipnObjective.loss, []

    def broken(self, trained, batch, rows):
        total, terms = loss(self, trained, batch, rows)
        numbers.append(1)
        return total / (0.0 if len(numbers) == 2 else 1.0), terms

    monkeypatch.setattr(ClipnObjective, "loss", broken)
    config = load_config(config_file)
    with pytest.raises(FloatingPointError, match=r"inf at step 2 .* 6 pairs are listed in .*bad_batch\.txt"):
        train(config)
    names = (Path(config.run.dir) / "bad_batch.txt").read_text().splitlines()
    assert len(set(names)) == 6 and all("pairs.tar, byte" in name for name in names)


def overflow(monkeypatch, steps) -> None:
    """Make the gradient infinite in these steps, counted from 1."""
    backward, taken = torch.Tensor.backward, []

    def overflowing(self, *args, **more):
        taken.append(1)
        backward(self * float("inf") if len(taken) in steps else self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "backward", overflowing)


def test_steps_that_a_loss_scale_skips_are_counted(config_file, tmp_path, monkeypatch):
    start = write_clipn(tmp_path / "start.pt")
    more = ["train.precision=fp16", "train.epochs=20", f"model.pretrained={start}"]
    plain, hurt = (load_config(config_file, [*more, f"run.dir={tmp_path}/{name}"]) for name in ("plain", "hurt"))
    train(plain)
    overflow(monkeypatch, {12, 13, 15})
    last = train(hurt)
    assert lines(hurt)[-1]["skipped_steps"] == lines(plain)[-1]["skipped_steps"] + 3
    assert all(value.isfinite().all() for value in weights(last).values())


def test_a_gradient_that_stays_infinite_stops_the_run(config_file, monkeypatch):
    overflow(monkeypatch, range(1, 100))
    with pytest.raises(FloatingPointError, match="the gradient is (nan|inf) at step 21"):
        train(load_config(config_file, ["train.precision=fp16", "train.epochs=20"]))


# What is told


def test_metrics_say_what_matched_and_unmatched_pairs_get(config_file, tmp_path):
    config = load_config(config_file, [f"model.pretrained={write_clipn(tmp_path / 'start.pt')}"])
    train(config)
    first = lines(config)[0]
    for kind in ("yes", "no"):
        assert abs(first[f"logit_{kind}_matched"]) <= 100 and abs(first[f"logit_{kind}_unmatched"]) <= 100
    assert {"lr", "grad_norm", "prompt_norm", "pairs_per_s", "skipped", "tso", "epoch"} <= first.keys()


def test_tensorboard_has_the_same_numbers(config_file):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = load_config(config_file)
    train(config)
    board = reader.EventAccumulator(str(Path(config.run.dir) / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines(config)])


def test_tensorboard_is_not_needed(config_file, monkeypatch):
    monkeypatch.setattr(clipn.training.run_log, "SummaryWriter", None)
    config = load_config(config_file)
    train(config)
    assert len(lines(config)) == 6 and not (Path(config.run.dir) / "tensorboard").exists()
