"""Evaluate checkpoints: python zero_shot_infer.py --config CONFIG.yaml [key=value ...]. The same as `clipn eval`."""

import sys

from clipn.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
