"""torchrun with the exit codes of CLIPN's commands.

torchrun itself exits with 1 whenever a rank does not end well; this exits with 75, as one process does, when the ranks
were stopped on request and the same command goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from clipn.runtime.console import FAILED
from clipn.runtime.signals import RESUME

# Seconds that ranks have, once asked to stop, to finish their step and write a checkpoint; torchrun's own are 30.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments: its options, a script (or -m MODULE) and its own. Returns an exit code."""
    try:
        run.main([*arguments])
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
