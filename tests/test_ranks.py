"""Many ranks: the numbers of one process, one exit code, each image once."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import write_clipn
from helpers import files, numbered_samples, run_ranks, write_images, write_shard
from test_train import ROOT, assert_same, metrics, weights
from torch import nn

import clipn.training.loop
import clipn.training.objectives
from clipn.config.loading import load_config
from clipn.pipeline import run_eval
from clipn.runtime import distributed
from clipn.runtime.console import FAILED
from clipn.runtime.distributed import choose_device, process_group, rank
from clipn.runtime.signals import RESUME, Interrupted
from clipn.training.loop import train
from clipn.training.objectives import sync_batch_norm
from clipn.training.run_folder import newest_checkpoint

# Where n = g, as at the start, TSO's gradient is mostly rounding, and with a tiny eps Adam turns the rounding of a
# gradient near 0 into a whole step.
COMPARABLE = ["train.eps=1e-2"]


def train_rank(config_file: Path, words: list[str]) -> None:
    with process_group(choose_device("cpu")):
        train(load_config(config_file, words))


@pytest.fixture
def uneven(tmp_path):
    """Two shards of 3 and 17 pairs, so that in each epoch 2 pairs fill no batch of 6; n is not g."""
    sizes = ((3, 20), (17, 40))
    paths = [write_shard(tmp_path / f"{size}.tar", numbered_samples(size, first=first)) for size, first in sizes]
    start = write_clipn(tmp_path / "start.pt")
    return [f"data.shards=[{','.join(map(str, paths))}]", f"model.pretrained={start}", *COMPARABLE]


@pytest.mark.parametrize("ranks, objective, workers", [(3, "clipn", 2), (2, "clip", 0)])
def test_many_ranks_are_one_process(config_file, base_clip, uneven, tmp_path, caplog, ranks, objective, workers):
    caplog.set_level(logging.INFO)
    words = [*uneven, f"train.objective={objective}", f"data.workers={workers}"]
    if objective == "clip":
        words.append(f"model.pretrained={base_clip}/clip.pt")
    alone = train(load_config(config_file, [*words, "data.workers=0", f"run.dir={tmp_path}/alone"]))
    assert "each epoch leaves out 2 pairs that fill no batch" in caplog.text
    run_ranks(ranks, train_rank, config_file, words)
    assert_same(weights(alone), weights(tmp_path / "run/checkpoints/last.pt"), rtol=2e-4, atol=2e-5)
    first, second = metrics(tmp_path / "alone"), metrics(tmp_path / "run")
    assert [line["step"] for line in second] == [1, 2, 3, 4, 5, 6]
    for name in {"loss", "grad_norm", "itbo_yes", "tso", "logit_no_matched", "logit_yes_unmatched"} & first[0].keys():
        assert [line[name] for line in second] == pytest.approx([line[name] for line in first], rel=1e-4, abs=1e-4)


def train_with_a_stalled_rank(config_file: Path, words: list[str]) -> None:
    """Rank 1 waits for ever for its third batch, and is asked to stop while it waits."""

    def stalled(config, *arguments):
        loader, steps = training_loader(config, *arguments)
        batches = iter(loader)

        def some():
            yield from islice(batches, 2)
            if rank() == 1:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                threading.Event().wait()
            yield next(batches)

        return some(), steps

    training_loader = clipn.training.loop.training_loader
    clipn.training.loop.training_loader = stalled
    with pytest.raises(Interrupted) as stopped:
        train_rank(config_file, words)
    Path(config_file).with_name(f"stopped_{os.environ['RANK']}").write_text(str(stopped.value))


def test_a_stop_request_to_a_rank_without_data_stops_all_and_one_process_resumes(config_file, uneven, tmp_path, caplog):
    run_ranks(2, train_with_a_stalled_rank, config_file, uneven)
    for number, reason in enumerate(("another rank's signal", "signal 15")):
        assert f"stopped by {reason} after step 2 of 6" in (tmp_path / f"stopped_{number}").read_text()
    assert newest_checkpoint(tmp_path / "run/checkpoints")[1]["training"]["step"] == 2
    with caplog.at_level(logging.INFO):
        last = train(load_config(config_file, uneven))
    assert "resuming with 1 ranks instead of 2: each now has 6 pairs" in caplog.text
    straight = train(load_config(config_file, [*uneven, f"run.dir={tmp_path}/straight"]))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert_same(weights(straight), weights(last), rtol=5e-3, atol=5e-4)


def test_each_image_is_evaluated_once_on_three_ranks(config_file, tmp_path):
    write_images(tmp_path / "id", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(5)))
    write_images(tmp_path / "ood", *(f"{n}.png" for n in range(7)))
    (tmp_path / "ood/3.png").write_bytes(b"no image")
    words = [f"eval.id={tmp_path}/id", f"eval.ood={tmp_path}/ood", "features.part_size=2", "eval.class_names=folders"]
    words.append(f"eval.checkpoints={write_clipn(tmp_path / 'clipn.pt')}")
    run_eval(str(config_file), [*words, f"run.dir={tmp_path}/alone"])
    learned = ["eval.methods=[MSP,MaxLogit,Energy,MCM,CTW,ATD,PLP-MSP,TagOOD]", f"eval.train={tmp_path}/id"]
    learned += ["probe.epochs=1", "tagood.epochs=1", "tagood.width=8"]
    run_ranks(3, run_eval, str(config_file), [*words, *learned])
    alone, together = (pd.read_csv(tmp_path / name / "results.csv") for name in ("alone", "run"))
    pd.testing.assert_frame_equal(together[:-2], alone, rtol=1e-4)
    for kind in ("probes", "tagood"):
        assert len(files(tmp_path / "run/features" / kind)) == 1, "one rank fits it, all read it"
    assert "3.png" in (tmp_path / "run/results.md").read_text()


def test_batch_norm_is_synchronised_on_gpus_and_warned_about_elsewhere(monkeypatch, caplog):
    def tower():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    assert isinstance(sync_batch_norm(tower(), choose_device("cpu"))[1], nn.BatchNorm2d) and not caplog.text
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 4)
    synchronised = sync_batch_norm(tower(), torch.device("cuda"))
    assert isinstance(synchronised[1], nn.SyncBatchNorm) and not caplog.text
    assert synchronised.state_dict().keys() == tower().state_dict().keys(), "checkpoints stay the same"
    sync_batch_norm(nn.Sequential(nn.LayerNorm(4)), torch.device("cpu"))
    assert not caplog.text
    assert isinstance(sync_batch_norm(tower(), torch.device("cpu"))[1], nn.BatchNorm2d)
    assert "each of the 4 ranks normalises by its own share" in caplog.text


def start_training(*words: object) -> subprocess.Popen:
    """What `NPROC=2 sh run.sh` starts."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NPROC": "2", "CLIPN_COMMAND": "sh run.sh 'my config.yaml'"}
    command = [sys.executable, "-m", "clipn", "train", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    while not any(line["step"] >= step for line in metrics(folder)):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)


def last_step(folder: Path) -> int:
    return newest_checkpoint(folder / "checkpoints")[1]["training"]["step"]


def test_a_killed_rank_ends_the_others_and_a_stop_request_ends_all_with_a_checkpoint(config_file, tmp_path):
    run = tmp_path / "run"
    words = [config_file, "train.epochs=100000", "train.checkpoint_every_steps=5", "data.workers=1"]
    process = start_training(*words)
    wait_for_step(run, 12, process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == FAILED and "exit code -9; the same command resumes" in output, output[-3000:]
    kept = last_step(run)
    assert kept >= 5

    process = start_training(*words)
    wait_for_step(run, kept + 6, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == RESUME, output[-3000:]
    assert f"from step {kept}" in output
    assert "the same command resumes from it: sh run.sh 'my config.yaml'" in output
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, last_step(run) + 1)), "no step is lost or logged twice"
