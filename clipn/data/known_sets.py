"""The image sets that papers report on, from known_sets.yaml."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class KnownSet:
    """A published image set; known_sets.yaml explains the fields."""

    title: str
    folder: str
    images: int
    classes: int | None = None
    example: str = ""
    page: str = ""
    terms: str | None = None
    note: str = ""
    archive: str | None = None
    url: str | None = None
    md5: str | None = None
    inside: str = ""
    labels: str | None = None
    subset: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """Such as "47 class folders", or "flat"."""
        return f"{self.classes} class folders" if self.classes else "flat"


_ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
KNOWN_SETS = {name: KnownSet(**row | {"subset": tuple(row.get("subset", ()))}) for name, row in _ROWS.items()}


def known_set(name: str) -> KnownSet:
    """The set of this name. Raises ValueError that names the choices for an unknown one."""
    if name not in KNOWN_SETS:
        raise ValueError(f"unknown image set {name!r}: expected one of {', '.join(KNOWN_SETS)}")
    return KNOWN_SETS[name]


def expected_tree(name: str, path: str | Path) -> str:
    """One line: the files that the set must have at `path`, and how to get them."""
    known = known_set(name)
    folders = f" in {known.layout}" if known.classes else ""
    action = "fetches it" if known.url else "unpacks and sorts it, or names the file to download"
    command = f"clipn prepare {name} --root DIR {action}"
    return f"{known.title} is {known.images} images{folders}, {path}/{known.example}; {command}; see {known.page}"
