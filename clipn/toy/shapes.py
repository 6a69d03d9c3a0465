"""What the built-in world draws, as data: things, colours, textures and scenes.

A thing is a list of marks in a box of 100 x 100 units, x to the right and y downwards; the first mark lies deepest.
Every mark has a colour role: "main" is the thing's own colour, "dark" and "light" are shades of it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Mark(NamedTuple):
    """One filled outline (width 0) or one stroke (width > 0, in box units) through points [count, 2] in box units."""

    role: str
    points: np.ndarray
    width: float


def _curve(left: float, top: float, right: float, bottom: float, start: float, end: float) -> np.ndarray:
    """Points [25, 2] on the ellipse that fills a box, clockwise between two angles in degrees from 3 o'clock."""
    angle = np.radians(np.linspace(start, end, 25))
    return np.stack(
        [
            (left + right) / 2 + (right - left) / 2 * np.cos(angle),
            (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angle),
        ],
        axis=1,
    )


def polygon(role: str, *numbers: float) -> Mark:
    """A filled outline through x, y, x, y, ..."""
    return Mark(role, np.array(numbers, dtype=float).reshape(-1, 2), 0)


def line(role: str, width: float, *numbers: float) -> Mark:
    """A stroke through x, y, x, y, ..."""
    return Mark(role, np.array(numbers, dtype=float).reshape(-1, 2), width)


def ellipse(role: str, left: float, top: float, right: float, bottom: float) -> Mark:
    """A filled ellipse."""
    return Mark(role, _curve(left, top, right, bottom, 0, 360), 0)


def dome(role: str, left: float, top: float, right: float, bottom: float) -> Mark:
    """The filled upper half of an ellipse."""
    return Mark(role, _curve(left, top, right, bottom, 180, 360), 0)


def arc(
    role: str, width: float, left: float, top: float, right: float, bottom: float, start: float = 0, end: float = 380
) -> Mark:
    """A stroke along an ellipse, by default a ring: a little more than a full turn, so that its ends meet."""
    return Mark(role, _curve(left, top, right, bottom, start, end), width)


# In alphabetical order: the world gives every other one to the ID classes, so the order must not be chosen by hand.
THINGS: dict[str, list[Mark]] = {
    "anchor": [
        arc("main", 8, 39, 3, 61, 25),
        line("main", 10, 50, 24, 50, 94),
        line("main", 9, 27, 38, 73, 38),
        arc("main", 11, 12, 32, 88, 92, 5, 175),
        polygon("main", 0, 70, 10, 46, 28, 64),
        polygon("main", 100, 70, 90, 46, 72, 64),
    ],
    "apple": [
        ellipse("main", 10, 26, 60, 96),
        ellipse("main", 40, 26, 90, 96),
        line("dark", 7, 50, 38, 55, 8),
        polygon("dark", 56, 22, 66, 6, 88, 6, 76, 20),
        ellipse("light", 20, 38, 34, 60),
    ],
    "arrow": [polygon("main", 2, 38, 56, 38, 56, 12, 98, 50, 56, 88, 56, 62, 2, 62)],
    "axe": [
        line("dark", 11, 36, 2, 36, 100),
        polygon("main", 28, 14, 54, 16, 84, 2, 96, 30, 84, 60, 54, 42, 28, 44),
        line("light", 6, 83, 3, 94, 30, 83, 59),
    ],
    "balloon": [
        ellipse("main", 18, 0, 82, 70),
        polygon("main", 42, 80, 58, 80, 50, 66),
        line("dark", 4, 50, 80, 43, 86, 56, 92, 48, 100),
        ellipse("light", 30, 12, 46, 32),
    ],
    "bell": [
        arc("dark", 6, 41, 1, 59, 19),
        ellipse("dark", 38, 74, 62, 98),
        dome("main", 24, 10, 76, 90),
        polygon("main", 24, 50, 76, 50, 94, 84, 6, 84),
        line("dark", 5, 20, 68, 80, 68),
    ],
    "boat": [
        polygon("dark", 2, 68, 98, 68, 80, 96, 20, 96),
        line("dark", 6, 48, 2, 48, 70),
        polygon("main", 53, 4, 53, 60, 94, 60),
        polygon("main", 43, 16, 43, 60, 10, 60),
    ],
    "book": [
        polygon("main", 0, 22, 50, 30, 100, 22, 100, 90, 50, 98, 0, 90),
        polygon("light", 7, 14, 28, 10, 50, 22, 50, 88, 28, 76, 7, 80),
        polygon("light", 93, 14, 72, 10, 50, 22, 50, 88, 72, 76, 93, 80),
        line("dark", 4, 50, 22, 50, 90),
        line("dark", 4, 15, 30, 41, 36),
        line("dark", 4, 15, 46, 41, 52),
        line("dark", 4, 85, 30, 59, 36),
        line("dark", 4, 85, 46, 59, 52),
    ],
    "boot": [
        polygon("main", 24, 8, 60, 8, 60, 52, 90, 62, 98, 86, 24, 86),
        polygon("light", 20, 4, 64, 4, 64, 20, 20, 20),
        polygon("dark", 22, 84, 99, 84, 99, 94, 52, 94, 48, 90, 46, 98, 22, 98),
    ],
    "bottle": [
        polygon("main", 41, 4, 59, 4, 59, 30, 73, 48, 73, 98, 27, 98, 27, 48, 41, 30),
        polygon("light", 27, 58, 73, 58, 73, 82, 27, 82),
        polygon("dark", 38, 0, 62, 0, 62, 13, 38, 13),
    ],
    "butterfly": [
        line("dark", 4, 50, 24, 36, 4),
        line("dark", 4, 50, 24, 64, 4),
        ellipse("main", 0, 12, 49, 58),
        ellipse("main", 51, 12, 100, 58),
        ellipse("main", 14, 50, 48, 94),
        ellipse("main", 52, 50, 86, 94),
        ellipse("light", 10, 24, 28, 44),
        ellipse("light", 72, 24, 90, 44),
        ellipse("dark", 44, 18, 56, 90),
    ],
    "cactus": [
        line("main", 22, 50, 14, 50, 90),
        ellipse("main", 39, 3, 61, 25),
        line("main", 14, 18, 28, 18, 56, 50, 56),
        ellipse("main", 11, 21, 25, 35),
        line("main", 14, 82, 20, 82, 46, 50, 46),
        ellipse("main", 75, 13, 89, 27),
        line("light", 3, 46, 14, 46, 78),
        line("light", 3, 54, 14, 54, 78),
        polygon("dark", 28, 76, 72, 76, 66, 100, 34, 100),
    ],
    "candle": [
        polygon("main", 36, 42, 64, 42, 64, 94, 36, 94),
        line("dark", 5, 50, 44, 50, 30),
        polygon("main", 50, 0, 61, 20, 56, 34, 44, 34, 39, 20),
        ellipse("light", 45, 18, 55, 32),
        polygon("dark", 14, 88, 80, 88, 70, 100, 24, 100),
        arc("dark", 6, 74, 76, 94, 96),
    ],
    "car": [
        polygon("main", 0, 54, 20, 48, 34, 22, 70, 22, 84, 48, 100, 54, 100, 76, 0, 76),
        polygon("light", 29, 47, 39, 30, 50, 30, 50, 47),
        polygon("light", 56, 30, 66, 30, 75, 47, 56, 47),
        ellipse("dark", 12, 60, 40, 88),
        ellipse("dark", 62, 60, 90, 88),
        ellipse("light", 21, 69, 31, 79),
        ellipse("light", 71, 69, 81, 79),
    ],
    "chair": [
        line("main", 12, 22, 0, 22, 100),
        line("main", 11, 78, 56, 78, 100),
        polygon("main", 16, 50, 86, 50, 86, 63, 16, 63),
        line("dark", 6, 26, 82, 74, 82),
        line("dark", 5, 16, 56, 86, 56),
    ],
    "cherry": [
        line("dark", 6, 26, 60, 58, 6),
        line("dark", 6, 74, 64, 58, 6),
        polygon("dark", 56, 8, 74, 0, 96, 10, 76, 22),
        ellipse("main", 4, 54, 46, 96),
        ellipse("main", 54, 58, 96, 100),
        ellipse("light", 13, 62, 25, 74),
        ellipse("light", 63, 66, 75, 78),
    ],
    "clock": [
        ellipse("main", 2, 2, 98, 98),
        ellipse("light", 15, 15, 85, 85),
        line("dark", 7, 50, 54, 50, 24),
        line("dark", 7, 48, 50, 70, 58),
        line("dark", 5, 20, 50, 28, 50),
        line("dark", 5, 72, 50, 80, 50),
        line("dark", 5, 50, 72, 50, 80),
    ],
    "cross": [
        polygon("main", 35, 4, 65, 4, 65, 96, 35, 96),
        polygon("main", 4, 35, 96, 35, 96, 65, 4, 65),
    ],
    "crown": [
        polygon("main", 8, 90, 2, 28, 28, 56, 50, 14, 72, 56, 98, 28, 92, 90),
        ellipse("main", 42, 6, 58, 22),
        ellipse("main", 0, 20, 12, 32),
        ellipse("main", 88, 20, 100, 32),
        polygon("dark", 7, 76, 93, 76, 92, 91, 8, 91),
        ellipse("light", 44, 77, 56, 89),
        ellipse("light", 20, 78, 30, 88),
        ellipse("light", 70, 78, 80, 88),
    ],
    "cup": [
        arc("main", 9, 52, 32, 94, 70, -100, 100),
        polygon("main", 10, 22, 72, 22, 64, 86, 18, 86),
        ellipse("dark", 10, 14, 72, 30),
        line("dark", 7, 4, 91, 80, 91),
    ],
    "drum": [
        polygon("main", 8, 36, 92, 36, 92, 80, 8, 80),
        ellipse("main", 8, 66, 92, 96),
        line("light", 5, 8, 46, 22, 82, 36, 50, 50, 90, 64, 50, 78, 82, 92, 46),
        ellipse("light", 8, 20, 92, 50),
        arc("dark", 5, 8, 20, 92, 50),
        line("dark", 6, 18, 2, 52, 32),
        line("dark", 6, 84, 2, 58, 36),
    ],
    "envelope": [
        polygon("main", 0, 18, 100, 18, 100, 84, 0, 84),
        polygon("light", 2, 18, 98, 18, 50, 58),
        line("dark", 4, 0, 18, 50, 60, 100, 18),
        line("dark", 4, 0, 84, 36, 50),
        line("dark", 4, 100, 84, 64, 50),
    ],
    "fish": [
        polygon("dark", 30, 28, 46, 8, 62, 30),
        polygon("main", 64, 50, 100, 18, 92, 50, 100, 82),
        ellipse("main", 0, 22, 76, 78),
        arc("dark", 4, 10, 28, 36, 72, -60, 60),
        ellipse("light", 10, 36, 24, 50),
        ellipse("dark", 14, 40, 20, 46),
        polygon("dark", 46, 52, 62, 44, 60, 62),
    ],
    "flag": [
        polygon("main", 16, 6, 40, 12, 66, 4, 98, 12, 98, 58, 66, 50, 40, 58, 16, 52),
        polygon("light", 16, 22, 40, 28, 66, 20, 98, 28, 98, 42, 66, 34, 40, 42, 16, 36),
        line("dark", 8, 14, 0, 14, 100),
    ],
    "flower": [
        line("dark", 6, 50, 40, 50, 100),
        polygon("dark", 50, 90, 62, 72, 84, 68, 74, 86),
        ellipse("main", 38, 0, 62, 30),
        ellipse("main", 38, 38, 62, 68),
        ellipse("main", 17, 9, 45, 33),
        ellipse("main", 55, 9, 83, 33),
        ellipse("main", 17, 35, 45, 59),
        ellipse("main", 55, 35, 83, 59),
        ellipse("light", 38, 22, 62, 46),
        ellipse("dark", 45, 29, 55, 39),
    ],
    "guitar": [
        ellipse("main", 18, 54, 82, 100),
        ellipse("main", 27, 36, 73, 74),
        line("dark", 9, 50, 6, 50, 60),
        polygon("dark", 40, 0, 60, 0, 57, 16, 43, 16),
        ellipse("dark", 40, 54, 60, 74),
        line("light", 6, 38, 86, 62, 86),
    ],
    "hammer": [
        line("dark", 12, 50, 24, 50, 100),
        polygon("main", 18, 8, 68, 8, 84, 12, 98, 34, 82, 26, 68, 30, 18, 30),
        polygon("main", 4, 3, 22, 3, 22, 35, 4, 35),
    ],
    "hat": [
        ellipse("main", 0, 64, 100, 92),
        polygon("main", 24, 10, 76, 10, 72, 76, 28, 76),
        ellipse("dark", 24, 4, 76, 16),
        polygon("light", 27, 54, 73, 54, 72, 70, 28, 70),
    ],
    "heart": [
        ellipse("main", 2, 10, 54, 58),
        ellipse("main", 46, 10, 98, 58),
        polygon("main", 7, 48, 50, 96, 93, 48, 50, 24),
    ],
    "house": [
        polygon("dark", 70, 6, 83, 6, 83, 40, 70, 34),
        polygon("main", 14, 44, 86, 44, 86, 98, 14, 98),
        polygon("dark", 0, 50, 50, 2, 100, 50),
        polygon("dark", 42, 66, 58, 66, 58, 98, 42, 98),
        polygon("light", 20, 58, 35, 58, 35, 73, 20, 73),
        polygon("light", 65, 58, 80, 58, 80, 73, 65, 73),
    ],
    "key": [
        arc("main", 12, 6, 30, 46, 70),
        line("main", 11, 44, 50, 100, 50),
        line("main", 10, 76, 50, 76, 72),
        line("main", 10, 94, 50, 94, 76),
    ],
    "kite": [
        line("dark", 4, 50, 74, 60, 84, 44, 90, 54, 100),
        polygon("main", 50, 0, 88, 34, 50, 78, 12, 34),
        polygon("light", 50, 0, 88, 34, 50, 34),
        polygon("light", 50, 34, 50, 78, 12, 34),
        line("dark", 3, 50, 0, 50, 78),
        line("dark", 3, 12, 34, 88, 34),
    ],
    "ladder": [
        line("main", 9, 26, 0, 26, 100),
        line("main", 9, 74, 0, 74, 100),
        line("main", 8, 26, 12, 74, 12),
        line("main", 8, 26, 31, 74, 31),
        line("main", 8, 26, 50, 74, 50),
        line("main", 8, 26, 69, 74, 69),
        line("main", 8, 26, 88, 74, 88),
    ],
    "lamp": [
        line("dark", 8, 50, 44, 50, 92),
        line("dark", 3, 68, 48, 68, 70),
        polygon("dark", 24, 100, 76, 100, 66, 88, 34, 88),
        polygon("main", 34, 2, 66, 2, 90, 50, 10, 50),
        line("light", 5, 15, 42, 85, 42),
    ],
    "leaf": [
        polygon("main", 50, 0, 68, 14, 82, 36, 84, 56, 72, 76, 50, 86, 28, 76, 16, 56, 18, 36, 32, 14),
        line("dark", 5, 50, 12, 50, 100),
        line("dark", 4, 50, 42, 68, 28),
        line("dark", 4, 50, 42, 32, 28),
        line("dark", 4, 50, 64, 73, 48),
        line("dark", 4, 50, 64, 27, 48),
    ],
    "magnet": [
        arc("main", 24, 16, 14, 84, 82, 180, 360),
        line("main", 24, 16, 46, 16, 84),
        line("main", 24, 84, 46, 84, 84),
        line("dark", 24, 16, 78, 16, 98),
        line("dark", 24, 84, 78, 84, 98),
    ],
    "moon": [
        polygon("main", 74, 4, 54, 1, 32, 8, 15, 25, 8, 50, 45, 50, 48, 32, 58, 16),
        polygon("main", 74, 96, 54, 99, 32, 92, 15, 75, 8, 49, 45, 49, 48, 68, 58, 84),
        ellipse("dark", 18, 38, 30, 50),
        ellipse("dark", 27, 66, 37, 76),
    ],
    "mushroom": [
        polygon("light", 38, 48, 62, 48, 68, 98, 32, 98),
        line("dark", 4, 38, 50, 32, 97, 68, 97, 62, 50),
        dome("main", 2, 4, 98, 108),
        ellipse("light", 42, 12, 62, 28),
        ellipse("light", 14, 32, 32, 48),
        ellipse("light", 70, 32, 86, 46),
    ],
    "pencil": [
        polygon("dark", 36, 0, 64, 0, 64, 14, 36, 14),
        polygon("light", 36, 10, 64, 10, 64, 20, 36, 20),
        polygon("main", 36, 18, 64, 18, 64, 72, 36, 72),
        line("dark", 4, 50, 20, 50, 72),
        polygon("light", 36, 72, 64, 72, 50, 100),
        polygon("dark", 44, 86, 56, 86, 50, 100),
    ],
    "rocket": [
        polygon("light", 38, 76, 62, 76, 50, 100),
        polygon("dark", 34, 46, 10, 86, 34, 80),
        polygon("dark", 66, 46, 90, 86, 66, 80),
        polygon("main", 50, 0, 64, 16, 70, 40, 66, 80, 34, 80, 30, 40, 36, 16),
        ellipse("light", 39, 28, 61, 50),
    ],
    "shirt": [
        polygon("main", 32, 6, 68, 6, 100, 26, 88, 52, 76, 46, 76, 96, 24, 96, 24, 46, 12, 52, 0, 26),
        polygon("light", 34, 5, 66, 5, 50, 28),
        line("dark", 3, 50, 28, 50, 96),
        line("dark", 3, 24, 46, 24, 64),
        line("dark", 3, 76, 46, 76, 64),
    ],
    "snowman": [
        line("dark", 4, 34, 50, 4, 34),
        line("dark", 4, 66, 50, 96, 34),
        ellipse("main", 20, 56, 80, 100),
        ellipse("main", 28, 34, 72, 70),
        ellipse("main", 33, 12, 67, 42),
        polygon("dark", 36, 0, 64, 0, 64, 12, 76, 12, 76, 18, 24, 18, 24, 12, 36, 12),
        ellipse("light", 40, 23, 47, 30),
        ellipse("light", 53, 23, 60, 30),
        ellipse("dark", 46, 47, 54, 55),
        ellipse("dark", 46, 64, 54, 72),
        ellipse("dark", 46, 80, 54, 88),
    ],
    "spider": [
        line("dark", 5, 40, 44, 18, 22, 4, 34),
        line("dark", 5, 60, 44, 82, 22, 96, 34),
        line("dark", 5, 36, 54, 12, 44, 0, 58),
        line("dark", 5, 64, 54, 88, 44, 100, 58),
        line("dark", 5, 36, 64, 14, 66, 4, 84),
        line("dark", 5, 64, 64, 86, 66, 96, 84),
        line("dark", 5, 40, 74, 24, 84, 20, 100),
        line("dark", 5, 60, 74, 76, 84, 80, 100),
        ellipse("main", 30, 40, 70, 88),
        ellipse("main", 36, 22, 64, 48),
        ellipse("light", 41, 28, 48, 35),
        ellipse("light", 52, 28, 59, 35),
    ],
    "star": [polygon("main", 50, 1, 62, 36, 99, 37, 70, 59, 80, 95, 50, 74, 20, 95, 30, 59, 1, 37, 38, 36)],
    "sword": [
        polygon("main", 42, 68, 42, 14, 50, 0, 58, 14, 58, 68),
        line("light", 4, 50, 10, 50, 66),
        line("dark", 9, 26, 70, 74, 70),
        line("dark", 9, 50, 70, 50, 94),
        ellipse("dark", 42, 86, 58, 100),
    ],
    "table": [
        line("dark", 7, 26, 50, 26, 80),
        line("dark", 7, 74, 50, 74, 80),
        line("dark", 9, 7, 50, 7, 98),
        line("dark", 9, 93, 50, 93, 98),
        polygon("main", 20, 20, 80, 20, 100, 44, 0, 44),
        polygon("dark", 0, 44, 100, 44, 100, 54, 0, 54),
    ],
    "umbrella": [
        line("dark", 5, 50, 0, 50, 88),
        arc("dark", 5, 34, 78, 50, 98, 0, 190),
        dome("main", 0, 6, 100, 104),
        polygon("light", 50, 6, 66, 55, 34, 55),
        line("dark", 3, 49, 7, 33, 55),
        line("dark", 3, 51, 7, 67, 55),
    ],
    "wheel": [
        arc("main", 13, 8, 8, 92, 92),
        line("dark", 6, 50, 14, 50, 86),
        line("dark", 6, 19, 32, 81, 68),
        line("dark", 6, 19, 68, 81, 32),
        ellipse("main", 38, 38, 62, 62),
    ],
}

COLOURS = {
    "red": (205, 40, 40),
    "orange": (240, 130, 30),
    "yellow": (230, 195, 35),
    "green": (50, 150, 60),
    "turquoise": (40, 175, 175),
    "blue": (45, 85, 200),
    "purple": (130, 60, 170),
    "pink": (235, 110, 165),
    "brown": (130, 85, 50),
    "gray": (115, 118, 122),
}

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


class Scene(NamedTuple):
    """A sky that fades from `top` to `bottom`, and layers (painter, height below the top edge, colour) before it."""

    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    layers: list[tuple[str, float, tuple[int, int, int]]]


SCENES: dict[str, Scene] = {
    "beach": Scene(
        (90, 170, 235),
        (205, 230, 245),
        [("plain", 0.4, (35, 120, 185)), ("hills", 0.63, (240, 245, 245)), ("hills", 0.69, (232, 205, 150))],
    ),
    "city at night": Scene((8, 10, 35), (50, 40, 85), [("towers", 0.4, (35, 35, 60)), ("towers", 0.65, (18, 18, 32))]),
    "desert": Scene(
        (95, 165, 225),
        (245, 225, 180),
        [("hills", 0.45, (226, 176, 104)), ("hills", 0.62, (208, 150, 78)), ("hills", 0.8, (186, 124, 58))],
    ),
    "forest": Scene(
        (170, 205, 195),
        (60, 100, 70),
        [("firs", 0.3, (62, 110, 74)), ("firs", 0.5, (38, 84, 50)), ("firs", 0.75, (18, 56, 30))],
    ),
    "mountains": Scene(
        (120, 180, 235),
        (215, 230, 240),
        [("peaks", 0.35, (150, 165, 190)), ("peaks", 0.55, (95, 110, 135)), ("hills", 0.82, (90, 140, 70))],
    ),
    "ocean": Scene((105, 175, 235), (215, 235, 245), [("plain", 0.35, (25, 95, 165)), ("swell", 0.35, (80, 155, 205))]),
    "snow field": Scene(
        (150, 170, 195),
        (205, 215, 228),
        [("hills", 0.5, (222, 230, 240)), ("hills", 0.7, (246, 248, 252)), ("flakes", 0.0, (255, 255, 255))],
    ),
    "sunset": Scene((75, 45, 110), (250, 150, 60), [("sun", 0.55, (255, 225, 120)), ("plain", 0.65, (70, 35, 60))]),
}

# Names that take neither "a" nor "an".
WITHOUT_ARTICLE = {"mountains", "bricks", "dots", "marble", "stripes", "waves"}
