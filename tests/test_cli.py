"""The `clipn` command as a person types it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipn import __version__
from clipn.cli import main
from clipn.config.loading import load_config

ROOT = Path(__file__).resolve().parent.parent


def typed(capsys, *words):
    """Runs the command; returns its exit code, and what was printed."""
    try:
        main(list(words))
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr()
    return 0, capsys.readouterr()


@pytest.mark.parametrize("words", [[], ["predict"], ["train"], ["eval"], ["demo"]])
def test_help_reads_well(capsys, words):
    code, shown = typed(capsys, *words, "--help")
    assert code == 0 and max(map(len, shown.out.splitlines())) <= 120
    assert f"clipn {words[0] if words else 'predict'}" in shown.out
    assert words or all(name in shown.out for name in ("predict", "train", "eval", "demo", "exit codes"))


def test_version_and_wrong_usage(capsys):
    assert typed(capsys, "--version") == (0, (f"clipn-ood {__version__}\n", ""))
    for words in ([], ["tell"], ["predict", "photos"], ["eval", "x.yaml"]):
        code, shown = typed(capsys, *words)
        assert code == 2 and "usage: clipn" in shown.err


def test_train_and_eval_are_the_same_doors_as_the_scripts(config_file, capsys):
    code, shown = typed(capsys, "train", str(config_file), "train.epochs=1")
    last = config_file.parent / "run" / "checkpoints" / "last.pt"
    assert code == 0 and last.is_file() and f"done: {last}" in shown.out
    code, shown = typed(capsys, "eval", "--config", str(config_file))
    assert code == 1 and "eval.id: names no image set to evaluate on" in shown.err
    code, shown = typed(capsys, "train", str(config_file), "train.lr=fast")
    assert code == 1 and shown.err.startswith("error: command line, train.lr=fast")


@pytest.mark.parametrize("asked", ["0", "two", "-1"])
def test_an_impossible_number_of_processes_is_one_line(config_file, capsys, monkeypatch, asked):
    monkeypatch.setenv("NPROC", asked)
    code, shown = typed(capsys, "train", str(config_file))
    assert code == 1 and shown.err == f"error: NPROC='{asked}': expected a number of processes, 1 or more\n"


def test_many_processes_are_launched_once(config_file, capsys, monkeypatch):
    launched = []
    monkeypatch.setattr("clipn.runtime.launch.launch", lambda arguments: launched.append(arguments) or 0)
    for name, value in {"NPROC": "3", "RANK": "0", "WORLD_SIZE": "2", "PET_MASTER_ADDR": "first"}.items():
        monkeypatch.setenv(name, value)  # a cluster may set RANK for its machines
    assert typed(capsys, "train", str(config_file), "train.lr=1e-4")[0] == 0
    assert launched == [["--nproc_per_node=3", "-m", "clipn", "train", str(config_file), "train.lr=1e-4"]]
    monkeypatch.delenv("PET_MASTER_ADDR")
    assert typed(capsys, "train", str(config_file))[0] == 0 and launched[1][:2] == [
        "--nproc_per_node=3",
        "--standalone",
    ]
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # a process that was launched
    assert typed(capsys, "train", str(config_file), "train.epochs=1")[0] == 0 and len(launched) == 2


def test_shipped_configs_load_by_name_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "toy.yaml", "configs/toy.yaml"):
        config = load_config(name)
        assert Path(config.model.name).is_file() and config.run.dir == "runs/toy"
    assert Path(load_config("eval_imagenet100").eval.class_names).is_file()
    code, shown = typed(capsys, "train", "tyo")
    assert code == 1 and "tyo: no such config file; those shipped are: " in shown.err and "toy" in shown.err
    (tmp_path / "toy.yaml").write_text("run: {dir: mine}")
    assert load_config("toy.yaml").run.dir == "mine", "a file of one's own comes first"


def test_it_runs_as_a_module_too():
    command = [sys.executable, "-m", "clipn", "predict", "--classes", "a,b", "--checkpoint", "missing.pt", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "missing.pt" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_is_installed_with_the_package_is_what_requirements_say():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert named == [line for line in lines if not line.startswith("#")]
    assert all(re.search(r">=\d", line) for line in named)
    assert project["version"] == __version__
