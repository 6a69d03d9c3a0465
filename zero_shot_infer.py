"""Judge checkpoints zero-shot: python zero_shot_infer.py --config CONFIG.yaml [key=value ...]

Prints the paper's table and writes it, with the scores of every method from one pass over each image set, in run.dir.
Under torchrun (scripts/launch.py) the ranks share the images.
"""

from __future__ import annotations

import argparse

from clipn.command import fail_in_one_line, start_log
from clipn.config import load_config
from clipn.distributed import choose_device, is_main, process_group
from clipn.evaluate import evaluate
from clipn.report import summary
from clipn.world import make_world


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text. Raises what evaluation raises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/eval_imagenet.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.checkpoints=epoch_10.pt")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if config.eval.id is None:
        raise ValueError(f"{arguments.config}: eval.id: names no image set to evaluate on")
    with process_group(choose_device(config.run.device)):
        start_log(config.run.dir)
        make_world(config.world)
        evaluation = evaluate(config)
        if is_main():
            print(summary(evaluation.results))
            print(f"done: {config.run.dir}/report.html; tables in results.md, .csv and .tex beside it")


if __name__ == "__main__":
    fail_in_one_line(main)
