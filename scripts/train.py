"""Train as a config says: python scripts/train.py CONFIG.yaml [key=value ...]

Makes the config's world first if it names one, trains the base CLIP if the config has a `base`, then trains, and
evaluates if the config has an `eval.id`. Under torchrun it uses every rank. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.command import fail_in_one_line
from clipn.pipeline import run_training


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text. Raises what training and evaluation raise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/toy.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=1e-4 run.seed=1")
    arguments = parser.parse_args(argv)
    run_training(arguments.config, arguments.overrides)


if __name__ == "__main__":
    fail_in_one_line(main)
