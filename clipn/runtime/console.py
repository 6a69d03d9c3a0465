"""Command lines: the log file of a run, errors as one line with an exit code, and text for messages."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clipn.runtime.distributed import is_main, rank
from clipn.runtime.signals import RESUME, Interrupted, command, install_signal_handlers, stop_line

FAILED = 1  # exit code of an error, whose message says what to change

log = logging.getLogger("clipn")


def start_log(folder: str | Path | None) -> None:
    """Send the package's messages to the terminal and, with a run's folder, to its file `log`.

    From other ranks than 0, warnings go to `log.rankN` and errors to the terminal.
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
    """Run a command; an error that the user can fix is one line on stderr, not a traceback.

    stopped_code: the exit code after Ctrl-C or SIGTERM; RESUME if the same command resumes, STOPPED if it starts again.
    """
    install_signal_handlers()  # training installs its own
    try:
        main()
    except Interrupted as stopped:
        log.warning("%s: %s", stopped, command())
        sys.exit(RESUME)
    except KeyboardInterrupt:
        log.warning(stop_line(stopped_code))
        sys.exit(stopped_code)
    except (ValueError, OSError, FloatingPointError) as error:
        # An error in a worker process includes that process's traceback; its last line is the error.
        log.error("error: %s", (str(error).strip().splitlines() or [type(error).__name__])[-1])
        sys.exit(FAILED)
    except (NotImplementedError, TypeError) as error:  # TypeError: for float64, which MPS lacks
        if "MPS" not in str(error):
            raise
        message = str(error).split(". ")[0]
        log.error("error: %s: set PYTORCH_ENABLE_MPS_FALLBACK=1, or use the device cpu (run.device=cpu)", message)
        sys.exit(FAILED)


def printable(path: str | Path) -> str:
    """A path as one line of text: bytes that are not UTF-8 and characters that do not print become U+FFFD."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def shortened(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list for a message, and how many there are if there are more."""
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
