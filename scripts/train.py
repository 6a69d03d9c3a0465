"""Train as a config says: python scripts/train.py CONFIG.yaml [key=value ...]. The same as `clipn train`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
