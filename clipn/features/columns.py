"""Random access to the columns of a feature store: fixed-size rows, and rows of varying length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipn.features.store import Columns

IN_MEMORY = 2**29  # bytes of a column that is joined in host memory rather than read from disk


class DenseColumn:
    """A column [N, views, D] in parts. It is held on a GPU with enough free memory; else it stays mapped from disk."""

    def __init__(self, parts: Sequence[Columns], name: str, device: torch.device) -> None:
        self.parts = [part[name] for part in parts]
        size = sum(part.nbytes for part in self.parts)
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
            self.parts = [torch.cat([part.to(device) for part in self.parts])]
        lengths = torch.tensor([len(part) for part in self.parts])
        self.ends = lengths.cumsum(0)
        self.starts = self.ends - lengths

    def take(self, rows: Tensor, epoch: int) -> Tensor:
        """Row numbers [b] -> [b, D], of the view epoch % views."""
        view = epoch % self.parts[0].shape[1]
        if len(self.parts) == 1:
            return self.parts[0][rows.to(self.parts[0].device), view]
        numbers = torch.bucketize(rows, self.ends, right=True)
        order, (used, counts) = numbers.argsort(), numbers.unique(return_counts=True)
        inside = (rows - self.starts[numbers])[order].split(counts.tolist())
        found = [self.parts[number][part_rows, view] for number, part_rows in zip(used.tolist(), inside, strict=True)]
        return torch.cat([self.parts[0][:0, view], *found])[order.argsort()]  # there may be no rows


class RaggedColumn:
    """A column of sequences, end to end: values [T, ...], and their lengths [N, views] in the column NAME_length."""

    def __init__(self, parts: Sequence[Columns], name: str, longest: int) -> None:
        self.values = torch.cat([part[name] for part in parts])
        self.lengths = torch.cat([part[f"{name}_length"] for part in parts]).long()
        self.starts = self.lengths.flatten().cumsum(0).view_as(self.lengths) - self.lengths
        self.longest = longest

    def take(self, rows: Tensor, epoch: int) -> Tensor:
        """Row numbers [b] -> [b, longest, ...], padded with zeros, of the view epoch % views."""
        view, position = epoch % self.lengths.shape[1], torch.arange(self.longest)
        starts, real = self.starts[rows, view, None], position < self.lengths[rows, view, None]
        padded = self.values.new_zeros(*real.shape, *self.values.shape[1:])
        padded[real] = self.values[(starts + position)[real]]
        return padded


class MappedRows:
    """Rows [N, D] in parts that stay mapped from disk. Row numbers or a slice give a tensor on the device."""

    def __init__(self, parts: Sequence[Tensor], device: torch.device) -> None:
        self.column = DenseColumn([{"rows": part[:, None]} for part in parts], "rows", torch.device("cpu"))
        self.shape, self.device = torch.Size([sum(map(len, parts)), parts[0].shape[1]]), device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        numbers = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows.cpu()
        return self.column.take(numbers, 0).to(self.device)


Rows = Tensor | MappedRows


def open_rows(parts: Sequence[Tensor], device: torch.device) -> Rows:
    """Parts [n, D] -> a tensor [N, D] on the device, or mapped rows where memory is too small for one."""
    limit = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else IN_MEMORY
    small = sum(part.nbytes for part in parts) < limit
    return torch.cat([part.to(device) for part in parts]) if small else MappedRows(parts, device)


class RaggedRows:
    """N sets of rows: values [T, D] of all sets, end to end, and the number of rows of each set, counts [N]."""

    def __init__(self, values: Tensor | MappedRows, counts: Tensor, starts: Tensor | None = None) -> None:
        self.values, self.counts = values, counts.cpu().long()
        self.starts = self.counts.cumsum(0) - self.counts if starts is None else starts

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Set numbers [b] -> rows [b, n, D], padded with zeros to the largest set, and a mask [b, n] of real rows."""
        counts, starts = self.counts[numbers, None], self.starts[numbers, None]
        position = torch.arange(int(counts.max()))
        mask = position < counts
        rows = self.values[(starts + position)[mask]]
        mask = mask.to(rows.device)
        padded = rows.new_zeros(*mask.shape, rows.shape[1])
        padded[mask] = rows
        return padded, mask

    def subset(self, numbers: Tensor) -> "RaggedRows":
        """The sets of these numbers [n], of the same values."""
        return RaggedRows(self.values, self.counts[numbers], self.starts[numbers])
