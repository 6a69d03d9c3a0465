"""evaluated.json: which weights the results of a run folder belong to, and how they were evaluated."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipn.runtime.files import atomic_write

RECORD = "evaluated.json"


def write_record(
    folder: str | Path, weights: Sequence[str], settings: dict[str, Any], class_names: Sequence[str]
) -> None:
    """Record the hashes of the weights in the order of the results, the `eval` section, and the class names."""
    content = {"weights_sha256": list(weights), "eval": settings, "class_names": list(class_names)}
    with atomic_write(Path(folder) / RECORD) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a run folder; {} if there is none. Raises ValueError for a file that is not JSON."""
    path = Path(folder) / RECORD
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON; delete it and evaluate again") from error
