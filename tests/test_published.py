"""The published results: which are shown for which image sets, and what each row must have."""

import re

import numpy as np

from clipn.report.published import published_for
from clipn.report.tables import published_table

MAIN_SETS = ["SUN", "iNaturalist", "places", "Texture"]


def test_published_results_are_for_their_sets_alone():
    rows = {row.method: row for row in published_for("imagenet-1k", [*MAIN_SETS, "NINCO"])}
    assert {"CTW", "ATD", "MCM", "NegLabel"} <= rows.keys()
    assert list(rows["ATD"].results) == MAIN_SETS, "in the order and names of the measured sets"
    assert rows["ATD"].results["iNaturalist"] == (96.20, 19.11) and rows["ATD"].average == (93.45, 29.46)
    assert published_for("ImageNet-100", MAIN_SETS) == [] and published_for("ImageNet-1K", MAIN_SETS[:3]) == []


def test_published_results_are_plausible_and_have_sources():
    rows = published_for("ImageNet-1K", MAIN_SETS)
    assert len({row.method for row in rows}) == len(rows), "the method's name is all that the table shows of a row"
    for row in rows:
        backbone = re.search(r"ViT-\w-\d+", f"{row.method} ViT-B-16")[0]  # ViT-B-16 unless the method's name has one
        assert row.url.startswith("https://") and re.match(rf"{re.escape(row.method)}: {backbone}[,;] ", row.source)
        aurocs, fprs = np.array([*row.results.values(), row.average]).T
        assert not (aurocs <= 50).any() and not (aurocs > 100).any(), "NaN, a figure not found, is neither"
        assert not (fprs < 0).any() and not (fprs >= 100).any()
        for *values, average in (aurocs, fprs):
            assert np.isnan(values).any() or np.isclose(np.mean(values), average, rtol=0, atol=0.0151), row.method
    own = {row.method for row in rows if "README of the authors' code" in row.source}
    assert own == {"CTW", "ATD"} and all("table" in row.source for row in rows)
    others = [row.source for row in rows if row.method not in own]
    assert all("quoted" in source or "measured by the authors of" in source for source in others), "second-hand"


def test_a_figure_that_is_not_known_is_a_dash():
    rows = published_for("ImageNet-1K", MAIN_SETS)
    table = published_table(rows, MAIN_SETS)
    csp = table[table[("", "method")] == "CSP"].iloc[0]
    assert csp["SUN"].to_dict() == {"AUROC": "–", "FPR95": "13.66"} and csp["average"]["AUROC"] == "95.76"
    assert not table.isin(["nan"]).any(axis=None)
