"""SIGINT and SIGTERM: end well what is under way, so that the same command can go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Exit codes of what was stopped on request.
RESUME = 75  # the same command goes on
STOPPED = 130  # the same command begins anew

_asked: list[int] = []  # the signals that have come, outside of training


class Interrupted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has written a checkpoint to go on from."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM is put into, so that the step under way ends well; a second one kills."""
    stop: list[int] = []
    since: list[float] = []

    def note(number: int, frame: Any) -> None:
        # torchrun passes on what the whole process group has got already: only a later repetition means "at once".
        if stop and time.monotonic() - since[0] > 5:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        elif not stop:
            stop.append(number)
            since.append(time.monotonic())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def install_signal_handlers() -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt: at once, or where `stop_if_asked` is called next."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise)


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt if a signal has come that was lost: Python drops what is raised while a process forks."""
    if _asked:
        raise KeyboardInterrupt


def _raise(number: int, frame: Any) -> None:
    _asked.append(number)
    raise KeyboardInterrupt


def leave_signals(worker: int) -> None:
    """A stop is the main process's to handle: it ends the workers after the step under way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
