"""Features of the frozen towers, each image read and encoded once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .distributed import is_main
from .image_sets import ImageFiles, ImageSet
from .images import Transform
from .model import CLIPN

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The mixed-precision context of a `train.precision`; fp32 is none."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()


@torch.inference_mode()
def image_set_features(
    model: CLIPN,
    images: ImageSet,
    transform: Transform,
    batch_size: int = 256,
    workers: int = 4,
    precision: str = "fp32",
) -> torch.Tensor:
    """One pass over an image set -> [N, D] float32, L2-normalised, on the CPU, in the set's order."""
    device = model.logit_scale.device
    loader = DataLoader(ImageFiles(images.paths, transform), batch_size, num_workers=workers)
    features = []
    for batch in tqdm(loader, desc=images.name, unit="batch", disable=None if is_main() else True, leave=False):
        with autocast(device, precision):
            features.append(model.encode_image(batch.to(device)).cpu())
    return torch.cat(features)
