"""What the command lines share: the run's log file, and errors as one line with an exit code that says what to do."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from clipn.runtime.distributed import is_main, rank
from clipn.runtime.signals import RESUME, Interrupted, install_signal_handlers

FAILED = 1  # the message says what to change

log = logging.getLogger("clipn")


def start_log(folder: str | Path | None) -> None:
    """Send the package's messages to the terminal and, if there is one, to the file `log` in a run's folder.

    Of the other ranks, warnings go to `log.rankN` and errors to the terminal.
    """
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.INFO if is_main() else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if folder is None:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = "log" if is_main() else f"log.rank{rank()}"
    file = logging.FileHandler(Path(folder) / name, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)


def fail_in_one_line(main: Callable[[], None], stopped_code: int = RESUME) -> None:
    """Run a command; an error that its user can mend is one line on stderr, not a traceback.

    stopped_code: for Ctrl-C or SIGTERM, RESUME where the same command goes on, STOPPED where it begins anew.
    """
    install_signal_handlers()  # training has its own way to stop
    try:
        main()
    except Interrupted as stopped:
        log.warning("%s: %s", stopped, _command())
        sys.exit(RESUME)
    except KeyboardInterrupt:
        if stopped_code == RESUME:
            log.warning("interrupted; the same command takes up what is not done yet: %s", _command())
        sys.exit(stopped_code)
    except (ValueError, OSError, FloatingPointError) as error:
        # An error from a decoding process comes with that process's traceback; its last line is the error.
        log.error("error: %s", (str(error).strip().splitlines() or [type(error).__name__])[-1])
        sys.exit(FAILED)


def _command() -> str:
    """What was typed: run.sh says so, and else it was this script."""
    return os.environ.get("CLIPN_COMMAND") or shlex.join(["python", *sys.argv])


def printable(path: str | Path) -> str:
    """A path as text that can be written in a line: what is no UTF-8 or does not print becomes U+FFFD."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
