"""SIGINT and SIGTERM: how a stop request ends training, other work and worker processes."""

import multiprocessing
import os
import signal
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
    """Make a worker process ignore SIGINT, and SIGTERM unless its parent sent it; a `worker_init_fn` of a DataLoader.

    A terminal and a cluster signal the whole process group, but the main process needs its workers for the current
    step. It ends them itself, by `terminated_children` or when Python exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has no sender of a signal: SIGTERM keeps its action there
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process().pid  # os.getppid() may be a fork server
        threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def terminated_children() -> Iterator[None]:
    """Terminate, at the end, the processes that were started inside the context: workers may be in a stalled read."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
