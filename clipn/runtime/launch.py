"""torchrun with the exit codes of CLIPN's commands.

torchrun exits with 1 whenever a rank fails. This exits with 75, as one process does, when the ranks were stopped on
request and the same command resumes.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from clipn.runtime.console import FAILED
from clipn.runtime.signals import RESUME

# Seconds that stopped ranks have to finish their step and write a checkpoint; torchrun's default is 30.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")


def launch_on_all_gpus(argv: list[str]) -> None:
    """Run `clipn ARGV` under torchrun with one process per GPU, and exit; return if this process is enough.

    NPROC sets the number of processes, torchrun's PET_* variables join machines. Raises ValueError for a wrong NPROC.
    """
    processes = os.environ.get("NPROC") or str(max(1, torch.cuda.device_count()))
    if not processes.isdigit() or int(processes) < 1:
        raise ValueError(f"NPROC={processes!r}: expected a number of processes, 1 or more")
    several_machines = any(os.environ.get(name) for name in ("PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"))
    if "TORCHELASTIC_RUN_ID" in os.environ or int(processes) == 1 and not several_machines:
        return
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file():  # a checkout that may not be installed
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    options = [f"--nproc_per_node={processes}", *([] if several_machines else ["--standalone"])]
    sys.exit(launch([*options, "-m", "clipn", *argv]))


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments: its options, then -m MODULE and the module's. Returns an exit code."""
    try:
        run.main([*arguments])
    except SignalException:  # torchrun has passed the signal on, and the ranks have ended
        return RESUME
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == RESUME:
            return RESUME
        killed = failure.exitcode < 0  # by a signal, not by an error of its own
        hint = "the same command resumes from the last checkpoint" if killed else "its message is above"
        print(f"error: rank {rank} ended first, with exit code {failure.exitcode}; {hint}", file=sys.stderr)
        return FAILED
    return 0
