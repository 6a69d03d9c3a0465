"""The built-in world: generated images and captions to train and test a tiny model on, without any download.

It holds captioned images of things, scenes and textures, and labelled folders of ID things and of four kinds of OOD
images. Everything follows from the parameters of `make_toy`.
"""

import io
import json
import math
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from clipn.runtime.files import atomic_write
from clipn.toy.captions import caption, thing_caption
from clipn.toy.drawing import draw_scene, draw_texture, draw_things, pick, pixels_to_image
from clipn.toy.shapes import CLASSES, SCENES, TEXTURES, THINGS

VERSION = 1  # raise it whenever the same parameters would give other bytes
PAIRS_PER_SHARD = 2500
SPLITS = ("pairs", "id", "near", "scenes", "textures", "digits")  # the position is part of every image's seed


@dataclass(frozen=True)
class _World:
    root: Path
    num_pairs: int
    images_per_class: int
    seed: int
    image_size: int

    @property
    def parameters(self) -> dict[str, int]:
        """Everything that the bytes depend on."""
        return {"version": VERSION} | {key: value for key, value in asdict(self).items() if key != "root"}

    def rng(self, split: str, index: int) -> Generator:
        """A separate generator for every image, so that the order of the work does not matter."""
        return np.random.default_rng([self.seed, SPLITS.index(split), index])


def make_toy(
    root: str | Path,
    num_pairs: int = 20000,
    images_per_class: int = 50,
    seed: int = 0,
    image_size: int = 32,
    workers: int = 2,
) -> Path:
    """Make the built-in world below root, unless it is already there, and return root.

    Writes pairs/pairs-00000.tar, ... (webdataset shards of 2500 pairs, key.jpg + key.txt) and folders of images
    id/<thing>, near/<thing>, scenes/<kind>, textures/<kind>, digits/<digit> with `_` for spaces in their names;
    world.json is written last. Images are RGB, image_size x image_size pixels. The same parameters give the same
    bytes, whatever the number of worker processes. Raises ValueError for parameters out of range, or if root holds a
    world made with others, or folders of these names that belong to no world.
    """
    root = Path(root)
    world = _World(root, num_pairs, images_per_class, seed, image_size)
    for name, least in (("num_pairs", 1), ("images_per_class", 1), ("seed", 0), ("image_size", 8)):
        if world.parameters[name] < least:
            raise ValueError(f"{name} is {world.parameters[name]}, but must be at least {least}")
    if (root / "world.json").exists():
        saved = json.loads((root / "world.json").read_text(encoding="utf-8"))
        saved = {name: saved.get(name) for name in world.parameters}
        if saved == world.parameters:
            return root
        asked = f"{world.parameters} was asked for: name another root, or delete that folder"
        raise ValueError(f"{root} holds a world made with {saved}, but {asked}")
    _remove_unfinished(root)
    (root / "pairs").mkdir(parents=True, exist_ok=True)
    total = num_pairs + images_per_class * sum(len(names) for names in CLASSES.values())
    pool = ProcessPoolExecutor(workers) if workers > 1 else nullcontext()
    with pool, tqdm(total=total, desc="world", unit="image", disable=None) as bar:
        for count in (pool.map if workers > 1 else map)(_run, _tasks(world)):
            bar.update(count)
    with atomic_write(root / "world.json") as file:
        file.write(f"{json.dumps(world.parameters | CLASSES, indent=2)}\n".encode())
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


def _remove_unfinished(root: Path) -> None:
    """Remove the files of an interrupted call, recognised by their names, as root may hold others."""
    existing = [split for split in CLASSES if (root / split).exists()]
    if existing and not (root / "pairs").is_dir():
        holds = f"{', '.join(existing)} but no pairs"
        raise ValueError(f"{root} holds {holds}, so it is no built-in world: name another root")
    for path in root.glob("pairs/pairs-*.tar"):
        path.unlink()
    for folder in (path for split in CLASSES for path in root.glob(f"{split}/*") if path.is_dir()):
        for path in folder.glob("[0-9][0-9][0-9][0-9]*.jpg"):
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _tasks(world: _World) -> list[Callable[[], int]]:
    """Independent pieces of work, the longest first; each returns its number of images."""
    shards = [partial(_write_shard, world, shard) for shard in range(math.ceil(world.num_pairs / PAIRS_PER_SHARD))]
    digits = partial(write_digits, world.root / "digits", world.image_size, world.images_per_class, world.seed)
    classes = [(split, n) for split in SPLITS[1:5] for n in range(len(CLASSES[split]))]
    return [*shards, digits, *(partial(_write_class, world, split, n) for split, n in classes)]


def _run(task: Callable[[], int]) -> int:
    return task()


def _write_shard(world: _World, shard: int) -> int:
    """Write one shard of pairs with img2dataset's member names, and return its number of pairs."""
    indices = range(shard * PAIRS_PER_SHARD, min((shard + 1) * PAIRS_PER_SHARD, world.num_pairs))
    path = world.root / "pairs" / f"pairs-{shard:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, index in enumerate(indices):
            image, text = _pair(world.rng("pairs", index), world.image_size)
            for extension, content in (("jpg", _jpeg(image)), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return len(indices)


def _pair(rng: Generator, image_size: int) -> tuple[Image.Image, str]:
    """An image and its caption: 84 % things, 8 % scenes, 8 % textures."""
    kind = rng.random()
    if kind < 0.08:
        name = pick(rng, list(SCENES))
        return draw_scene(rng, name, image_size), caption(rng, "scenes", name)
    if kind < 0.16:
        name = pick(rng, list(TEXTURES))
        image, colours = draw_texture(rng, name, image_size)
        return image, caption(rng, "textures", f"{colours} {name}" if rng.random() < 0.4 else name)
    names = rng.choice(list(THINGS), 2, replace=False).tolist()
    image, things, background = draw_things(rng, names if rng.random() < 0.2 else names[:1], image_size)
    return image, thing_caption(rng, things, background)


def _write_class(world: _World, split: str, position: int) -> int:
    """Write the folder of one class and return its number of images."""
    name, images = CLASSES[split][position], []
    for index in range(position * world.images_per_class, (position + 1) * world.images_per_class):
        rng = world.rng(split, index)
        if split == "scenes":
            images.append(draw_scene(rng, name, world.image_size))
        elif split == "textures":
            images.append(draw_texture(rng, name, world.image_size)[0])
        else:
            images.append(draw_things(rng, [name], world.image_size)[0])
    return _write_folder(world.root / split / name.replace(" ", "_"), images)


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
