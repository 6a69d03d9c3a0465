"""Figures that others report, from published.yaml, for the image sets that were measured here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

PUBLISHED = Path(__file__).with_name("published.yaml")

Pair = tuple[float, float]  # AUROC and FPR95 in percent


@dataclass(frozen=True)
class Published:
    """One method's row of a published table, and where it was read."""

    method: str
    model: str
    source: str
    url: str
    figures: dict[str, Pair]  # by the measured OOD set's name
    average: Pair
    note: str = ""

    def about(self) -> str:
        """The model and the source, in words."""
        return f"{self.model}; {self.source}" + (f" ({self.note})" if self.note else "")


def published_for(id_set: str, ood_sets: Sequence[str], path: Path = PUBLISHED) -> list[Published]:
    """The published rows for this ID set whose every OOD set was measured too.

    Names match without regard to case, punctuation and a plural s. The figures come in the order of `ood_sets`.
    """
    measured = {_key(name): name for name in ood_sets}
    rows = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        figures = {_key(name): tuple(pair) for name, pair in entry["figures"].items()}
        if _key(entry["id_set"]) != _key(id_set) or not figures.keys() <= measured.keys():
            continue
        here = {name: figures[key] for key, name in measured.items() if key in figures}
        rest = (tuple(entry["average"]), entry.get("note", ""))
        rows.append(Published(entry["method"], entry["model"], entry["from"], entry["url"], here, *rest))
    return rows


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("s")
