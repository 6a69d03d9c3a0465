"""SIGINT and SIGTERM: end well what is under way, so that the same command can go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
