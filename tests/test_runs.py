"""Whole runs by the command line: world, base, training, evaluation and report, on a tiny built-in world."""

import json
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import architecture, replace_figures

from clipn.cli import main
from clipn.evaluation.results import RESULT_COLUMNS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two seeds: its folder, and the words that its settings take."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "model.json").write_text(json.dumps(architecture()))
    config = (ROOT / "configs" / "toy.yaml").read_text()
    config = config.replace("configs/toy_model.json", f"{folder}/model.json").replace("runs/toy", f"{folder}/run")
    (folder / "config.yaml").write_text(config)
    words = "world.num_pairs=40 world.images_per_class=2 train.batch_size=16 train.epochs=1 base.train.epochs=1"
    words = [*words.split(), "data.workers=0", f"data.index_dir={folder}/index", "run.device=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        replace_figures(patch)
        main(["train", str(folder / "config.yaml"), *words, "run.seeds=[0,1]"])
    return folder, words


def evaluate(run, *words):
    """Evaluates on the world of seed 0, by the script."""
    folder, settings = run
    world = ["world.name=null", f"world.root={folder}/run/seed_0/world"]
    words = ["--config", str(folder / "config.yaml"), *settings, *world, *words]
    with pytest.MonkeyPatch.context() as patch:
        replace_figures(patch)
        patch.setattr(sys, "argv", ["zero_shot_infer.py", *words])
        runpy.run_path(str(ROOT / "zero_shot_infer.py"), run_name="__main__")


def test_run_folders_of_each_seed_and_of_both(run):
    folder, _ = run
    for seed in (0, 1):
        seed_folder = folder / "run" / f"seed_{seed}"
        names = "config.yaml log metrics.jsonl checkpoints/last.pt base/checkpoints/last.pt results.csv results.md"
        for name in [*names.split(), "figures/histograms.png", "figures/samples.png"]:
            assert (seed_folder / name).stat().st_size, name
    results = pd.read_csv(folder / "run" / "results.csv")
    assert list(results.columns) == RESULT_COLUMNS and len(results) == 2 * 4 * 6
    assert set(results["seed"]) == {0, 1} and set(results["id_set"]) == {"toy"}
    assert set(results["ood_set"]) == {"near", "scenes", "textures", "digits"}
    numbers = results[["AUROC", "FPR95", "AUPR_IN", "AUPR_OUT", "id_accuracy"]]
    assert ((numbers >= 0) & (numbers <= 1)).all(axis=None)
    assert "±" in (folder / "run" / "results.md").read_text()


def test_evaluating_again_gives_the_same_numbers(run, capsys):
    folder, _ = run
    seed = folder / "run" / "seed_0"
    evaluate(run, f"run.dir={folder}/again", f"eval.checkpoints={seed}/checkpoints/last.pt")
    first = pd.read_csv(seed / "results.csv")
    pd.testing.assert_frame_equal(pd.read_csv(folder / "again" / "results.csv"), first)
    shown = capsys.readouterr().out
    assert "| ATD " in shown and f"{100 * first['id_accuracy'][0]:.2f}" in shown and "results.md" in shown


def test_several_checkpoints_give_mean_and_deviation(run, capsys):
    folder, _ = run
    checkpoints = f"eval.checkpoints={folder}/run/seed_*/checkpoints/last.pt"
    evaluate(run, f"run.dir={folder}/both", checkpoints, "eval.methods=[ATD,MSP]")
    results = pd.read_csv(folder / "both" / "results.csv")
    assert sorted(results["seed"].unique()) == [0, 1] and list(results["method"].unique()) == ["ATD", "MSP"]
    assert "mean ± standard deviation over 2 checkpoints" in capsys.readouterr().out


def test_bad_evaluation_settings_are_one_line(run, capsys):
    for word, message in (
        ("eval.methods=[MSP,Magic]", "eval.methods: unknown score 'Magic'; the scores are: MSP, "),
        ("eval.class_names=[a,b]", "2 class names for 24 class folders"),
        ("eval.scale=0", "eval.scale=0.0: expected a positive number"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate(run, f"run.dir={run[0]}/run/seed_0", word)
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and re.fullmatch(f"error: .*{re.escape(message)}.*\n", error), error


def test_classes_are_chosen_by_their_accuracy_on_pairs(run, capsys):
    seed = run[0] / "run" / "seed_0"
    words = ["--checkpoint", f"{seed}/base/checkpoints/last.pt", "--pairs", f"{seed}/world/pairs/*.tar"]
    main(["classes", *words, "--classes", f"{seed}/world/id", "--number", "2"])
    shown = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in shown if len(line.split()) == 3 and line[-1].isdigit() and ":" not in line]
    accuracy = [float(row[1]) for row in rows]
    assert len(rows) > 2 and accuracy == sorted(accuracy, reverse=True)
    assert shown[-1] == f"classes: [{', '.join(sorted(row[0] for row in rows[:2]))}]"
    mean = sum(float(row[1]) * int(row[2]) for row in rows) / sum(int(row[2]) for row in rows)
    assert f"over all: {mean:.4f}" in shown
    for replaced, value, message in ("id", "no_folder", "no such folder"), ("*.tar", "none.tar", "none.tar"):
        with pytest.raises(SystemExit):
            main(["classes", *(word.replace(replaced, value) for word in words), "--classes", f"{seed}/world/{value}"])
        assert message in capsys.readouterr().err
