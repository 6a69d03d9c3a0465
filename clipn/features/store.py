"""A feature store on disk: a folder with manifest.json, which describes the features, and part_00000.safetensors, ...

A part holds named tensors (columns) of `part_size` samples. One rank writes it atomically; an existing part is kept.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from clipn.runtime.distributed import barrier, gather_values, is_main, rank, world_size
from clipn.runtime.files import atomic_write
from clipn.runtime.signals import ignore_stop_signals, killed_children, stop_if_asked

_FORMAT = 2  # of the folder; a store of another format is refused

Columns = dict[str, Tensor]
Encode = Callable[[Columns], Columns]  # a batch of samples -> the columns to store, joined along the first dimension


class FeatureStore:
    """A folder of parts, and the manifest of all that their features depend on.

    samples: the number of samples, unreadable ones included. part_size: of a part; the last one may be shorter.
    holds, key: what is stored, and the setting of its place, in messages.

    Opening creates the folder and its manifest if they are missing. Raises ValueError, with the differences, where the
    manifest differs in any key but part_size, and for a manifest that is not readable.
    """

    def __init__(
        self, folder: str | Path, manifest: dict[str, Any], holds: str = "features", key: str = "features.dir"
    ) -> None:
        self.folder, file = Path(folder), Path(folder) / "manifest.json"
        text = json.dumps({"format": _FORMAT} | manifest, indent=2)
        if is_main() and not file.is_file():
            with atomic_write(file) as stream:
                stream.write(text.encode())
        barrier()
        self.manifest = _read_manifest(file)
        self.samples, self.part_size = self.manifest["samples"], self.manifest["part_size"]
        changes = [
            change
            for name, value in json.loads(text).items()
            if name != "part_size"  # the folder keeps its own part size
            for change in _changes(name, self.manifest.get(name), value)
        ]
        if changes:
            raise ValueError(
                f"{file}: {holds} of something else: {'; '.join(changes)}. Choose another {key}, or delete its folder"
            )

    def __len__(self) -> int:
        """The number of parts."""
        return math.ceil(self.samples / self.part_size)

    def numbers(self, part: int) -> range:
        """The samples of a part."""
        return range(part * self.part_size, min(self.samples, (part + 1) * self.part_size))

    def file(self, part: int) -> Path:
        """The file of a part, which need not exist."""
        return self.folder / f"part_{part:05d}.safetensors"

    def missing(self) -> list[int]:
        """The parts that do not exist, as seen by rank 0: another run may be writing them."""
        return gather_values([part for part in range(len(self)) if not self.file(part).is_file()])[0]

    def write(self, part: int, columns: Columns) -> None:
        """Write a part atomically. Raises OSError for a full disk; then the part does not exist."""
        with atomic_write(self.file(part)) as file:
            file.write(save({name: column.contiguous() for name, column in columns.items()}))

    def read(self) -> tuple[Tensor, list[Columns]]:
        """The rows of "skipped" [n, 2], and the columns of each part with a readable sample, mapped from its file.

        Raises ValueError for a damaged file.
        """
        parts = []
        for file in map(self.file, range(len(self))):
            try:
                parts.append(load_file(file))
            except (SafetensorError, OSError, ValueError) as error:
                reason = f"not a whole feature file ({error}); delete it, and it is computed again"
                raise ValueError(f"{file}: {reason}") from error
        return torch.cat([part["skipped"] for part in parts]), [part for part in parts if len(part) > 1]

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
        """Encode and write the missing parts: each rank its share, each sample of `dataset` once.

        name: of the progress bar. An int in place of a sample is the cause why it is unreadable: the column "skipped"
        [n, 2] holds its number and this cause, the other columns leave it out. Before a part is written,
        check(skipped, seen) is called with all "skipped" rows and the number of samples of this rank so far.
        """
        parts = self.missing()[rank() :: world_size()]
        batches = {part: [b.tolist() for b in torch.tensor(self.numbers(part)).split(batch_size)] for part in parts}
        loader = DataLoader(
            dataset,
            batch_sampler=[batch for part in parts for batch in batches[part]],
            num_workers=workers if parts else 0,
            collate_fn=_collate_readable,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_stop_signals,
        )
        total = sum(len(self.numbers(part)) for part in parts)
        disable = None if is_main() else True  # None: where there is no terminal
        with tqdm(total=total, desc=name, unit="image", disable=disable, leave=False) as bar, killed_children():
            loaded, skipped, seen = iter(loader), [], 0
            for part in parts:
                columns: dict[str, list[Tensor]] = defaultdict(list)
                for numbers in batches[part]:
                    batch, causes = next(loaded)
                    stop_if_asked()
                    for column, values in (encode(batch) if batch else {}).items():
                        columns[column].append(values)
                    columns["skipped"].append(torch.stack([torch.tensor(numbers), causes], dim=1)[causes >= 0])
                    bar.update(len(numbers))
                skipped, seen = skipped + columns["skipped"], seen + len(self.numbers(part))
                if check:
                    check(torch.cat(skipped), seen)
                self.write(part, {column: torch.cat(values).cpu() for column, values in columns.items()})
        barrier()


def _collate_readable(samples: list[Any]) -> tuple[Columns, Tensor]:
    """The readable samples, collated, and each sample's cause [b], -1 if it is readable."""
    readable = [sample for sample in samples if not isinstance(sample, int)]
    causes = torch.tensor([sample if isinstance(sample, int) else -1 for sample in samples])
    return default_collate(readable) if readable else {}, causes


def _changes(name: str, there: Any, now: Any) -> Iterator[str]:
    """What differs, by the dotted names of nested values."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in there | now:
            yield from _changes(f"{name}.{key}", there.get(key), now.get(key))
    elif there != now:
        yield f"{name}: {there!r} there, {now!r} now"


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"samples", "part_size"} <= content.keys():
            raise ValueError(repr(content))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not the manifest of a feature store: {error}; delete its folder") from error
    return content
