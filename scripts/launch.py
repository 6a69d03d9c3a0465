"""torchrun with the exit codes of CLIPN's commands: python scripts/launch.py [torchrun's options] SCRIPT [arguments]

SCRIPT is scripts/train.py, scripts/extract_features.py or zero_shot_infer.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.launch import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
