"""Figures of unusual scores, sets and names."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from helpers import write_images
from PIL import Image

from clipn.data.image_sets import open_image_set
from clipn.report.figures import draw_bars, draw_histograms, draw_roc, draw_samples


def test_constant_scores_can_be_drawn(tmp_path):
    scores = {"cats": {"MSP": np.full(5, 0.3)}, "dogs": {"MSP": np.full(2, 0.3)}}
    draw_histograms(scores, "cats", tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_scores_that_hardly_differ_can_be_drawn(tmp_path):
    """MSP of a sure model: float32 numbers next to one."""
    near = np.nextafter(np.ones(50, np.float32), np.float32(0))
    near[::2] = 1
    draw_histograms({"cats": {"MSP": near}, "dogs": {"MSP": near[:7]}}, "cats", tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_figures_of_many_sets_and_methods_with_any_name(tmp_path):
    """Names with formula marks, a leading underscore, letters that the font lacks: no error, no warning."""
    rng = np.random.default_rng(0)
    names, methods = ["cats", "_a", "x$y$", "日本語", *(f"set {n}" for n in range(8))], [f"$m_{n}" for n in range(11)]
    scores = {name: {method: rng.random(3) for method in methods} for name in names}
    results = pd.DataFrame(
        [{"ood_set": name, "method": method, "AUROC": 0.5, "FPR95": 0.5} for name in names[1:] for method in methods]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_histograms(scores, "cats", tmp_path / "h.png")
        draw_roc(scores, "cats", tmp_path / "r.png")
        draw_bars(results, tmp_path / "b.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in "hrb")


def test_samples_show_the_same_pictures_each_time(tmp_path):
    cats, dogs = (
        write_images(tmp_path / name, *(f"a_$/{n}.png" for n in range(n))) for name, n in (("c", 16), ("d", 1))
    )
    sets = [open_image_set("cats", cats), open_image_set("größe_$1 and more", dogs)]
    draw_samples(sets, tmp_path / "a.png")
    draw_samples(sets, tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_bars_show_means_and_deviations(tmp_path, monkeypatch):
    """Two runs of two sets: 90 and 70, then 80 and 100; each run's average is 85."""
    drawn, bar = [], plt.Axes.bar

    def recorded(axis, places, heights, *more, yerr=None, **style):
        drawn.append(
            (style["label"], [round(h, 2) for h in heights], None if yerr is None else [round(e, 2) for e in yerr])
        )
        return bar(axis, places, heights, *more, yerr=yerr, **style)

    monkeypatch.setattr(plt.Axes, "bar", recorded)
    aurocs = {"dogs": (0.9, 0.7), "average": (0.8, 1.0)}
    rows = [
        {"ood_set": name, "method": "MSP", "AUROC": values[seed], "FPR95": 0.5}
        for seed in (0, 1)
        for name, values in aurocs.items()
    ]
    draw_bars(pd.DataFrame(rows), tmp_path / "two.png")
    draw_bars(pd.DataFrame(rows[:2]), tmp_path / "one.png")
    assert drawn[0] == ("MSP", [80.0, 90.0, 85.0], [14.14, 14.14, 0.0])
    assert drawn[2] == ("MSP", [90.0, 80.0, 85.0], None)
