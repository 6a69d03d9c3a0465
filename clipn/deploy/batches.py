"""Batches of a lazily read iterator, processed by threads one batch ahead."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any


def map_batches(function: Callable[[Any], Any], items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `function` of `size` items each, in order. With a size of 1 nothing is read ahead.

    An error of the iterator is raised after the batches of the items before it.
    """
    errors: list[Exception] = []
    items = _until_error(items, errors)
    if size == 1:
        yield from ([function(item)] for item in items)
    else:
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            batch = [pool.submit(function, item) for item in islice(items, size)]
            while batch:
                following = [pool.submit(function, item) for item in islice(items, size)]
                yield [future.result() for future in batch]
                batch = following
        finally:  # do not wait for images that nobody needs any more
            pool.shutdown(wait=False, cancel_futures=True)
    if errors:
        raise errors[0]


def _until_error(items: Iterable[Any], errors: list[Exception]) -> Iterator[Any]:
    try:
        yield from items
    except Exception as error:
        errors.append(error)
