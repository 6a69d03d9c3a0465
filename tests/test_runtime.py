"""Devices, signals of worker processes, and errors of the device in one line."""

import multiprocessing
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from test_train import ROOT

from clipn.runtime.console import FAILED, fail_in_one_line
from clipn.runtime.distributed import choose_device, process_group
from clipn.runtime.signals import ignore_stop_signals, killed_children


def test_mps_is_a_device_of_one_process_where_it_is_available(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device=mps: runs in one process"), process_group(choose_device("mps")):
        pass
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=mps: not available"):
        choose_device("mps")


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:x", ""])
def test_another_device_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="expected auto, cpu, cuda, cuda:N or mps"):
        choose_device(name)


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device. If ...\nsee"),
        TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."),
    ],
)
def test_an_operation_that_mps_lacks_is_one_line_with_the_way_out(caplog, error):
    with pytest.raises(SystemExit) as stopped:
        fail_in_one_line(Mock(side_effect=error))
    (message,) = caplog.messages
    assert stopped.value.code == FAILED
    assert message.startswith(f"error: {str(error)[:40]}") and "\n" not in message
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in message and "run.device=cpu" in message
    with pytest.raises(type(error), match="of our own"):
        fail_in_one_line(Mock(side_effect=type(error)("an error of our own")))


def answer(pipe) -> None:
    ignore_stop_signals(0)
    pipe.send("ready")
    pipe.send(pipe.recv())
    pipe.recv()


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_ignores_stop_signals_and_its_parent_kills_it(method):
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    worker = context.Process(target=answer, args=(there,), daemon=True)
    with killed_children():
        worker.start()
        assert here.recv() == "ready"
        for number in ("INT", "TERM"):  # as from a terminal or a cluster
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
        here.send("alive")
        assert here.recv() == "alive"
    worker.join()
    assert worker.exitcode == -signal.SIGKILL


def test_a_process_ends_while_its_loader_is_alive(config_file):
    script = f"""
import torch
from clipn.config.loading import load_config
from dataclasses import asdict
from open_clip.transform import PreprocessCfg
from clipn.data.pairs import open_pairs, training_loader
config = load_config({str(config_file)!r}, ["data.workers=1"])
tokenizer = lambda texts: torch.zeros(len(texts), 16, dtype=torch.long)
batches = iter(training_loader(config, open_pairs(config.data), asdict(PreprocessCfg(size=32)), tokenizer)[0])
print(next(batches)["tokens"].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=90, start_new_session=True
    )
    assert done.returncode == 0 and "torch.Size([6, 16])" in done.stdout, done.stderr
