"""The mode `loader` of benchmark.py: the loader of training pairs beside open_clip's webdataset pipeline.

Both read the same shards of JPEG photos, 500 x 375, with as many workers, and make the same crops for ViT-B-16.
"""

from __future__ import annotations

import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from clipn.config.schema import Config, DataConfig, RunConfig, TrainConfig
from clipn.data.images import pixel_input
from clipn.data.pairs import open_pairs, training_loader
from clipn.model.base import get_tokenizer
from clipn.runtime.files import write_tar

try:
    import webdataset
except ImportError:
    webdataset = None

PHOTOS, SHARDS, PAIRS_PER_SHARD = 64, 8, 512  # distinct photos, each in many pairs
BATCH, WARM_UP, BATCHES = 32, 20, 40
WIDTH, HEIGHT, QUALITY = 500, 375, 90
SIZE, CROP = 224, (0.9, 1.0)


def time_loaders(rounds: int, workers: int) -> list[dict[str, Any]]:
    """One row for each loader: pairs a second, as a model's input on the CPU, from the same shards.

    The loaders take turns; the times are medians over rounds. Without webdataset there is one row only.
    """
    loaders = {"loader": clipn_batches, "webdataset": webdataset_batches}
    if webdataset is None:
        del loaders["webdataset"]
        print("loader    to compare: pip install webdataset")
    times: dict[str, list[float]] = {name: [] for name in loaders}
    with tempfile.TemporaryDirectory() as folder:
        bytes_per_photo = write_shards(Path(folder))
        for _ in range(rounds):
            for name, batches in loaders.items():
                times[name].append(seconds_per_batch(batches(Path(folder), workers)))
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append({"mode": name, "batch_size": BATCH, "workers": workers, "bytes_per_photo": bytes_per_photo})
        rows[-1] |= {"pairs_per_s": BATCH / median, "ms_per_step": 1000 * median}
    if webdataset is not None:
        rows[0]["speed_up_over_webdataset"] = rows[0]["pairs_per_s"] / rows[1]["pairs_per_s"]
    return rows


def seconds_per_batch(batches: Iterator[Tensor]) -> float:
    """Seconds for a batch, after those that fill the queues and buffers."""
    for images in itertools.islice(batches, WARM_UP):
        assert images.shape == (BATCH, 3, SIZE, SIZE) and images.dtype == torch.float32
    start = time.perf_counter()
    count = sum(1 for _ in itertools.islice(batches, BATCHES))
    return (time.perf_counter() - start) / count


def clipn_batches(folder: Path, workers: int) -> Iterator[Tensor]:
    """The images of training batches, as data.source=pairs reads them."""
    data = DataConfig(shards=f"{folder}/*.tar", index_dir=f"{folder}/index", crop_scale=list(CROP), workers=workers)
    config = Config(run=RunConfig(device="cpu"), data=data, train=TrainConfig(batch_size=BATCH))
    preprocess, tokenizer = asdict(PreprocessCfg(size=SIZE)), get_tokenizer(config.model.name)
    to_input = pixel_input(preprocess, torch.device("cpu"))
    for batch in training_loader(config, open_pairs(data), preprocess, tokenizer)[0]:
        yield to_input(batch["image"])


def webdataset_batches(folder: Path, workers: int) -> Iterator[Tensor]:
    """The images of training batches of a webdataset pipeline with the stages and buffers of open_clip's."""
    transform = image_transform_v2(PreprocessCfg(size=SIZE), is_train=True, aug_cfg=AugmentationCfg(scale=CROP))
    tokenizer = get_tokenizer(Config().model.name)
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(sorted(map(str, folder.glob("*.tar")))),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(bufsize=5000, initial=1000),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg", text="txt"),
        webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH, partial=False),
    )
    loader = webdataset.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=workers)
    return (images for images, _ in loader)


def write_shards(folder: Path) -> int:
    """Write the shards. Returns the mean size of a photo's file."""
    generator = np.random.default_rng(0)
    photos = [photo(generator) for _ in range(PHOTOS)]
    for shard in range(SHARDS):
        members = {}
        for number in range(PAIRS_PER_SHARD):
            members[f"{number:09d}.jpg"] = photos[number % PHOTOS]
            caption = f"photo {number} of shard {shard}: a dog on the grass in front of a house"
            members[f"{number:09d}.txt"] = caption.encode()
        write_tar(folder / f"{shard:05d}.tar", members.items())
    return sum(map(len, photos)) // PHOTOS


def photo(generator: np.random.Generator) -> bytes:
    """A JPEG file of noise whose finer structures are weaker, as in photos."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
    for rows, strength in ((6, 30), (25, 25), (94, 18), (375, 9)):
        noise = generator.standard_normal((rows, rows * 4 // 3, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(layer)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
