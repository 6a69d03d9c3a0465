"""The configs that come with the package, in its folder configs: in a checkout that is a link to the one above."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def find_config(path: Path) -> Path:
    """This file, or the shipped config of this name (toy, toy.yaml, configs/toy.yaml).

    Raises FileNotFoundError that lists the shipped ones.
    """
    if path.is_file():
        return path
    shipped = sorted(_PACKAGE.glob("configs/*.yaml"))
    if path.parent in (Path(), Path("configs")):
        for file in shipped:
            if file.stem == path.name.removesuffix(".yaml"):
                return file
    raise FileNotFoundError(f"{path}: no such config file; those shipped are: {', '.join(p.stem for p in shipped)}")


def find_file(value: Any) -> Any:
    """A relative path to a .json or .txt file that is not here, but comes with the package; all else as it is.

    Shipped configs name such files from the folder above configs/, wherever the command is run.
    """
    if not isinstance(value, str) or not value.endswith((".json", ".txt")) or Path(value).is_file():
        return value
    return str(_PACKAGE / value) if (_PACKAGE / value).is_file() else value
