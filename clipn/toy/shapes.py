"""The data of the built-in world, read from world.yaml: things, colours, textures, scenes and caption templates."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

Colour = tuple[int, int, int]  # red, green, blue in 0..255


class Mark(NamedTuple):
    """A filled outline (width 0) or a stroke of this width through points [count, 2], all in box units."""

    shade: str
    points: np.ndarray
    width: float


class Scene(NamedTuple):
    """A sky that fades from `top` to `bottom`, and layers (painter, height below the top edge, colour) before it."""

    top: Colour
    bottom: Colour
    layers: list[tuple[str, float, Colour]]


def _curve(left: float, top: float, right: float, bottom: float, start: float = 0, end: float = 380) -> np.ndarray:
    """Points [25, 2] on the ellipse that fills a box; 380 degrees are a full turn whose ends overlap."""
    angle = np.radians(np.linspace(start, end, 25))
    x = (left + right) / 2 + (right - left) / 2 * np.cos(angle)
    y = (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angle)
    return np.stack([x, y], axis=1)


_MARKS: dict[str, Callable[..., Mark]] = {
    "polygon": lambda shade, *numbers: Mark(shade, np.reshape(numbers, (-1, 2)), 0),
    "line": lambda shade, width, *numbers: Mark(shade, np.reshape(numbers, (-1, 2)), width),
    "ellipse": lambda shade, *box: Mark(shade, _curve(*box, 0, 360), 0),
    "dome": lambda shade, *box: Mark(shade, _curve(*box, 180, 360), 0),
    "arc": lambda shade, width, *box_and_angles: Mark(shade, _curve(*box_and_angles), width),
}

_DATA = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))

THINGS: dict[str, list[Mark]] = {
    name: [_MARKS[kind](*values) for kind, *values in marks] for name, marks in _DATA["things"].items()
}
COLOURS: dict[str, Colour] = _DATA["colours"]
SCENES: dict[str, Scene] = {name: Scene(**scene) for name, scene in _DATA["scenes"].items()}
CAPTIONS: dict[str, list[str]] = _DATA["captions"]
WITHOUT_ARTICLE: list[str] = _DATA["without_article"]

# A texture's strength in [0, 1] at coordinates u, v (one period per unit) under slow noise in [0, 1].
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "bricks": lambda u, v, noise: ((u / 2 + v // 1 / 2) % 1 > 0.1) & (v % 1 > 0.2),
    "checkerboard": lambda u, v, noise: (u // 1 + v // 1) % 2,
    "dots": lambda u, v, noise: (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1,
    "grid": lambda u, v, noise: (u % 1 < 0.22) | (v % 1 < 0.22),
    "marble": lambda u, v, noise: np.abs(np.sin(1.5 * u + 9 * noise)) ** 0.6,
    "stripes": lambda u, v, noise: u % 1 < 0.5,
    "waves": lambda u, v, noise: np.sin(2 * math.pi * (v + 0.35 * np.sin(2.5 * u))) > 0,
    "zigzag": lambda u, v, noise: (v + np.abs(u % 1 - 0.5)) % 1 < 0.5,
}

# The class names of each labelled image set. ID and near OOD take every other thing of the alphabetical table.
CLASSES: dict[str, list[str]] = {
    "id": list(THINGS)[0::2],
    "near": list(THINGS)[1::2],
    "scenes": list(SCENES),
    "textures": list(TEXTURES),
    "digits": [str(digit) for digit in range(10)],
}

# Further sets of the world in which things stand before scenes: ID training images, and things before unknown scenes.
SCENE_CLASSES: dict[str, list[str]] = {
    "train": CLASSES["id"],
    "id_shifted": CLASSES["id"],
    "near_shifted": CLASSES["near"],
}
KNOWN_SCENES, UNKNOWN_SCENES = list(SCENES)[0::2], list(SCENES)[1::2]


def with_article(name: str) -> str:
    """The name after "a" or "an", or unchanged where it takes neither."""
    article = "" if name.split()[-1] in WITHOUT_ARTICLE else "an " if name[0] in "aeiou" else "a "
    return article + name
