"""The command lines, end to end on a tiny built-in world."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import architecture

import zero_shot_infer
from clipn.evaluation.results import RESULT_COLUMNS
from clipn.runtime.console import fail_in_one_line, start_log
from clipn.runtime.signals import RESUME, Interrupted
from scripts import train as train_command

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, as `sh run.sh CONFIG run.seeds=[0,1]` makes it: world, base, CLIPN, evaluation, two seeds."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "model.json").write_text(json.dumps(architecture()))
    config = (ROOT / "configs" / "toy.yaml").read_text()
    config = config.replace("configs/toy_model.json", f"{folder}/model.json").replace("runs/toy", f"{folder}/run")
    (folder / "config.yaml").write_text(config)
    small = "world.num_pairs=40 world.images_per_class=2 train.batch_size=16 train.epochs=1 base.train.epochs=1"
    more = [*small.split(), "data.workers=0", f"data.index_dir={folder}/index", "run.device=cpu"]
    threads = torch.get_num_threads()
    train_command.main([str(folder / "config.yaml"), *more, "run.seeds=[0,1]"])
    torch.set_num_threads(threads)
    return folder, more


def test_the_run_folder_of_each_seed_and_of_both(finished):
    folder, _ = finished
    for seed in (0, 1):
        run = folder / "run" / f"seed_{seed}"
        for name in ("config.yaml", "log", "metrics.jsonl", "checkpoints/last.pt", "results.csv", "results.md"):
            assert (run / name).stat().st_size, name
        for name in ("histograms.png", "samples.png"):
            assert (run / "figures" / name).read_bytes().startswith(b"\x89PNG")
        assert (run / "base" / "checkpoints" / "last.pt").is_file()
    results = pd.read_csv(folder / "run" / "results.csv")
    assert list(results.columns) == RESULT_COLUMNS
    assert set(results["seed"]) == {0, 1} and len(results) == 2 * 4 * 6
    assert results["id_set"].unique() == ["toy"]
    assert set(results["ood_set"]) == {"near", "scenes", "textures", "digits"}
    numbers = results[["AUROC", "FPR95", "AUPR_IN", "AUPR_OUT", "id_accuracy"]]
    assert ((numbers >= 0) & (numbers <= 1)).all(axis=None)
    assert "±" in (folder / "run" / "results.md").read_text()


def test_zero_shot_infer_gives_the_same_numbers_again(finished, capsys):
    folder, more = finished
    seed = folder / "run" / "seed_1"
    first = pd.read_csv(seed / "results.csv")
    again = [f"run.dir={folder}/again", "world.name=null", f"world.root={seed}/world"]
    again += [f"eval.checkpoints={seed}/checkpoints/last.pt"]
    zero_shot_infer.main(["--config", str(folder / "config.yaml"), *more, *again])
    pd.testing.assert_frame_equal(pd.read_csv(folder / "again" / "results.csv"), first)
    shown = capsys.readouterr().out
    assert "| ATD " in shown and f"{100 * first['id_accuracy'][0]:.2f}" in shown and "results.md" in shown


def test_a_list_of_checkpoints_gives_mean_and_deviation(finished, capsys):
    folder, more = finished
    again = [f"run.dir={folder}/both", "world.name=null", f"world.root={folder}/run/seed_0/world"]
    again += [f"eval.checkpoints={folder}/run/seed_*/checkpoints/last.pt", "eval.methods=[ATD,MSP]"]
    zero_shot_infer.main(["--config", str(folder / "config.yaml"), *more, *again])
    results = pd.read_csv(folder / "both" / "results.csv")
    assert sorted(results["seed"].unique()) == [0, 1] and list(results["method"].unique()) == ["ATD", "MSP"]
    assert "mean ± standard deviation over 2 checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["eval.methods=[MSP,Magic]"], "unknown score 'Magic'; the scores are: MSP"),
        (["eval.class_names=[a,b]"], "2 class names for 24 class folders"),
        (["eval.templates=['a photo']"], "'a photo' has no \"{}\""),
        (["eval.id=missing/folder"], "no such folder: missing/folder"),
        (["eval.checkpoints=missing*.pt"], "eval.checkpoints='missing*.pt': no such file"),
        (["eval.scale=0"], "eval.scale=0.0: expected a positive number"),
    ],
)
def test_bad_input_is_one_clear_line(finished, more, message):
    folder, plain = finished
    world = ["world.name=null", f"world.root={folder}/run/seed_0/world", f"run.dir={folder}/run/seed_0"]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        zero_shot_infer.main(["--config", str(folder / "config.yaml"), *plain, *world, *more])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_errors_are_one_line_and_exit_codes_mean_something(tmp_path, capsys):
    start_log(tmp_path)

    def failing(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as stopped:
            fail_in_one_line(main)
        return stopped.value.code

    assert failing(ValueError("what to change")) == 1
    assert capsys.readouterr().err == "error: what to change\n"
    assert "what to change" in (tmp_path / "log").read_text()
    assert failing(Interrupted("goes on")) == RESUME == 75
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        fail_in_one_line(lambda: 1 / 0)


def test_the_script_says_it_in_one_line():
    command = [sys.executable, "scripts/train.py", "configs/toy.yaml", "train.lr=fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: command line, train.lr=fast: train.lr: Value 'fast' of type 'str' could not be converted to Float"
    ]


def test_every_config_loads():
    from clipn.config.loading import load_config

    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(files) >= 6
    for path in files:
        load_config(path)
