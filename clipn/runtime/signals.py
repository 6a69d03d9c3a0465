"""SIGINT and SIGTERM: end well what is under way, so that the same command can go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from typing import Any

# Exit codes of what was stopped on request.
RESUME = 75  # the same command goes on
STOPPED = 130  # the same command begins anew

STALL_GRACE = 3.0  # seconds that a read may still take after a stop request

_asked: list[int] = []  # the signals that have come, outside of training
_stop_time = RawValue("d", 0.0)  # time.monotonic() of the first stop request, 0 if none; shared with worker processes


class Interrupted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has written a checkpoint to go on from."""


class StalledRead(Exception):
    """A stop request ended a read that takes too long to wait for."""


def end_stalled_read() -> None:
    """Raise StalledRead when a stop was requested more than STALL_GRACE seconds ago, also in a worker process."""
    if _stop_time.value and time.monotonic() - _stop_time.value > STALL_GRACE:
        raise StalledRead("a read stalls after a stop request")


def share_stop(stop_time: Any) -> None:
    """Use the main process's time of the stop request: for start methods that do not fork."""
    global _stop_time
    _stop_time = stop_time


def _note_stop() -> None:
    _stop_time.value = _stop_time.value or time.monotonic()


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
            _note_stop()
            stop.append(number)
            since.append(time.monotonic())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        _stop_time.value = 0.0
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
    _note_stop()
    raise KeyboardInterrupt


def leave_signals(worker: int) -> None:
    """A stop is the main process's to handle: it ends the workers after the step under way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
