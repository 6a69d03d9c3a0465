"""The `clipn` command: help, usage, exit codes, the launch on all GPUs, and the command that resumes."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from clipn import __version__, cli
from clipn.config.loading import load_config
from clipn.runtime.console import fail_in_one_line, start_log
from clipn.runtime.signals import RESUME, Interrupted

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clipn(capsys):
    """Runs the command; returns its exit code, and what was printed."""

    def _clipn(*words):
        try:
            cli.main(list(words))
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return _clipn


@pytest.fixture
def launched(monkeypatch):
    """The arguments of every start of torchrun, with 3 processes asked for."""
    calls = []
    monkeypatch.setattr("clipn.runtime.launch.launch", lambda arguments: calls.append(arguments) or 0)
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    return calls


@pytest.mark.parametrize(
    "command",
    ["", "predict", "demo", "train", "eval", "features", "adversarial", "ablate", "prepare", "classes", "export onnx"],
)
def test_help_fits_the_terminal_and_names_the_command(clipn, command):
    code, shown = clipn(*command.split(), "--help")
    assert code == 0 and max(map(len, shown.out.splitlines())) <= 120
    assert f"usage: clipn {command}".rstrip() in shown.out
    assert command or all(name in shown.out for name in ("predict", "train", "eval", "demo", "exit codes"))


def test_version_and_wrong_usage(clipn):
    assert clipn("--version") == (0, (f"clipn-ood {__version__}\n", ""))
    for words in ([], ["tell"], ["predict", "photos"], ["eval", "x.yaml"], ["export", "share", "run"]):
        code, shown = clipn(*words)
        assert code == 2 and "usage: clipn" in shown.err


def test_train_writes_a_checkpoint_and_errors_are_one_line(config_file, clipn):
    code, shown = clipn("train", str(config_file), "train.epochs=1")
    last = config_file.parent / "run" / "checkpoints" / "last.pt"
    assert code == 0 and last.is_file() and f"done: {last}" in shown.out
    code, shown = clipn("eval", "--config", str(config_file))
    assert code == 1 and "eval.id: names no image set to evaluate on" in shown.err
    code, shown = clipn("predict", "--classes", "a,b", "--checkpoint", "missing.pt", "nowhere")
    assert code == 1 and "missing.pt" in shown.err and len(shown.err.splitlines()) == 1


def test_scripts_and_module_run_the_same_command(config_file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = "error: command line, train.lr=fast: train.lr: Value 'fast' of type 'str' could not be converted to Float"
    for run, name, words in (
        (runpy.run_path, "scripts/train.py", []),
        (runpy.run_path, "zero_shot_infer.py", ["--config"]),
        (runpy.run_module, "clipn", ["train"]),
    ):
        monkeypatch.setattr(sys, "argv", [name, *words, str(config_file), "train.lr=fast"])
        with pytest.raises(SystemExit) as stopped:
            run(name, run_name="__main__")
        assert stopped.value.code == 1 and capsys.readouterr().err.splitlines() == [message]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "toy", "train.lr=1e-4"],
        ["train"],
        ["eval", "--config", "toy", "eval.scale=50"],
        ["correlation", "--config", "toy"],
        ["features", "toy", "features.dir=my features"],
        ["adversarial", "--config", "toy", "eval.train=my photos"],
        ["ablate", "toy", "loss", "run.seeds=[0,1]"],
    ],
)
def test_every_gpu_command_starts_torchrun_once(clipn, launched, monkeypatch, words):
    for number in ("0", "two", "-1"):
        with monkeypatch.context() as patch:
            patch.setenv("NPROC", number)
            code, shown = clipn(*words)
        assert code == 1 and shown.err == f"error: NPROC='{number}': expected a number of processes, 1 or more\n"
    assert clipn(*words)[0] == 0
    assert launched == [["--nproc_per_node=3", "--standalone", "-m", "clipn", *words]]
    assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere", "a checkout that is not installed is found"


def test_several_machines_and_launched_processes(config_file, clipn, launched, monkeypatch):
    with monkeypatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "PET_MASTER_ADDR": "first"}.items():
            patch.setenv(name, value)  # a cluster may set RANK for its machines
        assert clipn("train", str(config_file))[0] == 0
    assert launched == [["--nproc_per_node=3", "-m", "clipn", "train", str(config_file)]]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # a process that torchrun has started
    assert clipn("train", str(config_file), "train.epochs=1")[0] == 0 and len(launched) == 1


def test_the_printed_command_is_the_typed_one(monkeypatch):
    words = ["train", "my config.yaml", "data.shards=/data/{00000..00331}.tar"]
    quoted = "'my config.yaml' 'data.shards=/data/{00000..00331}.tar'"
    for script, program, processes, expected in (
        ("/usr/bin/clipn", None, None, f"clipn train {quoted}"),
        ("/x/clipn/__main__.py", None, "3", f"NPROC=3 clipn train {quoted}"),
        ("scripts/train.py", None, None, f"python scripts/train.py {quoted}"),
        ("/x/clipn/__main__.py", "run.sh", None, f"sh run.sh {quoted}"),
        ("/x/clipn/__main__.py", "../my clipn/run.sh", "3", f"NPROC=3 sh '../my clipn/run.sh' {quoted}"),
    ):
        monkeypatch.setattr(sys, "argv", [script, *(words[1:] if "train.py" in script else words)])
        for name, value in {"CLIPN_PROGRAM": program, "NPROC": processes}.items():
            monkeypatch.setenv(name, value or "")
        assert cli._typed(words) == expected
        assert shlex.split(expected)[-2:] == words[-2:]


def test_a_stopped_run_prints_the_command_that_resumes(clipn, monkeypatch):
    stop = Mock(side_effect=Interrupted("stopped after step 3; to resume"))
    monkeypatch.setattr("clipn.pipeline.run_training", stop)
    monkeypatch.setattr(sys, "argv", ["clipn"])
    monkeypatch.delenv("NPROC", raising=False)
    code, shown = clipn("train", "toy", "data.shards=pairs/{0..9}.tar")
    assert code == RESUME == 75
    assert shown.err == "stopped after step 3; to resume: clipn train toy 'data.shards=pairs/{0..9}.tar'\n"


def test_run_sh_takes_paths_of_the_callers_folder(config_file, tmp_path):
    home = tmp_path / "my home"
    home.mkdir()
    text = config_file.read_text()
    (home / "mine.yaml").write_text(text.replace(f"{tmp_path}/run", "out").replace(f"{tmp_path}/", "../"))
    (home / "pairs 1.tar").symlink_to(tmp_path / "pairs.tar")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "run.sh"), "mine.yaml", "data.shards=pairs {1..1}.tar", "train.epochs=1"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "done: out/checkpoints/last.pt" in done.stdout and (home / "out/checkpoints/last.pt").is_file()


def test_set_up_names_missing_packages_and_needs_no_gradio(tmp_path):
    (tmp_path / "empty").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')  # has no packages
    (tmp_path / "empty").chmod(0o755)
    (tmp_path / "demo.txt").write_text("# clipn demo\ngradio>=6.0\n")
    (tmp_path / "all.txt").write_text("-r demo.txt\n\ntorch>=2.6\nfsspec[http]>=2024.2\n")
    for python, file, missing in (
        ("./empty", "demo.txt", ""),
        ("./empty", "all.txt", "torch, fsspec, aiohttp\n"),
        (sys.executable, "all.txt", ""),
    ):
        command = f". {shlex.quote(str(ROOT))}/scripts/setup.sh; has_all {shlex.quote(python)} {file}"
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (1 if missing else 0, missing)


def test_an_error_is_one_line_in_the_terminal_and_in_the_log(tmp_path, capsys):
    start_log(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        fail_in_one_line(lambda: int("what to change"))
    assert stopped.value.code == 1 and "what to change" in (tmp_path / "log").read_text()
    assert capsys.readouterr().err == "error: invalid literal for int() with base 10: 'what to change'\n"
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        fail_in_one_line(lambda: 1 / 0)


def test_shipped_configs_load_by_name_anywhere(tmp_path, monkeypatch, clipn):
    names = [path.stem for path in (ROOT / "configs").glob("*.yaml")]
    monkeypatch.chdir(tmp_path)
    assert len(names) >= 6
    for name in names:
        load_config(name)
    for name in ("toy", "toy.yaml", "configs/toy.yaml"):
        config = load_config(name)
        assert Path(config.model.name).is_file() and config.run.dir == "runs/toy"
    assert Path(load_config("eval_imagenet100").eval.class_names).is_file()
    code, shown = clipn("train", "tyo")
    assert code == 1 and "tyo: no such config file" in shown.err and ", toy" in shown.err
    (tmp_path / "toy.yaml").write_text("run: {dir: mine}")
    assert load_config("toy.yaml").run.dir == "mine", "a file in the current folder comes first"
    (tmp_path / "train.lr=1.yaml").write_text("train: {lr: fast}")
    code, shown = clipn("train", "train.lr=1.yaml")
    assert code == 1 and shown.err.startswith("error: train.lr=1.yaml: train.lr: "), "a path may hold an equals sign"


def test_requirements_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    running, developing = (
        [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("requirements.txt", "requirements-dev.txt")
    )
    assert running == project["dependencies"] + extras["demo"]
    assert developing == ["-r requirements.txt", *extras["onnx"], *extras["test"]]
    assert all(re.search(r">=\d", line) for line in running + developing[1:])
    assert project["version"] == __version__
