"""Draws the images of the built-in world: things on pale backgrounds or before scenes, scenes and textures."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image
from PIL.ImageDraw import Draw, ImageDraw

from clipn.toy.shapes import COLOURS, SCENES, TEXTURES, THINGS, Colour, with_article

OVERSAMPLING = 3  # canvases are this many times larger than the image, then averaged down, for smooth edges


class Thing(NamedTuple):
    """A thing as drawn in one image: size of its box and centre in fractions of the image side, tilt in degrees."""

    name: str
    colour: str
    size: float
    tilt: float
    centre: np.ndarray


def pick(rng: Generator, choices: list[str]) -> str:
    """One of the choices, each with the same probability."""
    return choices[rng.integers(len(choices))]


def pixels_to_image(pixels: np.ndarray) -> Image.Image:
    """An image of these values, clipped to 0..255."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@cache
def _coordinates(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, float32 [side, side] in [-0.5, 0.5]."""
    steps = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    return tuple(np.meshgrid(steps, steps))


def _clouds(rng: Generator, side: int) -> np.ndarray:
    """Slow noise, float32 [side, side], roughly in [0, 1]."""
    coarse = Image.fromarray(rng.random((5, 5), dtype=np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _blend(weight: np.ndarray, first: np.ndarray, second: np.ndarray) -> Image.Image:
    """A canvas with the first colour [3] where the weight [side, side] is 0, the second where it is 1."""
    weight, first, second = (values.astype(np.float32) for values in (weight, first, second))
    return pixels_to_image(first + weight[..., None] * (second - first))


def _jitter(rng: Generator, colour: Colour, spread: float = 15) -> np.ndarray:
    return np.clip(np.array(colour) + rng.uniform(-spread, spread, 3), 0, 255)


def _texture(rng: Generator, name: str, side: int) -> np.ndarray:
    """The texture's strength, [side, side] in [0, 1], at a random scale, rotation and shift."""
    x, y = _coordinates(side)
    turn = rng.normal(0, 0.25) + rng.integers(2) * math.pi / 2
    periods, shift = rng.uniform(3, 6), rng.uniform(0, 10, 2)
    u = (periods * (math.cos(turn) * x + math.sin(turn) * y) + shift[0]).astype(np.float32)
    v = (periods * (math.cos(turn) * y - math.sin(turn) * x) + shift[1]).astype(np.float32)
    return TEXTURES[name](u, v, _clouds(rng, side))


def _background(rng: Generator, side: int) -> tuple[Image.Image, str]:
    """A pale canvas, plain or with a faint pattern, and its description in captions."""
    first = rng.uniform(205, 255, 3)
    second = first - rng.uniform(10, 35)
    kind, text = rng.random(), "on a pale background"
    if kind < 0.3:
        weight, text = np.zeros((side, side)), "on a plain background"
    elif kind < 0.5:
        weight = _clouds(rng, side)
    elif kind < 0.65:
        x, y = _coordinates(side)
        weight = 0.5 + x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)
    else:
        name = pick(rng, list(TEXTURES))
        weight, text = _texture(rng, name, side), f"on a pale background with {with_article(name)}"
    return _blend(weight, first, second), text


def _shaded(colour: np.ndarray, shade: str) -> Colour:
    shades = {"main": colour, "dark": colour * 0.4, "light": colour + (255 - colour) * 0.65}
    return tuple(int(value) for value in shades[shade])


def _draw_thing(rng: Generator, draw: ImageDraw, side: int, thing: Thing) -> None:
    """Draws a thing, mirrored half the time and a little stretched."""
    colour = _jitter(rng, COLOURS[thing.colour])
    stretch, scale = math.exp(rng.normal(0, 0.08)), thing.size * side / 100
    width, height = rng.choice([-1, 1]) * stretch, 1 / stretch
    sine, cosine = math.sin(math.radians(thing.tilt)), math.cos(math.radians(thing.tilt))
    to_canvas = scale * np.array([[cosine * width, sine * width], [-sine * height, cosine * height]])
    for mark in THINGS[thing.name]:
        points = ((mark.points - 50) @ to_canvas + thing.centre * side).ravel().tolist()
        if mark.width:
            draw.line(points, _shaded(colour, mark.shade), width=max(1, round(mark.width * scale)), joint="curve")
        else:
            draw.polygon(points, _shaded(colour, mark.shade))


def _disc(draw: ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)


def _finish(rng: Generator, canvas: Image.Image) -> Image.Image:
    """The image at its final size, with some sensor noise."""
    pixels = np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32)
    return pixels_to_image(pixels + rng.uniform(0, 6) * rng.standard_normal(pixels.shape, dtype=np.float32))


def _ground(draw: ImageDraw, side: int, edge: np.ndarray, fill: Colour) -> None:
    """Fills everything below an edge, whose points run from left to right in image sides below the top."""
    outline = zip(np.linspace(0, side, len(edge)).tolist(), (edge * side).tolist(), strict=True)
    draw.polygon([(0, side), *outline, (side, side)], fill)


def _draw_layer(rng: Generator, draw: ImageDraw, side: int, painter: str, level: float, fill: Colour) -> None:
    """Draws a layer of a scene, whose upper edge lies about `level` image sides below the top."""
    match painter:
        case "plain":
            _ground(draw, side, np.array([level, level]), fill)
        case "hills":
            phase = np.linspace(0, rng.uniform(4, 9), 40) + rng.uniform(0, 6)
            _ground(draw, side, level + rng.uniform(0.02, 0.06) * np.sin(phase), fill)
        case "peaks":
            heights = rng.uniform(0.03, 0.2, rng.integers(6, 10))
            heights[rng.integers(2) :: 2] *= -1
            _ground(draw, side, level - heights, fill)
        case "firs":
            for x in (np.arange(0, 1.1, 0.11) + rng.uniform(-0.04, 0.04, 10)).tolist():
                top, half = level + rng.uniform(-0.12, 0.05), rng.uniform(0.08, 0.12)
                corners = np.array([x, top, x - half, top + 0.5, x + half, top + 0.5])
                draw.polygon((corners * side).tolist(), fill)
            _ground(draw, side, np.array([level + 0.4] * 2), fill)
        case "towers":
            left = -rng.uniform(0, 0.1)
            while left < 1:
                width, top = rng.uniform(0.12, 0.22), level + rng.uniform(-0.18, 0.18)
                draw.rectangle((left * side, top * side, (left + width) * side, side), fill)
                for y in np.arange(top + 0.04, 1, 0.08):
                    for x in np.arange(left + 0.03, left + width - 0.04, 0.06):
                        if rng.random() < 0.5:
                            draw.rectangle((x * side, y * side, (x + 0.03) * side, (y + 0.035) * side), (250, 220, 120))
                left += width + rng.uniform(0, 0.05)
        case "swell":
            for _ in range(30):
                depth = rng.uniform(0.03, 1)
                x, y, half = rng.uniform(0, 1), level + depth * (1 - level), 0.03 + 0.1 * depth
                ends = ((x - half) * side, y * side, (x + half) * side, y * side)
                draw.line(ends, fill, width=1 + round(0.02 * depth * side))
        case "flakes":
            for x, y in rng.uniform(0, side, (rng.integers(10, 40), 2)).tolist():
                _disc(draw, x, y, 0.015 * side, fill)
        case "sun":
            _disc(draw, rng.uniform(0.2, 0.8) * side, level * side, rng.uniform(0.12, 0.2) * side, fill)
        case _:
            raise ValueError(f"world.yaml: unknown layer {painter!r}")


def _arrange(rng: Generator, names: list[str], sizes_alone: tuple[float, float]) -> list[Thing]:
    """One thing of a size in this range anywhere, or a larger and a smaller one on opposite sides."""
    if len(names) == 1:
        sizes = [rng.uniform(*sizes_alone)]
        centres = [0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - sizes[0])]
    else:
        sizes = [rng.uniform(0.45, 0.6), rng.uniform(0.3, 0.4)]
        angle = rng.uniform(0, 2 * math.pi)
        centres = [0.5 + distance * np.array([math.cos(angle), math.sin(angle)]) for distance in (0.21, -0.32)]
    return [
        Thing(name, pick(rng, list(COLOURS)), size, float(np.clip(rng.normal(0, 12), -30, 30)), centre)
        for name, size, centre in zip(names, sizes, centres, strict=True)
    ]


def draw_things(
    rng: Generator, names: list[str], image_size: int, scene: str | None = None
) -> tuple[Image.Image, list[Thing], str]:
    """An image of one or two things, the things, and the background in words.

    scene: what the things stand before, a thing alone of 0.6 to 0.8 image sides; by default a pale background.
    """
    side = image_size * OVERSAMPLING
    if scene is None:
        canvas, background = _background(rng, side)
    else:
        canvas, background = _scene(rng, scene, side), f"in front of {with_article(scene)}"
    draw = Draw(canvas)
    if rng.random() < 0.15:
        for _ in range(rng.integers(2, 6)):  # small gray spots as clutter
            (x, y), radius = rng.uniform(0, side, 2), rng.uniform(0.015, 0.04) * side
            _disc(draw, x, y, radius, (int(rng.integers(120, 200)),) * 3)
    things = _arrange(rng, names, (0.45, 0.95) if scene is None else (0.6, 0.8))
    for thing in things:
        _draw_thing(rng, draw, side, thing)
    return _finish(rng, canvas), things, background


def _scene(rng: Generator, name: str, side: int) -> Image.Image:
    """A canvas with a scene."""
    scene = SCENES[name]
    canvas = _blend(_coordinates(side)[1] + 0.5, _jitter(rng, scene.top), _jitter(rng, scene.bottom))
    draw = Draw(canvas)
    shift = rng.uniform(-0.08, 0.08)
    for painter, level, colour in scene.layers:
        _draw_layer(rng, draw, side, painter, level + shift, tuple(_jitter(rng, colour).astype(int).tolist()))
    return canvas


def draw_scene(rng: Generator, name: str, image_size: int) -> Image.Image:
    """An image of a scene."""
    return _finish(rng, _scene(rng, name, image_size * OVERSAMPLING))


def draw_texture(rng: Generator, name: str, image_size: int) -> tuple[Image.Image, str]:
    """An image of a texture in one colour on white or on another colour, and the names of both colours."""
    first, second = rng.choice(list(COLOURS), 2, replace=False).tolist()
    ground = _jitter(rng, COLOURS[second])
    if rng.random() < 0.4:
        second, ground = "white", rng.uniform(230, 255, 3)
    strength = _texture(rng, name, image_size * OVERSAMPLING)
    return _finish(rng, _blend(strength, ground, _jitter(rng, COLOURS[first]))), f"{first} and {second}"
