"""What several test files need: small images, shards and image folders."""

import io
import multiprocessing
import os
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from scipy.special import expit

from clipn.data.image_sets import ImageSet
from clipn.data.pairs import Pairs
from clipn.evaluation.results import SetScores
from clipn.methods.registry import BY_LOG_ODDS


def image_bytes(colour=(200, 30, 30), size=(24, 24), kind: str = "JPEG") -> bytes:
    """An encoded image of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """An uncompressed tar of these members, in this order."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    """A zip file of these members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A webdataset shard from {key: {extension: content}}."""
    return write_tar(
        path, {f"{key}.{kind}": content for key, parts in samples.items() for kind, content in parts.items()}
    )


def numbered_samples(count: int, first: int = 0) -> dict[str, dict[str, bytes]]:
    """Samples for `write_shard`: number n has the caption "caption n" and an image of a colour of its own."""

    def colour(n: int) -> tuple[int, int, int]:
        return 2 * n % 256, n % 256, (255 - n) % 256

    numbers = range(first, first + count)
    return {f"{n:05d}": {"jpg": image_bytes(colour(n)), "txt": f"caption {n}".encode()} for n in numbers}


def write_images(folder: Path, *names: str) -> Path:
    """A folder with these small images in it (names such as "cat/1.jpg")."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (20 * n % 256, 90, 160)).save(path)
    return folder


def write_noise(folder: Path, *names: str) -> Path:
    """A folder with these images of random pixels, which span more dimensions than those of one colour."""
    noise = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return folder


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims this size, and holds nothing."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def captions(pairs: Pairs) -> list[str]:
    return [pairs[n].caption for n in range(len(pairs))]


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def files(folder: str | Path) -> list[str]:
    """The names of all files in and below a folder."""
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def spell(texts: list[str], length: int = 64) -> torch.Tensor:
    """A tokenizer whose tokens are the characters' codes, so that `read` gives the text back."""
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        codes = [ord(letter) for letter in text[:length]]
        row[: len(codes)] = torch.tensor(codes)
    return tokens


def read(tokens: torch.Tensor) -> list[str]:
    """The texts that `spell` wrote."""
    return ["".join(chr(code) for code in row.tolist() if code) for row in tokens]


def set_scores(images: ImageSet, scores: dict[str, np.ndarray], predicted=0, p_yes=0.5) -> SetScores:
    """What a model might say of a set: one class and p_yes for all images, or one for each."""
    predicted, p_yes = (np.broadcast_to(values, len(images)) for values in (predicted, p_yes))
    return SetScores(images, scores, {}, predicted, p_yes)


def as_scores(compared: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores from the values that metrics compare: probabilities from log odds, and the others as they are."""
    return {name: expit(values) if name in BY_LOG_ODDS else values for name, values in compared.items()}


def run_ranks(count: int, function: Callable, *arguments: Any) -> None:
    """Call a function of a module in `count` processes with torchrun's variables, without a new Python for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clipn.pipeline"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, count, port, function, *arguments)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * count, "a rank's error is on stderr"


def _rank(rank: int, count: int, port: int, function: Callable, *arguments: Any) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data-loading workers
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, count, "127.0.0.1", port)), strict=True))
    function(*arguments)


def default_preprocess(image_size: int) -> dict:
    """open_clip's preprocessing of images, with OpenAI's statistics."""
    return asdict(PreprocessCfg(size=image_size))
