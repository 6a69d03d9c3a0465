"""Captions of the built-in world's images, from the templates of world.yaml."""

from numpy.random import Generator

from clipn.toy.drawing import Thing, pick
from clipn.toy.shapes import CAPTIONS, with_article


def caption(rng: Generator, kind: str, name: str) -> str:
    """A random caption of a thing, scene or texture; kind: "things", "scenes" or "textures"."""
    return pick(rng, CAPTIONS[kind]).format(a_name=with_article(name), name=name)


def _describe(rng: Generator, thing: Thing) -> str:
    """The thing's name, often with its colour, seldom with its size."""
    words = thing.name
    if rng.random() < 0.5:
        words = f"{thing.colour} {words}"
    if rng.random() < 0.3 and not 0.55 < thing.size < 0.85:
        words = f"{'small' if thing.size < 0.7 else 'large'} {words}"
    return words


def thing_caption(rng: Generator, things: list[Thing], background: str, names_only: bool = False) -> str:
    """A caption of the first thing, sometimes with the second, the background ("on ...") or the tilt.

    names_only: neither colour nor size nor tilt, so that shapes alone tell the captions of things apart.
    """
    describe = (lambda _, thing: thing.name) if names_only else _describe
    text = caption(rng, "things", describe(rng, things[0]))
    if len(things) > 1 and rng.random() < 0.6:
        joint = pick(rng, ["and", "next to", "with"])
        return f"{text} {joint} {with_article(describe(rng, things[1]))}"
    if rng.random() < 0.2:
        return f"{text} {background}"
    if not names_only and abs(things[0].tilt) > 15 and rng.random() < 0.3:
        return f"{text} , tilted"
    return text
