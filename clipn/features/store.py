"""Features on disk: a folder with manifest.json, which says what they are of, and part_00000.safetensors and so on.

A part holds `part_size` samples. It is written whole or not at all, by one rank; what is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from clipn.runtime.distributed import barrier, gather_values, is_main, rank, world_size
from clipn.runtime.files import atomic_write
from clipn.runtime.signals import leave_signals, stop_if_asked

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FORMAT = 2  # of a store; another number refuses what was written before

Encode = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # a batch of samples -> tensors to keep, joined over batches


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The mixed-precision context of a `train.precision`; fp32 is none."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()


class FeatureStore:
    """A folder of parts, and the manifest that says what they are of.

    Opening makes the folder if it is not there. Raises ValueError, with the differences, for one that holds features of
    something else, or none of whose description is readable.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any]) -> None:
        self.folder, file = Path(folder), Path(folder) / "manifest.json"
        if is_main() and not file.is_file():
            with atomic_write(file) as stream:
                stream.write(json.dumps({"format": _FORMAT} | manifest, indent=2).encode())
        barrier()
        self.manifest = _read_manifest(file)
        expected = json.loads(json.dumps({"format": _FORMAT} | manifest))
        changes = [
            f"{key}: {self.manifest.get(key)!r} there, {value!r} now"
            for key, value in expected.items()
            if self.manifest.get(key) != value and key != "part_size"  # how it is cut up is the folder's own matter
        ]
        if changes:
            raise ValueError(
                f"{file}: features of something else: {'; '.join(changes)}. Choose another features.dir, or delete it"
            )

    @property
    def samples(self) -> int:
        """How many samples the features are of, unreadable ones included."""
        return self.manifest["samples"]

    @property
    def part_size(self) -> int:
        """How many samples a part is of; the last one may be shorter."""
        return self.manifest["part_size"]

    def __len__(self) -> int:
        """The number of parts."""
        return -(-self.samples // self.part_size)

    def numbers(self, part: int) -> range:
        """The samples of a part."""
        return range(part * self.part_size, min(self.samples, (part + 1) * self.part_size))

    def file(self, part: int) -> Path:
        return self.folder / f"part_{part:05d}.safetensors"

    def missing(self) -> list[int]:
        """The parts that are not there yet, as rank 0 sees it: another run may be making them."""
        return gather_values([part for part in range(len(self)) if not self.file(part).is_file()])[0]

    def write(self, part: int, tensors: dict[str, Tensor]) -> None:
        """Keep a part. Raises OSError for a full disk; then the part is not there."""
        with atomic_write(self.file(part)) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def read(self, part: int) -> dict[str, Tensor]:
        """A part's tensors, mapped from the file. Raises ValueError for a file that is not whole."""
        try:
            return load_file(self.file(part))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{self.file(part)}: not a whole feature file ({error}); delete it, and the same command makes it anew"
            ) from error

    @torch.inference_mode()
    def fill(
        self,
        dataset: Dataset,
        encode: Encode,
        batch_size: int,
        workers: int,
        name: str,
        check: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        """Make the missing parts: each rank its share, each sample of `dataset` once.

        A sample that is a number is a bad one, and its number the cause: it is left out, and kept under "skipped"
        [n, 2] with its cause. `check` is called before each part is kept, with this rank's skipped ones and how many it
        has seen.
        """
        mine = self.missing()[rank() :: world_size()]
        batches = [
            list(self.numbers(part)[first : first + batch_size])
            for part in mine
            for first in range(0, len(self.numbers(part)), batch_size)
        ]
        loader = DataLoader(
            _Numbered(dataset),
            batch_sampler=batches,
            num_workers=workers if batches else 0,
            collate_fn=_readable,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals,
        )
        total = sum(map(len, batches))
        with tqdm(total=total, desc=name, unit="image", disable=None if is_main() else True, leave=False) as bar:
            found, skipped, seen = iter(loader), [], 0
            for part in mine:
                kept: dict[str, list[Tensor]] = {}
                for _ in range(-(-len(self.numbers(part)) // batch_size)):
                    stop_if_asked()
                    batch = next(found)
                    bar.update(len(batch.pop("read")))
                    encoded = encode(batch) if len(batch) > 1 else {}
                    for key, value in {**encoded, "skipped": batch["skipped"]}.items():
                        kept.setdefault(key, []).append(value)
                skipped, seen = skipped + kept["skipped"], seen + len(self.numbers(part))
                if check:
                    check(torch.cat(skipped), seen)
                self.write(part, {key: torch.cat(values).cpu() for key, values in kept.items()})
        barrier()


class _Numbered(Dataset):
    """number -> (number, sample)."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.samples[number]


def _readable(samples: list[Any]) -> dict[str, Tensor]:
    """Collate what could be read; "skipped" [n, 2] has the rest, "read" is as long as the batch was."""
    kept = [sample for _, sample in samples if not isinstance(sample, int)]
    skipped = [(number, cause) for number, cause in samples if isinstance(cause, int)]
    batch = default_collate(kept) if kept else {}
    return {**batch, "skipped": torch.tensor(skipped, dtype=torch.long).view(-1, 2), "read": torch.empty(len(samples))}


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not the manifest of a feature store: {error}; delete its folder") from error
    if not isinstance(content, dict) or not {"samples", "part_size"} <= content.keys():
        raise ValueError(f"{file}: not the manifest of a feature store: {content!r}; delete its folder")
    return content


def weights_hash(*modules: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of modules' weights."""
    named = ((name, value) for module in modules for name, value in module.state_dict().items())
    return hashlib.sha256("".join(f"{name} {tensor_hash(value)}" for name, value in named).encode()).hexdigest()


def tensor_hash(value: Tensor) -> str:
    """SHA-256 over a tensor's type, shape and values."""
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
