"""Batches of a lazily read iterator, processed by threads one batch ahead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item, Output = TypeVar("Item"), TypeVar("Output")

_THREADS = min(8, os.cpu_count() or 1)


def map_batches(function: Callable[[Item], Output], items: Iterable[Item], size: int) -> Iterator[list[Output]]:
    """Lists of `function` of `size` items each, in order.

    Threads read and process one batch ahead; with a size of 1 nothing is read ahead. An error of the iterator is raised
    after the batches of the items before it.
    """
    errors: list[Exception] = []
    items = _until_error(items, errors)
    if size == 1:
        yield from ([function(item)] for item in items)
    else:
        pool = ThreadPoolExecutor(_THREADS)
        try:
            batch = [pool.submit(function, item) for item in islice(items, size)]
            while batch:
                following = [pool.submit(function, item) for item in islice(items, size)]
                yield [future.result() for future in batch]
                batch = following
        finally:  # do not wait for images that nobody needs any more
            pool.shutdown(wait=False, cancel_futures=True)
    for error in errors:
        raise error


def _until_error(items: Iterable[Item], errors: list[Exception]) -> Iterator[Item]:
    """The items up to an error, which is put into `errors`."""
    try:
        yield from items
    except Exception as error:
        errors.append(error)
