"""SIGINT and SIGTERM: how a stop request ends training, other work and worker processes."""

import atexit
import multiprocessing.util  # its exit handler is registered first, so ours runs before it
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Exit codes after a stop request.
RESUME = 75  # the same command resumes
STOPPED = 130  # the same command starts again

_REPEAT_AFTER = 5.0  # seconds: a repeated signal before that is torchrun's copy of one that the process group received

_asked: list[int] = []  # signals received outside of training


class Interrupted(Exception):
    """The run was asked to stop (SIGINT or SIGTERM) and has written a checkpoint to resume from."""


class StopSignals:
    """A context that records SIGINT and SIGTERM, so that the current step is finished; a repeated signal kills."""

    def __init__(self) -> None:
        self.received: int | None = None  # the number of the first signal
        self._received_at, self._waiting = 0.0, False

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def next(self, iterator: Iterator) -> Any:
        """The iterator's next item, or None at its end or when a stop is requested before the item arrives."""
        try:
            self._waiting = True
            try:
                return None if self.received else next(iterator, None)
            finally:
                self._waiting = False
        except KeyboardInterrupt:  # from _record, also in the inner `finally`
            return None

    def _record(self, number: int, frame: Any) -> None:
        if self.received and time.monotonic() - self._received_at > _REPEAT_AFTER:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received, self._received_at = number, time.monotonic()
            if self._waiting:
                self._waiting = False
                raise KeyboardInterrupt


def stop_line(exit_code: int) -> str:
    """What a command says that was stopped, with the command that goes on."""
    return f"interrupted; the same command {'resumes' if exit_code == RESUME else 'starts again'}: {command()}"


def command() -> str:
    """The command line that repeats this one; the entry point sets it in CLIPN_COMMAND."""
    return os.environ.get("CLIPN_COMMAND") or shlex.join(["python", *sys.argv])


def install_signal_handlers() -> None:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt: at once, or in the next call of `stop_if_asked`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise)


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt for a signal that was lost: Python drops what a handler raises while a process forks."""
    if _asked:
        raise KeyboardInterrupt


def _raise(number: int, frame: Any) -> None:
    _asked.append(number)
    raise KeyboardInterrupt


def ignore_stop_signals(worker: int = 0) -> None:
    """Make a worker process ignore SIGINT and SIGTERM; a `worker_init_fn` of a DataLoader.

    A terminal and a cluster signal the whole process group, but the main process needs its workers for the current
    step. It kills them itself, in `killed_children` or when Python exits.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def killed_children() -> Iterator[None]:
    """Kill, at the end, the processes that were started inside the context: workers may be in a stalled read."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        _kill(set(multiprocessing.active_children()) - before)


@atexit.register
def _kill_daemons() -> None:
    """Kill the workers that are left: multiprocessing would send SIGTERM, which they ignore, and wait without end."""
    _kill({child for child in multiprocessing.active_children() if child.daemon})


def _kill(children: set[multiprocessing.Process]) -> None:
    """Kill processes and wait for them, without PyTorch's handler of SIGCHLD, which raises for a killed worker."""
    handler = None
    if children and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.kill()
    for child in children:
        child.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
