"""Results that others published, read from published.yaml for the image sets that were measured here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

PUBLISHED = Path(__file__).with_name("published.yaml")


class Published(NamedTuple):
    """One method's row of a published table, and its source."""

    method: str
    source: str  # method, model, where the row was read, note
    url: str
    results: dict[str, tuple[float, float]]  # AUROC and FPR95 in percent or NaN, by the measured OOD set's name
    average: tuple[float, float]


def published_for(id_set: str, ood_sets: Sequence[str]) -> list[Published]:
    """The published rows for this ID set whose every OOD set was measured too, in the order of `ood_sets`.

    Names match without regard to case, punctuation and a plural s.
    """
    rows = []
    for entry in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")):
        pairs = {_key(name): tuple(pair) for name, pair in entry["results"].items()}
        if _key(entry["id_set"]) == _key(id_set) and pairs.keys() <= {_key(name) for name in ood_sets}:
            results = {name: pairs[_key(name)] for name in ood_sets if _key(name) in pairs}
            note = f" ({entry['note']})" if "note" in entry else ""
            source = f"{entry['method']}: {entry['model']}; {entry['from']}{note}"
            rows.append(Published(entry["method"], source, entry["url"], results, tuple(entry["average"])))
    return rows


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("s")
