"""The published results: which are shown for which image sets, and what each row must have."""

import numpy as np

from clipn.report.published import published_for

MAIN_SETS = ["SUN", "iNaturalist", "places", "Texture"]


def test_published_results_are_for_their_sets_alone():
    rows = {row.method: row for row in published_for("imagenet-1k", [*MAIN_SETS, "NINCO"])}
    assert {"CTW", "ATD", "MCM", "NegLabel"} <= rows.keys()
    assert list(rows["ATD"].results) == MAIN_SETS, "in the order and names of the measured sets"
    assert rows["ATD"].results["iNaturalist"] == (96.20, 19.11) and rows["ATD"].average == (93.45, 29.46)
    assert published_for("ImageNet-100", MAIN_SETS) == [] and published_for("ImageNet-1K", MAIN_SETS[:3]) == []


def test_published_results_are_plausible_and_have_sources():
    rows = published_for("ImageNet-1K", MAIN_SETS)
    for row in rows:
        assert row.url.startswith("https://") and row.source.startswith(f"{row.method}: ViT-B-16, ")
        aurocs, fprs = zip(*row.results.values(), strict=True)
        assert all(50 < auroc <= 100 for auroc in aurocs) and all(0 <= fpr < 100 for fpr in fprs)
        assert np.allclose((np.mean(aurocs), np.mean(fprs)), row.average, atol=0.0151), row.method
    own = {row.method for row in rows if "README of the authors' code" in row.source}
    assert own == {"CTW", "ATD"} and all("quoted" in row.source for row in rows if row.method not in own), "second-hand"
