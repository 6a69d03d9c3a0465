"""A run's metrics: metrics.jsonl, and TensorBoard where it is installed."""

import json
import math
from pathlib import Path
from typing import Any

from clipn.runtime.files import atomic_write


class RunLog:
    """Writes metrics.jsonl in a run's folder, one line per logged step, and the same numbers for TensorBoard.

    step: where the run starts or resumes; lines of later steps, which a killed run wrote, are dropped.
    """

    def __init__(self, folder: str | Path, step: int) -> None:
        self.file = metrics_file(folder)
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        with atomic_write(self.file) as file:
            file.write("".join(f"{line}\n" for line in lines if _step_of(line) <= step).encode())
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(Path(folder) / "tensorboard", purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        # JSON has no infinity
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if name != "step" and number is not None:
                        self.board.add_scalar(f"{name}/{part}" if part else name, number, line["step"])

    def close(self) -> None:
        if self.board:
            self.board.close()


def metrics_file(folder: str | Path) -> Path:
    return Path(folder) / "metrics.jsonl"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a kill cut off
        return math.inf
