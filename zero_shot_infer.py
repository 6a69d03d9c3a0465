"""Judge checkpoints zero-shot: python zero_shot_infer.py --config CONFIG.yaml [key=value ...]

Prints the paper's table and writes it, with the scores of every method from one pass over each image set, in run.dir.
Under torchrun (scripts/launch.py) the ranks share the images.
"""

from __future__ import annotations

import argparse

from clipn.command import fail_in_one_line
from clipn.pipeline import run_evaluation


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text. Raises what evaluation raises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/eval_imagenet.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.checkpoints=epoch_10.pt")
    arguments = parser.parse_args(argv)
    run_evaluation(arguments.config, arguments.overrides)


if __name__ == "__main__":
    fail_in_one_line(main)
