"""The built-in world: procedural pictures and captions to train and test a tiny model on, with nothing to download.

Like a small web, it holds captioned pictures of things, scenes and textures; beside them lie labelled folders of
ID things and of four kinds of OOD pictures. Everything follows from the parameters of `make_world`.
"""

import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from .toy_shapes import COLOURS, SCENES, TEXTURES, THINGS, WITHOUT_ARTICLE

VERSION = 1  # raise it whenever the same parameters would give other bytes
PAIRS_PER_SHARD = 2500
OVERSAMPLING = 3  # pictures are drawn this many times larger, then averaged down, for smooth edges
SPLITS = ("pairs", "id", "near", "scenes", "textures", "digits")  # the position is part of every picture's seed

# Every other thing of an alphabetical table: neither half is chosen, so both are alike in difficulty.
ID_THINGS: list[str] = list(THINGS)[0::2]
NEAR_THINGS: list[str] = list(THINGS)[1::2]
KINDS: dict[str, list[str]] = {
    "id": ID_THINGS,
    "near": NEAR_THINGS,
    "scenes": list(SCENES),
    "textures": list(TEXTURES),
    "digits": [str(digit) for digit in range(10)],
}

# {one} is the subject with its article, {bare} without. More may follow what is said of things, so they end with it.
THING_CAPTIONS = [
    "a photo of {one}",
    "a picture of {one}",
    "an image of {one}",
    "a drawing of {one}",
    "drawing of {one}",
    "a simple sketch of {one}",
    "clip art of {one}",
    "icon of {one}",
    "illustration of {one}",
    "a close up of {one}",
    "this is {one}",
    "here you see {one}",
    "{one}",
    "{bare}",
    "the {bare}",
    "my {bare}",
]
SCENE_CAPTIONS = [
    "a photo of {one}",
    "a picture of {one}",
    "a painting of {one}",
    "a view of {one}",
    "a landscape with {one}",
    "travel photo of {one}",
    "{bare}",
    "{bare} photo",
    "{bare} seen from afar",
    "{bare} scenery",
]
TEXTURE_CAPTIONS = [
    "a photo of {one}",
    "a pattern of {one}",
    "a texture of {one}",
    "a background with {one}",
    "a close up of {one}",
    "a wall with {one}",
    "{bare}",
    "{bare} pattern",
    "{bare} texture",
    "seamless {bare} wallpaper",
]


@dataclass(frozen=True)
class _Thing:
    """A thing as it stands in one picture: the size of its box and its centre in picture sides, its tilt in degrees."""

    name: str
    colour: str
    size: float
    tilt: float
    centre: np.ndarray


# --- captions ---


def _pick(rng: np.random.Generator, choices: list[str]) -> str:
    return choices[rng.integers(len(choices))]


def _with_article(words: str) -> str:
    if words.split()[-1] in WITHOUT_ARTICLE:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _caption(rng: np.random.Generator, patterns: list[str], words: str) -> str:
    return _pick(rng, patterns).format(one=_with_article(words), bare=words)


def _thing_words(rng: np.random.Generator, thing: _Thing) -> str:
    """The thing's name, often with its colour, seldom with its size."""
    words = thing.name
    if rng.random() < 0.5:
        words = f"{thing.colour} {words}"
    if rng.random() < 0.3 and not 0.55 < thing.size < 0.85:
        words = f"{'small' if thing.size < 0.7 else 'large'} {words}"
    return words


def _thing_caption(rng: np.random.Generator, things: list[_Thing], background: str) -> str:
    """A caption of the first thing that may leave out the second, the background and the tilt."""
    caption = _caption(rng, THING_CAPTIONS, _thing_words(rng, things[0]))
    if len(things) > 1 and rng.random() < 0.6:
        joint = _pick(rng, ["and", "next to", "with"])
        return f"{caption} {joint} {_with_article(_thing_words(rng, things[1]))}"
    if rng.random() < 0.2:
        return f"{caption} on {background}"
    if abs(things[0].tilt) > 15 and rng.random() < 0.3:
        return f"{caption} , tilted"
    return caption


# --- painting, on a canvas whose side is OVERSAMPLING times that of the picture ---


@cache
def _coordinates(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, float32 [side, side] in [-0.5, 0.5]."""
    steps = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    return tuple(np.meshgrid(steps, steps))


def _clouds(rng: np.random.Generator, side: int) -> np.ndarray:
    """Slow noise, float32 [side, side], roughly in [0, 1]."""
    coarse = Image.fromarray(rng.random((5, 5), dtype=np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _blend(weight: np.ndarray, first: np.ndarray, second: np.ndarray) -> Image.Image:
    """A canvas with the first colour [3] where the weight [side, side] is 0, the second where it is 1."""
    first, second = first.astype(np.float32), second.astype(np.float32)
    return _picture(first + weight[..., None].astype(np.float32) * (second - first))


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], spread: float = 15) -> np.ndarray:
    return np.clip(np.array(colour) + rng.uniform(-spread, spread, 3), 0, 255)


def _texture(rng: np.random.Generator, name: str, side: int) -> np.ndarray:
    """The texture's strength, [side, side] in [0, 1], at a random scale, turn and shift."""
    x, y = _coordinates(side)
    turn = rng.normal(0, 0.25) + rng.integers(2) * math.pi / 2
    periods, shift = rng.uniform(3, 6), rng.uniform(0, 10, 2)
    u = (periods * (math.cos(turn) * x + math.sin(turn) * y) + shift[0]).astype(np.float32)
    v = (periods * (math.cos(turn) * y - math.sin(turn) * x) + shift[1]).astype(np.float32)
    return TEXTURES[name](u, v, _clouds(rng, side))


def _background(rng: np.random.Generator, side: int) -> tuple[Image.Image, str]:
    """A pale canvas, plain or with a faint pattern, and how a caption may call it."""
    first = rng.uniform(205, 255, 3)
    second = first - rng.uniform(10, 35)
    kind = rng.random()
    if kind < 0.3:
        return _blend(np.zeros((side, side)), first, second), "a plain background"
    if kind < 0.5:
        return _blend(_clouds(rng, side), first, second), "a pale background"
    if kind < 0.65:
        x, y = _coordinates(side)
        return _blend(0.5 + x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1), first, second), "a pale background"
    name = _pick(rng, list(TEXTURES))
    return _blend(_texture(rng, name, side), first, second), f"a pale background with {_with_article(name)}"


def _shade(main: np.ndarray, role: str) -> tuple[int, ...]:
    shades = {"main": main, "dark": main * 0.4, "light": main + (255 - main) * 0.65}
    return tuple(int(value) for value in shades[role])


def _paint_thing(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, thing: _Thing) -> None:
    """Draws a thing, mirrored half the time and a little stretched."""
    main = _jitter(rng, COLOURS[thing.colour])
    tilt, stretch = math.radians(thing.tilt), math.exp(rng.normal(0, 0.08))
    width, height = rng.choice([-1, 1]) * stretch, 1 / stretch
    scale = thing.size * side / 100
    to_canvas = scale * np.array(
        [[math.cos(tilt) * width, math.sin(tilt) * width], [-math.sin(tilt) * height, math.cos(tilt) * height]]
    )
    for mark in THINGS[thing.name]:
        points = ((mark.points - 50) @ to_canvas + thing.centre * side).ravel().tolist()
        if mark.width:
            draw.line(points, _shade(main, mark.role), width=max(1, round(mark.width * scale)), joint="curve")
        else:
            draw.polygon(points, _shade(main, mark.role))


def _paint_spots(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int) -> None:
    """A few small gray spots: clutter that is no thing."""
    for _ in range(rng.integers(2, 6)):
        (x, y), radius = rng.uniform(0, side, 2), rng.uniform(0.015, 0.04) * side
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(int(rng.integers(120, 200)),) * 3)


def _finish(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """The picture at its final size, with some sensor noise."""
    pixels = np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32)
    return _picture(pixels + rng.uniform(0, 6) * rng.standard_normal(pixels.shape, dtype=np.float32))


# --- the layers of a scene: each painter's upper edge lies about `level` picture sides below the top ---


def _ground(draw: ImageDraw.ImageDraw, side: int, edge: np.ndarray, fill: tuple[int, ...]) -> None:
    """Fills all that lies below an edge, given from left to right in picture sides below the top."""
    outline = zip(np.linspace(0, side, len(edge)).tolist(), (edge * side).tolist(), strict=True)
    draw.polygon([(0, side), *outline, (side, side)], fill)


def _plain(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]) -> None:
    _ground(draw, side, np.array([level, level]), fill)


def _hills(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]) -> None:
    phase = np.linspace(0, rng.uniform(4, 9), 40) + rng.uniform(0, 6)
    _ground(draw, side, level + rng.uniform(0.02, 0.06) * np.sin(phase), fill)


def _peaks(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]) -> None:
    heights = rng.uniform(0.03, 0.2, rng.integers(6, 10))
    heights[rng.integers(2) :: 2] *= -1
    _ground(draw, side, level - heights, fill)


def _firs(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]) -> None:
    for x in (np.arange(0, 1.1, 0.11) + rng.uniform(-0.04, 0.04, 10)).tolist():
        top, half = level + rng.uniform(-0.12, 0.05), rng.uniform(0.08, 0.12)
        corners = [(x, top), (x - half, top + 0.5), (x + half, top + 0.5)]
        draw.polygon([(a * side, b * side) for a, b in corners], fill)
    _plain(rng, draw, side, level + 0.4, fill)


def _towers(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]
) -> None:
    left = -rng.uniform(0, 0.1)
    while left < 1:
        width, top = rng.uniform(0.12, 0.22), level + rng.uniform(-0.18, 0.18)
        draw.rectangle((left * side, top * side, (left + width) * side, side), fill)
        for y in np.arange(top + 0.04, 1, 0.08):
            for x in np.arange(left + 0.03, left + width - 0.04, 0.06):
                if rng.random() < 0.5:
                    draw.rectangle((x * side, y * side, (x + 0.03) * side, (y + 0.035) * side), (250, 220, 120))
        left += width + rng.uniform(0, 0.05)


def _swell(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]) -> None:
    for _ in range(30):
        depth = rng.uniform(0.03, 1)
        x, y, half = rng.uniform(0, 1), level + depth * (1 - level), 0.03 + 0.1 * depth
        draw.line(
            ((x - half) * side, y * side, (x + half) * side, y * side), fill, width=1 + round(0.02 * depth * side)
        )


def _flakes(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]
) -> None:
    radius = 0.015 * side
    for x, y in rng.uniform(0, side, (rng.integers(10, 40), 2)).tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)


def _sun(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, level: float, fill: tuple[int, ...]) -> None:
    x, radius = rng.uniform(0.2, 0.8), rng.uniform(0.12, 0.2)
    draw.ellipse([value * side for value in (x - radius, level - radius, x + radius, level + radius)], fill)


LAYERS = {
    "plain": _plain,
    "hills": _hills,
    "peaks": _peaks,
    "firs": _firs,
    "towers": _towers,
    "swell": _swell,
    "flakes": _flakes,
    "sun": _sun,
}


# --- whole pictures ---


def _arrange(rng: np.random.Generator, names: list[str]) -> list[_Thing]:
    """One thing anywhere, or a larger and a smaller one on opposite sides."""
    if len(names) == 1:
        sizes = [rng.uniform(0.45, 0.95)]
        centres = [0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - sizes[0])]
    else:
        sizes = [rng.uniform(0.45, 0.6), rng.uniform(0.3, 0.4)]
        angle = rng.uniform(0, 2 * math.pi)
        direction = np.array([math.cos(angle), math.sin(angle)])
        centres = [0.5 + 0.21 * direction, 0.5 - 0.32 * direction]
    return [
        _Thing(name, _pick(rng, list(COLOURS)), size, float(np.clip(rng.normal(0, 12), -30, 30)), centre)
        for name, size, centre in zip(names, sizes, centres, strict=True)
    ]


def _thing_picture(
    rng: np.random.Generator, names: list[str], image_size: int
) -> tuple[Image.Image, list[_Thing], str]:
    """A picture of one or two things, with the things and the words for the background that a caption may use."""
    side = image_size * OVERSAMPLING
    canvas, background = _background(rng, side)
    draw = ImageDraw.Draw(canvas)
    if rng.random() < 0.15:
        _paint_spots(rng, draw, side)
    things = _arrange(rng, names)
    for thing in things:
        _paint_thing(rng, draw, side, thing)
    return _finish(rng, canvas), things, background


def _scene_picture(rng: np.random.Generator, name: str, image_size: int) -> Image.Image:
    side = image_size * OVERSAMPLING
    scene = SCENES[name]
    fade = _coordinates(side)[1] + 0.5
    canvas = _blend(fade, _jitter(rng, scene.top), _jitter(rng, scene.bottom))
    draw = ImageDraw.Draw(canvas)
    shift = rng.uniform(-0.08, 0.08)
    for painter, level, colour in scene.layers:
        LAYERS[painter](rng, draw, side, level + shift, tuple(_jitter(rng, colour).astype(int).tolist()))
    return _finish(rng, canvas)


def _texture_picture(rng: np.random.Generator, name: str, image_size: int) -> tuple[Image.Image, str]:
    """A texture of a colour on white or on another colour, and the names of both."""
    first, second = rng.choice(list(COLOURS), 2, replace=False).tolist()
    ground = _jitter(rng, COLOURS[second])
    if rng.random() < 0.4:
        second, ground = "white", rng.uniform(230, 255, 3)
    strength = _texture(rng, name, image_size * OVERSAMPLING)
    return _finish(rng, _blend(strength, ground, _jitter(rng, COLOURS[first]))), f"{first} and {second}"


def _pair(rng: np.random.Generator, image_size: int) -> tuple[Image.Image, str]:
    """A picture and its caption: 84 % things, 8 % scenes, 8 % textures."""
    kind = rng.random()
    if kind < 0.08:
        name = _pick(rng, list(SCENES))
        return _scene_picture(rng, name, image_size), _caption(rng, SCENE_CAPTIONS, name)
    if kind < 0.16:
        name = _pick(rng, list(TEXTURES))
        picture, colours = _texture_picture(rng, name, image_size)
        return picture, _caption(rng, TEXTURE_CAPTIONS, f"{colours} {name}" if rng.random() < 0.4 else name)
    names = rng.choice(list(THINGS), 2, replace=False).tolist()
    picture, things, background = _thing_picture(rng, names if rng.random() < 0.2 else names[:1], image_size)
    return picture, _thing_caption(rng, things, background)


# --- writing ---


@dataclass(frozen=True)
class _World:
    root: Path
    num_pairs: int
    images_per_class: int
    seed: int
    image_size: int

    @property
    def parameters(self) -> dict[str, int]:
        """What the bytes follow from."""
        return {"version": VERSION} | {key: value for key, value in asdict(self).items() if key != "root"}

    def rng(self, split: str, index: int) -> np.random.Generator:
        """A generator of its own for every picture, so that the order of the work does not matter."""
        return np.random.default_rng([self.seed, SPLITS.index(split), index])


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # The same settings everywhere, so that compression does not tell the sets apart.
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _write_shard(world: _World, shard: int) -> int:
    """Writes one shard of pairs, named as img2dataset does, and returns how many."""
    indices = range(shard * PAIRS_PER_SHARD, min((shard + 1) * PAIRS_PER_SHARD, world.num_pairs))
    path = world.root / "pairs" / f"pairs-{shard:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, index in enumerate(indices):
            picture, caption = _pair(world.rng("pairs", index), world.image_size)
            for extension, content in (("jpg", _jpeg(picture)), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return len(indices)


def _write_folder(world: _World, split: str, name: str, pictures: list[Image.Image]) -> int:
    """Writes the pictures of one kind as 0000.jpg, 0001.jpg, ... and returns how many."""
    folder = world.root / split / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        (folder / f"{number:04d}.jpg").write_bytes(_jpeg(picture))
    return len(pictures)


def _write_kind(world: _World, split: str, position: int) -> int:
    """Writes the folder of the split's kind at this position."""
    name = KINDS[split][position]
    first = position * world.images_per_class
    rngs = (world.rng(split, first + number) for number in range(world.images_per_class))
    if split == "scenes":
        pictures = [_scene_picture(rng, name, world.image_size) for rng in rngs]
    elif split == "textures":
        pictures = [_texture_picture(rng, name, world.image_size)[0] for rng in rngs]
    else:
        pictures = [_thing_picture(rng, [name], world.image_size)[0] for rng in rngs]
    return _write_folder(world, split, name, pictures)


def _write_digits(world: _World) -> int:
    """Writes scikit-learn's handwritten 8 x 8 digits, enlarged: at most the 174 or more that it has of each."""
    from sklearn.datasets import load_digits  # here, as its import takes a second

    digits = load_digits()
    size, count = (world.image_size, world.image_size), 0
    for digit, name in enumerate(KINDS["digits"]):
        rng = world.rng("digits", digit)
        chosen = rng.permutation(np.flatnonzero(digits.target == digit))[: world.images_per_class]
        small = [_picture(image * (255 / 16)).convert("RGB") for image in digits.images[chosen]]
        count += _write_folder(
            world, "digits", name, [picture.resize(size, Image.Resampling.BICUBIC) for picture in small]
        )
    return count


def _tasks(world: _World) -> list[tuple]:
    """Independent pieces of work (function, arguments), the longest first."""
    shards = [(_write_shard, world, shard) for shard in range(math.ceil(world.num_pairs / PAIRS_PER_SHARD))]
    kinds = [
        (_write_kind, world, split, position)
        for split in ("id", "near", "scenes", "textures")
        for position in range(len(KINDS[split]))
    ]
    return [*shards, (_write_digits, world), *kinds]


def _run(task: tuple) -> int:
    function, *arguments = task
    return function(*arguments)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable]:
    """`map` in this process for up to one worker, else over a pool of processes."""
    if workers <= 1:
        yield map
    else:
        with ProcessPoolExecutor(workers) as pool:
            yield pool.map


def _remove_unfinished(root: Path) -> None:
    """Removes the files that an interrupted call left, told by their names, as root may hold others."""
    if not (root / "pairs").is_dir():
        taken = [split for split in KINDS if (root / split).exists()]
        if taken:
            raise ValueError(
                f"{root} holds {', '.join(taken)} but no pairs, so it is no built-in world: name another root"
            )
    for path in root.glob("pairs/pairs-*.tar"):
        path.unlink()
    for folder in (path for split in KINDS for path in root.glob(f"{split}/*") if path.is_dir()):
        for path in folder.glob("[0-9][0-9][0-9][0-9]*.jpg"):
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _is_made(world: _World) -> bool:
    """Whether its root holds a finished world. Raises ValueError if that was made with other parameters."""
    record = world.root / "world.json"
    if not record.exists():
        return False
    saved = json.loads(record.read_text(encoding="utf-8"))
    saved = {name: saved.get(name) for name in world.parameters}
    if saved != world.parameters:
        raise ValueError(
            f"{world.root} holds a world made with {saved}, but {world.parameters} was asked for: "
            "name another root, or delete that folder"
        )
    return True


def make_world(
    root: str | Path,
    num_pairs: int = 20000,
    images_per_class: int = 50,
    seed: int = 0,
    image_size: int = 32,
    workers: int = 2,
) -> Path:
    """Makes the built-in world below root, unless it is already there, and returns root.

    Writes pairs/pairs-00000.tar, ... (webdataset shards of 2500 pairs, key.jpg + key.txt) and folders of pictures
    id/<thing>, near/<thing>, scenes/<kind>, textures/<kind>, digits/<digit> with `_` for spaces in their names;
    at last world.json. Pictures are RGB, image_size x image_size pixels. The same parameters give the same bytes,
    whatever the number of worker processes.

    Raises ValueError for parameters out of range, or if root holds a world made with others, or folders of these
    names that belong to no world.
    """
    root = Path(root)
    world = _World(root, num_pairs, images_per_class, seed, image_size)
    for name, least in (("num_pairs", 1), ("images_per_class", 1), ("seed", 0), ("image_size", 8)):
        if world.parameters[name] < least:
            raise ValueError(f"{name} is {world.parameters[name]}, but must be at least {least}")
    if _is_made(world):
        return root
    _remove_unfinished(root)
    (root / "pairs").mkdir(parents=True, exist_ok=True)
    total = num_pairs + images_per_class * sum(len(names) for names in KINDS.values())
    with _mapper(workers) as mapper, tqdm(total=total, desc="world", unit="image", disable=None) as bar:
        for count in mapper(_run, _tasks(world)):
            bar.update(count)
    unfinished = root / "world.json.part"
    unfinished.write_text(json.dumps(world.parameters | KINDS, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, root / "world.json")
    return root
