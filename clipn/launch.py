"""torchrun with the exit codes of CLIPN's commands: python scripts/launch.py [torchrun's options] SCRIPT [arguments]

SCRIPT is scripts/train.py, scripts/extract_features.py or zero_shot_infer.py. torchrun itself exits with 1 whenever a
rank does not end well; this exits with 75, as one process does, when the ranks were stopped on request and the same
command goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.command import FAILED, RESUME

# Seconds that ranks have, once asked to stop, to finish their step and write a checkpoint; torchrun's own are 30.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")


def main() -> int:
    """Run the command; returns its exit code."""
    try:
        run.main(sys.argv[1:])
    except SignalException:  # the ranks were told, and have ended
        return RESUME
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == RESUME:
            return RESUME
        killed = failure.exitcode < 0  # by a signal, not by an error of its own
        hint = "what was kept is whole: the same command goes on from there" if killed else "its message is above"
        print(f"error: rank {rank} ended first, with exit code {failure.exitcode}; {hint}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
