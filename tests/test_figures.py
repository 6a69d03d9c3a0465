"""What the figures show: shares, curves, bars and samples, for any names and scores."""

import importlib
import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from helpers import set_scores, write_images
from matplotlib.colors import to_rgb
from PIL import Image

from clipn.data.image_sets import open_image_set
from clipn.methods.tokens import KeptPlaces
from clipn.metrics import ood_metrics
from clipn.report import figures
from clipn.report.figures import draw_bars, draw_histograms, draw_places, draw_roc, draw_samples, save_figure

SIZES, MEANS = {"cats": 50, "dogs": 30, "owls": 20}, {"cats": 2, "dogs": 0, "owls": -1}


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    return {name: {method: rng.normal(MEANS[name], 1, size) for method in "AB"} for name, size in SIZES.items()}


def shares(outline) -> np.ndarray:
    """The heights of a histogram's 40 bins."""
    return outline.get_xy()[1:81:2, 1]


def colours(artists) -> list[tuple]:
    return [to_rgb(a.get_color() if hasattr(a, "get_color") else a.get_edgecolor()) for a in artists]


def test_the_matplotlib_backend_stays_as_it_was(scores, tmp_path):
    before = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        imported = importlib.reload(figures)
        imported.save_figure(imported.draw_histograms(scores), tmp_path / "histograms.png")
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
    assert Image.open(tmp_path / "histograms.png").size == (1008, 360), "8.4 x 3 inches at 120 dots per inch"


def test_histograms_of_probabilities_are_of_log_odds():
    sets = {
        name: {"ATD": np.array([value, 2.0]), "MSP": np.full(2, 3.4e38)} for name, value in (("id", 9), ("ood", -9))
    }
    assert [axis.get_title() for axis in draw_histograms(sets).axes] == ["ATD, log odds", "MSP, log odds"]


def test_histograms_show_shares_of_each_set(scores):
    figure = draw_histograms(scores)
    assert [axis.get_title() for axis in figure.axes] == ["A", "B"]
    for axis, method in zip(figure.axes, "AB", strict=True):
        assert [outline.get_label() for outline in axis.patches] == ["cats (ID)", "dogs", "owls"]
        edges = np.linspace(*np.percentile(np.concatenate([s[method] for s in scores.values()]), (0, 100)), 41)
        for name, outline in zip(scores, axis.patches, strict=True):
            assert shares(outline).sum() == pytest.approx(1)
            assert shares(outline) == pytest.approx(np.histogram(scores[name][method], edges)[0] / SIZES[name])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cats (ID)", "dogs", "owls"]


@pytest.mark.parametrize("low", [0.3, np.nextafter(np.float32(0.3), np.float32(0)), 0.0])
def test_equal_or_nearly_equal_scores_are_one_peak(low):
    high = np.float32(low and 0.3)
    sets = {"cats": {"MSP": np.array([low, high, high], np.float32)}, "dogs": {"MSP": np.array([high])}}
    for outline in draw_histograms(sets).axes[0].patches:
        assert shares(outline).sum() == pytest.approx(1) and np.ptp(np.flatnonzero(shares(outline))) <= 1


def test_roc_curves_state_their_auroc(scores):
    figure = draw_roc(scores)
    assert [axis.get_title() for axis in figure.axes] == ["A", "B"]
    for axis, method in zip(figure.axes, "AB", strict=True):
        curves = axis.lines[:2]
        for name, curve in zip(("dogs", "owls"), curves, strict=True):
            auroc = ood_metrics(scores["cats"][method], scores[name][method])["AUROC"]
            fpr, tpr = curve.get_data()
            assert curve.get_label() == f"{name} {100 * auroc:.1f}"
            assert (np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2).sum() == pytest.approx(auroc)
            assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert len(axis.get_legend().get_texts()) == 2, "the two guide lines have no label"
        assert colours(curves) == colours(draw_histograms(scores).axes[0].patches[1:])


def test_bars_show_means_and_deviations_in_percent():
    """Two runs of two sets: 90 and 70, then 80 and 100; each run's average is 85."""
    aurocs = {"dogs": (0.9, 0.7), "owls": (0.8, 1.0)}
    rows = [
        {"ood_set": name, "method": method, "AUROC": values[run], "FPR95": 0.5}
        for run in (0, 1)
        for name, values in aurocs.items()
        for method in ("Z", "A")
    ]
    auroc, fpr95 = draw_bars(pd.DataFrame(rows)).axes
    assert [bars.get_label() for bars in auroc.containers if hasattr(bars, "patches")] == ["Z", "A"]
    assert [bar.get_height() for bar in auroc.patches[:3]] == pytest.approx([80, 90, 85])
    assert [bar.get_height() for bar in fpr95.patches] == pytest.approx([50] * 6)
    assert "AUROC" in auroc.get_ylabel() and "lower is better" in fpr95.get_ylabel()
    assert [label.get_text() for label in fpr95.get_xticklabels()] == ["dogs", "owls", "average"]
    (error_lines,) = auroc.containers[0].lines[2]
    lengths = [np.ptp(segment[:, 1]) / 2 for segment in error_lines.get_segments()]
    assert lengths == pytest.approx([np.sqrt(200), np.sqrt(200), 0], abs=1e-6)
    assert not draw_bars(pd.DataFrame(rows[:4])).axes[0].collections, "one run has no deviation"


def test_any_name_and_many_sets_can_be_drawn(tmp_path):
    """Formula marks, a leading underscore, letters that the font lacks, a set named average: no error, no warning."""
    rng, methods = np.random.default_rng(0), ["$m_1", "_m", "a^b$"]
    names = ["cats", "_a", "x$y$", "日本語", "average", *(f"set {n}" for n in range(7))]
    sets = {name: {method: rng.random(3) for method in methods} for name in names}
    rows = [{"ood_set": name, "method": m, "AUROC": 0.5, "FPR95": 0.5} for name in names[1:] for m in methods]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [draw_histograms(sets), draw_roc(sets), draw_bars(pd.DataFrame(rows))]
        for number, figure in enumerate(drawn):
            save_figure(figure, tmp_path / f"{number}.png")
    assert [len(figure.axes) for figure in drawn] == [3, 3, 2]
    id_area, *outlines = drawn[0].axes[0].patches
    assert to_rgb(id_area.get_facecolor()) not in colours(outlines), "no OOD set has the colour of the ID set"
    assert len(drawn[0].legends[0].get_texts()) == 12 and len(drawn[2].legends[0].get_texts()) == 3
    assert len(drawn[1].axes[0].get_legend().get_texts()) == 11, "no curve is hidden by its name"


def test_samples_are_drawn_by_seed(tmp_path):
    cats = write_images(tmp_path / "c", *(f"a_$/{n}.png" for n in range(16)))
    sets = [open_image_set("cats", cats)]
    sets.append(open_image_set("größe_$1 and a long name", write_images(tmp_path / "d", "a_$/1.png")))

    def red(seed: int) -> list[int]:
        """The red value of each image in the row of cats, which tells which image it is."""
        axes = draw_samples(sets, seed).axes
        assert [len(axis.images) for axis in axes] == [1] * 12 + [1] + [0] * 11
        assert axes[12].texts[0].get_text() == "größe_\\$1 and a…\n(OOD)" and axes[0].get_title() == "a \\$"
        return [int(axis.images[0].get_array()[0, 0, 0]) for axis in axes[:12]]

    first = red(0)
    assert len(set(first)) == 12 and first == red(0) != red(1)


def test_places_without_a_kept_token_are_grey(tmp_path):
    """Two images of 8 x 8 pixels in a grid of 2 x 2; the tagger sees 6 x 6 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(pixels).save(tmp_path / name)
    preprocess = {"size": 6, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"}
    preprocess["resize_mode"] = "squash"
    kept = np.array([[[False, True], [False, False]]]), np.ones((1, 2, 2), dtype=bool)
    sets = [
        replace(set_scores(open_image_set(name, tmp_path / name), {}), places=KeptPlaces(places, tagged, preprocess))
        for name, places, tagged in zip("ab", kept, (np.array([True]), np.array([False])), strict=True)
    ]
    axes = draw_places(sets).axes
    greyed, picture = (np.asarray(axis.images[0].get_array()) for axis in (axes[0], axes[12]))
    expected = np.asarray(Image.fromarray(pixels).resize((6, 6), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(picture, expected, atol=0.01)
    np.testing.assert_allclose(greyed[:3, 3:], picture[:3, 3:])
    for faint, strong in ((greyed[:, :3], picture[:, :3]), (greyed[3:], picture[3:])):
        np.testing.assert_allclose(faint, 0.45 + 0.25 * strong, atol=1e-6)
    notes = [[text.get_text() for text in axis.texts] for axis in (axes[0], axes[12])]
    assert "no tag" not in notes[0] and "no tag" in notes[1]
