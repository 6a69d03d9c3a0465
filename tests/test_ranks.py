"""Many ranks: one process's numbers, one exit code, each image once."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_clipn
from helpers import numbered_samples, write_images, write_shard
from test_train import ROOT, assert_same, weights

from clipn.config.loading import load_config
from clipn.evaluation.evaluate import evaluate
from clipn.runtime.console import FAILED
from clipn.runtime.signals import RESUME
from clipn.training.loop import train
from clipn.training.run_folder import newest_checkpoint


def start(ranks: int, *arguments: object) -> subprocess.Popen:
    """A script on many ranks."""
    return _start("scripts/launch.py", "--standalone", f"--nproc_per_node={ranks}", *arguments)


def start_training(ranks: int, *arguments: object) -> subprocess.Popen:
    """What `NPROC=ranks sh run.sh` starts."""
    return _start("-m", "clipn", "train", *arguments, NPROC=str(ranks), CLIPN_COMMAND="sh run.sh mine.yaml")


def _start(*arguments: object, **variables: str) -> subprocess.Popen:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def lines(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for_steps(folder: Path, steps: int) -> None:
    for _ in range(2400):
        if len(lines(folder)) >= steps:
            return
        time.sleep(0.05)
    raise TimeoutError


@pytest.fixture
def uneven(tmp_path):
    """Two shards of 3 and 17 pairs, for ranks of two workers each: in each epoch 2 pairs fill no batch of 6."""
    paths = [
        write_shard(tmp_path / f"{size}.tar", numbered_samples(size, first=first))
        for size, first in ((3, 20), (17, 40))
    ]
    return [f"data.shards=[{','.join(map(str, paths))}]", "data.workers=2"]


@pytest.fixture
def long_run(tmp_path):
    """2 epochs of 300 steps, where n is not g: there, as at the very start, TSO's gradient is mostly rounding."""
    shard = write_shard(tmp_path / "many.tar", numbered_samples(1800))
    start = write_clipn(tmp_path / "start.pt")
    return [f"data.shards={shard}", f"model.pretrained={start}", "train.checkpoint_every_steps=25", "train.eps=1e-2"]


@pytest.mark.parametrize("ranks, objective", [(2, "clipn"), (3, "clipn"), (2, "clip")])
def test_many_ranks_are_one_process(config_file, uneven, tmp_path, ranks, objective):
    # With a tiny eps, Adam turns the rounding of a gradient that is nearly 0 into a whole step.
    more = [*uneven, f"train.objective={objective}", "train.eps=1e-2"]
    if objective == "clipn":
        more.append(f"model.pretrained={write_clipn(tmp_path / 'start.pt')}")
    alone = train(load_config(config_file, [*more, "data.workers=0", f"run.dir={tmp_path}/alone"]))
    output = finish(start(ranks, "scripts/train.py", config_file, *more))
    assert_same(weights(alone), weights(tmp_path / "run/checkpoints/last.pt"), rtol=2e-4, atol=2e-5)
    first, second = lines(tmp_path / "alone"), lines(tmp_path / "run")
    assert [line["step"] for line in second] == [1, 2, 3, 4, 5, 6]
    for name in {"loss", "itbo_yes", "tso", "logit_no_matched", "logit_yes_unmatched"} & first[0].keys():
        assert [line[name] for line in second] == pytest.approx([line[name] for line in first], rel=1e-4, abs=1e-4)
    assert "2 pairs fill no batch: each epoch leaves out that many" in output


def test_ranks_stopped_on_request_say_so_and_one_process_goes_on(config_file, long_run, tmp_path, caplog):
    process = start_training(2, config_file, *long_run)
    wait_for_steps(tmp_path / "run", 30)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == RESUME, output[-3000:]
    assert "the same command goes on from there: sh run.sh mine.yaml" in output
    step = newest_checkpoint(tmp_path / "run/checkpoints")[1]["training"]["step"]
    assert step == len(lines(tmp_path / "run")) < 600
    with caplog.at_level(logging.INFO):
        last = train(load_config(config_file, long_run))
    assert "going on with 1 ranks instead of 2: each now has 6 pairs" in caplog.text
    straight = train(load_config(config_file, [*long_run, f"run.dir={tmp_path}/straight"]))
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 601))
    assert_same(weights(straight), weights(last), rtol=5e-3, atol=5e-4)


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(config_file, long_run, tmp_path):
    process = start_training(2, config_file, *long_run)
    wait_for_steps(tmp_path / "run", 60)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == FAILED and "exit code -9" in output, output[-3000:]
    kept = newest_checkpoint(tmp_path / "run/checkpoints")[1]["training"]["step"]
    assert kept >= 50
    output = finish(start(2, "scripts/train.py", config_file, *long_run))
    assert f"from step {kept}" in output
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 601))


def test_each_image_is_judged_once_on_three_ranks(config_file, tmp_path):
    write_images(tmp_path / "id", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(5)))
    write_images(tmp_path / "ood", *(f"{n}.png" for n in range(7)))
    (tmp_path / "ood/3.png").write_bytes(b"no image")
    more = [f"eval.id={tmp_path}/id", f"eval.ood={tmp_path}/ood", "features.part_size=2", "eval.class_names=folders"]
    more.append(f"eval.checkpoints={write_clipn(tmp_path / 'clipn.pt')}")
    arguments = ["zero_shot_infer.py", "--config", config_file, *more]
    alone = evaluate(load_config(config_file, [*more, f"run.dir={tmp_path}/alone"]))
    output = finish(start(3, *arguments))
    assert output.count("done: ") == 1
    together = pd.read_csv(tmp_path / "run/results.csv")
    pd.testing.assert_frame_equal(together, pd.read_csv(tmp_path / "alone/results.csv"), rtol=1e-4)
    assert [len(found.images) for found in alone.found.values()] == [10, 6]
    assert "3.png" in (tmp_path / "run/results.md").read_text()
