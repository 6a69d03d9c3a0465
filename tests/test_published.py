"""Published figures: where they are shown, and what each must have."""

import numpy as np

from clipn.report.published import published_for

MAIN_SETS = ["SUN", "iNaturalist", "places", "Texture"]


def test_published_figures_are_for_their_sets_alone():
    found = {one.method: one for one in published_for("imagenet-1k", [*MAIN_SETS, "NINCO"])}
    assert {"CTW", "ATD", "MCM", "NegLabel"} <= found.keys()
    assert list(found["ATD"].figures) == MAIN_SETS, "in this run's order and names"
    assert found["ATD"].figures["iNaturalist"] == (96.20, 19.11) and found["ATD"].average == (93.45, 29.46)
    assert published_for("ImageNet-100", MAIN_SETS) == [] and published_for("ImageNet-1K", MAIN_SETS[:3]) == []


def test_published_figures_are_plausible_and_have_sources():
    for one in published_for("ImageNet-1K", MAIN_SETS):
        assert one.url.startswith("https://") and one.source and one.model
        aurocs, fprs = zip(*one.figures.values(), strict=True)
        assert all(50 < auroc <= 100 for auroc in aurocs) and all(0 <= fpr < 100 for fpr in fprs)
        assert np.allclose((np.mean(aurocs), np.mean(fprs)), one.average, atol=0.0151), one.method
