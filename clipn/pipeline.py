"""A whole run as its config describes it: world, base, training, evaluation; or the evaluation alone."""

from __future__ import annotations

from pathlib import Path

from .command import start_log
from .config import Config, base_config, load_config
from .distributed import choose_device, is_main, process_group
from .evaluate import Evaluation, check_texts, evaluate, join
from .report import summary, write_report
from .run_folder import last_checkpoint
from .train import train
from .world import make_world


def run_training(path: str, overrides: list[str]) -> None:
    """Train what a config file with these `key=value` words says, and evaluate it if it says on what.

    Makes the config's world first if it names one, then trains the base CLIP if the config has a `base`. Under torchrun
    it uses every rank. Stopped, the same call goes on. Raises what training and evaluation raise.
    """
    config = load_config(path, overrides)
    with process_group(choose_device(config.run.device)):
        runs = each_seed(path, overrides)
        for run in runs:
            train_one(run)
        evaluation = evaluate_all(config, runs)
        if is_main():
            _finish(config, runs, evaluation)


def run_evaluation(path: str, overrides: list[str]) -> None:
    """Judge the checkpoints that a config file with these `key=value` words names. Raises what evaluation raises."""
    config = load_config(path, overrides)
    if config.eval.id is None:
        raise ValueError(f"{path}: eval.id: names no image set to evaluate on")
    with process_group(choose_device(config.run.device)):
        start_log(config.run.dir)
        make_world(config.world)
        evaluation = evaluate(config)
        if is_main():
            _show(config, evaluation)


def each_seed(path: str, overrides: list[str]) -> list[Config]:
    """The config itself, or for run.seeds one per seed, in run.dir/seed_N."""
    config = load_config(path, overrides)
    folder = Path(config.run.dir)
    own = [[f"run.seed={seed}", f"run.dir={folder / f'seed_{seed}'}", "run.seeds=[]"] for seed in config.run.seeds]
    return [load_config(path, [*overrides, *words]) for words in own] or [config]


def train_one(config: Config) -> None:
    """World, base and training of one run."""
    start_log(config.run.dir)
    check_texts(config)
    make_world(config.world)
    base = base_config(config)
    if base:
        start_log(base.run.dir)
        train(base)
        start_log(config.run.dir)
    train(config)


def evaluate_all(config: Config, runs: list[Config]) -> Evaluation | None:
    """Evaluate what was trained, if the config says on what; several seeds' results are joined in run.dir."""
    if config.eval.id is None:
        return None
    evaluations = []
    for run in runs:
        start_log(run.run.dir)
        evaluations.append(evaluate(run))
    joined = join(evaluations)
    if config.run.seeds and is_main():
        write_report(Path(config.run.dir), *joined, bootstrap=config.eval.bootstrap)
    return joined


def _finish(config: Config, runs: list[Config], evaluation: Evaluation | None) -> None:
    if evaluation is None:
        print(f"done: {', '.join(str(last_checkpoint(run.run.dir)) for run in runs)}")
    else:
        _show(config, evaluation)


def _show(config: Config, evaluation: Evaluation) -> None:
    print(summary(evaluation.results))
    print(f"done: {config.run.dir}/report.html; tables in results.md, .csv and .tex beside it")
