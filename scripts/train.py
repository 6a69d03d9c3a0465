"""Train as a config says: python scripts/train.py CONFIG.yaml [key=value ...]

Makes the config's world first if it names one, trains the base CLIP if the config has a `base`, then trains, and
evaluates if the config has an `eval.id`. Under torchrun it uses every rank. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.command import fail_in_one_line, start_log
from clipn.config import Config, base_config, load_config
from clipn.distributed import choose_device, is_main, process_group
from clipn.evaluate import Evaluation, check_texts, evaluate, join
from clipn.report import summary, write_report
from clipn.run_folder import last_checkpoint
from clipn.train import train
from clipn.world import make_world


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text. Raises what training and evaluation raise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/toy.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=1e-4 run.seed=1")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    with process_group(choose_device(config.run.device)):
        runs = each_seed(arguments.config, arguments.overrides)
        for run in runs:
            train_one(run)
        evaluation = evaluate_all(config, runs)
        if is_main():
            finish(config, runs, evaluation)


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


def finish(config: Config, runs: list[Config], evaluation: Evaluation | None) -> None:
    """Say where everything is."""
    if evaluation is None:
        print(f"done: {', '.join(str(last_checkpoint(run.run.dir)) for run in runs)}")
        return
    print(summary(evaluation.results))
    print(f"done: {config.run.dir}/report.html; tables in results.md, .csv and .tex beside it")


if __name__ == "__main__":
    fail_in_one_line(main)
