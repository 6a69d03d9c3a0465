"""Random streams: every draw of a run comes from the stream of its own purpose."""

import hashlib

import numpy as np


def stream(tag: str, *numbers: int) -> np.random.Generator:
    """A generator that depends on the tag and the numbers alone, such as stream("order", seed, epoch).

    Each purpose has a tag of its own: "order" in epoch 3 and "prompts" in step 3 are independent.
    """
    text = " ".join([tag, *(str(int(number)) for number in numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
