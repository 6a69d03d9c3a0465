"""The built-in world: procedural pictures and captions to train and test a tiny model on, with nothing to download.

Like a small web, it holds captioned pictures of things, scenes and textures; beside them lie labelled folders of
ID things and of four kinds of OOD pictures. Everything follows from the parameters of `make_toy`.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from clipn.toy.paint import Thing, pick, scene_picture, texture_picture, thing_picture, to_image, with_article
from clipn.toy.shapes import SCENES, TEXTURES, THINGS

VERSION = 1  # raise it whenever the same parameters would give other bytes
PAIRS_PER_SHARD = 2500
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


# --- captions ---


def _caption(rng: np.random.Generator, patterns: list[str], words: str) -> str:
    return pick(rng, patterns).format(one=with_article(words), bare=words)


def _thing_words(rng: np.random.Generator, thing: Thing) -> str:
    """The thing's name, often with its colour, seldom with its size."""
    words = thing.name
    if rng.random() < 0.5:
        words = f"{thing.colour} {words}"
    if rng.random() < 0.3 and not 0.55 < thing.size < 0.85:
        words = f"{'small' if thing.size < 0.7 else 'large'} {words}"
    return words


def _thing_caption(rng: np.random.Generator, things: list[Thing], background: str) -> str:
    """A caption of the first thing that may leave out the second, the background and the tilt."""
    caption = _caption(rng, THING_CAPTIONS, _thing_words(rng, things[0]))
    if len(things) > 1 and rng.random() < 0.6:
        joint = pick(rng, ["and", "next to", "with"])
        return f"{caption} {joint} {with_article(_thing_words(rng, things[1]))}"
    if rng.random() < 0.2:
        return f"{caption} on {background}"
    if abs(things[0].tilt) > 15 and rng.random() < 0.3:
        return f"{caption} , tilted"
    return caption


def _pair(rng: np.random.Generator, image_size: int) -> tuple[Image.Image, str]:
    """A picture and its caption: 84 % things, 8 % scenes, 8 % textures."""
    kind = rng.random()
    if kind < 0.08:
        name = pick(rng, list(SCENES))
        return scene_picture(rng, name, image_size), _caption(rng, SCENE_CAPTIONS, name)
    if kind < 0.16:
        name = pick(rng, list(TEXTURES))
        picture, colours = texture_picture(rng, name, image_size)
        return picture, _caption(rng, TEXTURE_CAPTIONS, f"{colours} {name}" if rng.random() < 0.4 else name)
    names = rng.choice(list(THINGS), 2, replace=False).tolist()
    picture, things, background = thing_picture(rng, names if rng.random() < 0.2 else names[:1], image_size)
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


def _write_folder(folder: Path, pictures: list[Image.Image]) -> int:
    """Writes the pictures of one kind as 0000.jpg, 0001.jpg, ... and returns how many."""
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
        pictures = [scene_picture(rng, name, world.image_size) for rng in rngs]
    elif split == "textures":
        pictures = [texture_picture(rng, name, world.image_size)[0] for rng in rngs]
    else:
        pictures = [thing_picture(rng, [name], world.image_size)[0] for rng in rngs]
    return _write_folder(world.root / split / name.replace(" ", "_"), pictures)


def write_digits(folder: Path, image_size: int, images_per_class: int, seed: int) -> int:
    """Writes scikit-learn's handwritten 8 x 8 digits, enlarged, as folder/<digit>/0000.jpg, ... and returns how many.

    There are 174 or more of each digit; no more are written.
    """
    from sklearn.datasets import load_digits  # here, as its import takes a second

    digits = load_digits()
    size, count = (image_size, image_size), 0
    for digit, name in enumerate(KINDS["digits"]):
        rng = np.random.default_rng([seed, SPLITS.index("digits"), digit])
        chosen = rng.permutation(np.flatnonzero(digits.target == digit))[:images_per_class]
        small = [to_image(image * (255 / 16)).convert("RGB") for image in digits.images[chosen]]
        count += _write_folder(folder / name, [picture.resize(size, Image.Resampling.BICUBIC) for picture in small])
    return count


def _tasks(world: _World) -> list[tuple]:
    """Independent pieces of work (function, arguments), the longest first."""
    shards = [(_write_shard, world, shard) for shard in range(math.ceil(world.num_pairs / PAIRS_PER_SHARD))]
    kinds = [
        (_write_kind, world, split, position)
        for split in ("id", "near", "scenes", "textures")
        for position in range(len(KINDS[split]))
    ]
    digits = (write_digits, world.root / "digits", world.image_size, world.images_per_class, world.seed)
    return [*shards, digits, *kinds]


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


def make_toy(
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
