"""The built-in world: generated images and captions to train and test a tiny model on, without any download.

It holds captioned images of things, scenes and textures, and labelled folders of ID things and of four kinds of OOD
images. Where things stand before scenes, further folders hold ID training images and things before scenes that the ID
training images do not show. Everything follows from the parameters of `World`.
"""

import io
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from clipn.runtime.files import atomic_write, write_tar
from clipn.toy.captions import caption, thing_caption
from clipn.toy.drawing import draw_scene, draw_texture, draw_things, pick, pixels_to_image
from clipn.toy.shapes import CLASSES, KNOWN_SCENES, SCENE_CLASSES, SCENES, TEXTURES, THINGS, UNKNOWN_SCENES

VERSION = 1  # raise it whenever the same parameters would give other bytes
PAIRS_PER_SHARD = 2500
SPLITS = ("pairs", *CLASSES, *SCENE_CLASSES)  # the position is part of every image's seed


@dataclass(frozen=True)
class World:
    """What a world's bytes depend on. Raises ValueError for numbers out of range."""

    num_pairs: int = 20000
    images_per_class: int = 50
    seed: int = 0
    image_size: int = 32
    before_scenes: bool = False  # things stand before scenes, not on pale backgrounds

    def __post_init__(self) -> None:
        for name, least in (("num_pairs", 1), ("images_per_class", 1), ("seed", 0), ("image_size", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")

    @property
    def parameters(self) -> dict[str, int]:
        """The parameters as world.json holds them; `before_scenes` is left out if it is off."""
        return {"version": VERSION} | {name: value for name, value in asdict(self).items() if value is not False}

    @property
    def classes(self) -> dict[str, list[str]]:
        """The class names of each labelled image set."""
        return CLASSES | SCENE_CLASSES if self.before_scenes else CLASSES

    def rng(self, split: str, index: int) -> Generator:
        """A separate generator for every image, so that the order of the work does not matter."""
        return np.random.default_rng([self.seed, SPLITS.index(split), index])


def make_toy(root: str | Path, world: World, workers: int = 2) -> Path:
    """Make the built-in world below root, unless it is already there, and return root.

    Writes pairs/pairs-00000.tar, ... (webdataset shards of 2500 pairs, key.jpg + key.txt) and folders of images
    id/<thing>, near/<thing>, scenes/<kind>, textures/<kind>, digits/<digit> with `_` for spaces in their names;
    world.json is written last. Images are RGB, image_size x image_size pixels. The same parameters give the same
    bytes, whatever the number of worker processes. Raises ValueError if root holds a world made with others, or folders
    of these names that belong to no world.

    With `before_scenes` half of the pairs' things stand before any scene, those of id, near and train/<thing> before
    KNOWN_SCENES, and those of id_shifted/<thing> and near_shifted/<thing> before UNKNOWN_SCENES.
    """
    root = Path(root)
    if (root / "world.json").exists():
        saved = json.loads((root / "world.json").read_text(encoding="utf-8"))
        saved = {name: saved[name] for name in ("version", *asdict(world)) if name in saved}
        if saved == world.parameters:
            return root
        asked = f"{world.parameters} was asked for: name another root, or delete that folder"
        raise ValueError(f"{root} holds a world made with {saved}, but {asked}")
    _remove_unfinished(root, world)
    (root / "pairs").mkdir(parents=True, exist_ok=True)
    total = world.num_pairs + world.images_per_class * sum(len(names) for names in world.classes.values())
    pool = ProcessPoolExecutor(workers) if workers > 1 else nullcontext()
    with pool, tqdm(total=total, desc="world", unit="image", disable=None) as bar:
        for count in (pool.map if workers > 1 else map)(_run, _tasks(root, world)):
            bar.update(count)
    with atomic_write(root / "world.json") as file:
        file.write(f"{json.dumps(world.parameters | world.classes, indent=2)}\n".encode())
    return root


def write_digits(folder: Path, image_size: int, images_per_class: int, seed: int) -> int:
    """Write scikit-learn's 8 x 8 digits, at least 174 of each, enlarged, to folder/<digit>; return how many."""
    from sklearn.datasets import load_digits  # here, as its import takes a second

    digits = load_digits()
    size, count = (image_size, image_size), 0
    for digit, name in enumerate(CLASSES["digits"]):
        rng = np.random.default_rng([seed, SPLITS.index("digits"), digit])
        chosen = rng.permutation(np.flatnonzero(digits.target == digit))[:images_per_class]
        small = [pixels_to_image(image * (255 / 16)).convert("RGB") for image in digits.images[chosen]]
        count += _write_folder(folder / name, [image.resize(size, Image.Resampling.BICUBIC) for image in small])
    return count


def _remove_unfinished(root: Path, world: World) -> None:
    """Remove the files of an interrupted call, recognised by their names, as root may hold others."""
    existing = [split for split in world.classes if (root / split).exists()]
    if existing and not (root / "pairs").is_dir():
        holds = f"{', '.join(existing)} but no pairs"
        raise ValueError(f"{root} holds {holds}, so it is no built-in world: name another root")
    for path in root.glob("pairs/pairs-*.tar"):
        path.unlink()
    for folder in (path for split in world.classes for path in root.glob(f"{split}/*") if path.is_dir()):
        for path in folder.glob("[0-9][0-9][0-9][0-9]*.jpg"):
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _tasks(root: Path, world: World) -> list[Callable[[], int]]:
    """Independent pieces of work, the longest first; each returns its number of images."""
    shards = range(math.ceil(world.num_pairs / PAIRS_PER_SHARD))
    digits = partial(write_digits, root / "digits", world.image_size, world.images_per_class, world.seed)
    classes = [(split, n) for split, names in world.classes.items() if split != "digits" for n in range(len(names))]
    return [
        *(partial(_write_shard, root, world, shard) for shard in shards),
        digits,
        *(partial(_write_class, root, world, split, n) for split, n in classes),
    ]


def _run(task: Callable[[], int]) -> int:
    return task()


def _write_shard(root: Path, world: World, shard: int) -> int:
    """Write one shard of pairs with img2dataset's member names, and return its number of pairs."""
    indices = range(shard * PAIRS_PER_SHARD, min((shard + 1) * PAIRS_PER_SHARD, world.num_pairs))
    path = root / "pairs" / f"pairs-{shard:05d}.tar"

    def members() -> Iterator[tuple[str, bytes]]:
        for number, index in enumerate(indices):
            image, text = _pair(world.rng("pairs", index), world)
            yield f"{shard:05d}{number:04d}.jpg", _jpeg(image)
            yield f"{shard:05d}{number:04d}.txt", text.encode()

    write_tar(path, members())
    return len(indices)


def _pair(rng: Generator, world: World) -> tuple[Image.Image, str]:
    """An image and its caption: 84 % things, 8 % scenes, 8 % textures."""
    kind, image_size = rng.random(), world.image_size
    if kind < 0.08:
        name = pick(rng, list(SCENES))
        return draw_scene(rng, name, image_size), caption(rng, "scenes", name)
    if kind < 0.16:
        name = pick(rng, list(TEXTURES))
        image, colours = draw_texture(rng, name, image_size)
        return image, caption(rng, "textures", f"{colours} {name}" if rng.random() < 0.4 else name)
    names = rng.choice(list(THINGS), 2, replace=False).tolist()
    names = names if rng.random() < 0.2 else names[:1]
    # a small base learns things on pale backgrounds first, and then finds them before scenes
    scene = pick(rng, list(SCENES)) if world.before_scenes and rng.random() < 0.5 else None
    image, things, background = draw_things(rng, names, image_size, scene)
    return image, thing_caption(rng, things, background, names_only=world.before_scenes)


def _write_class(root: Path, world: World, split: str, position: int) -> int:
    """Write the folder of one class and return its number of images."""
    name, images = world.classes[split][position], []
    scenes = UNKNOWN_SCENES if split.endswith("_shifted") else KNOWN_SCENES
    for index in range(position * world.images_per_class, (position + 1) * world.images_per_class):
        rng = world.rng(split, index)
        if split == "scenes":
            images.append(draw_scene(rng, name, world.image_size))
        elif split == "textures":
            images.append(draw_texture(rng, name, world.image_size)[0])
        else:
            scene = pick(rng, scenes) if world.before_scenes else None
            images.append(draw_things(rng, [name], world.image_size, scene)[0])
    return _write_folder(root / split / name.replace(" ", "_"), images)


def _write_folder(folder: Path, images: list[Image.Image]) -> int:
    """Write images as 0000.jpg, 0001.jpg, ... and return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        (folder / f"{number:04d}.jpg").write_bytes(_jpeg(image))
    return len(images)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)  # the same everywhere: compression must not mark a set
    return buffer.getvalue()
