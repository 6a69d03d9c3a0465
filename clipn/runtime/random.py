"""Random streams: every draw of a run comes from the stream of its own purpose."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(tag: str, *numbers: int) -> np.random.Generator:
    """A generator that depends on the tag and the numbers alone, such as stream("order", seed, epoch).

    Streams of different tags or numbers are independent. Each purpose has a tag of its own, so that ("order", seed,
    epoch) and ("prompt", seed, step) share nothing where epoch equals step.
    """
    text = " ".join([tag, *(str(int(number)) for number in numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
