"""Figures: histograms and ROC curves of scores, bars of the main table, samples of the image sets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from sklearn.metrics import auc, roc_curve

from clipn.data.image_sets import ImageSet
from clipn.data.images import open_image
from clipn.report.tables import METRICS, run_number

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

Scores = dict[str, dict[str, np.ndarray]]  # by set and method

_SAMPLES = 12  # pictures of each set in samples.png
_DPI = 120


def draw_histograms(scores: Scores, id_name: str, path: Path) -> None:
    """One panel per method: the scores of the ID set (filled) and of each OOD set (lines)."""
    figure, panels = _panels(list(scores[id_name]))
    colours = _colours(scores, id_name)
    for method, axis in panels.items():
        bins = _bins(np.concatenate([s[method] for s in scores.values()]))
        for name, by_method in scores.items():
            inside = name == id_name
            style = {"histtype": "stepfilled", "alpha": 0.4} if inside else {"histtype": "step", "linewidth": 1.5}
            label = _plain(f"{name} (ID)" if inside else name)
            weights = np.full(len(by_method[method]), 1 / len(by_method[method]))
            axis.hist(by_method[method], bins=bins, weights=weights, label=label, color=colours[name], **style)
        axis.set_title(_plain(method))
        axis.locator_params(axis="x", nbins=5)
    figure.supxlabel("score (higher: in-distribution)", fontsize="medium")
    figure.supylabel("share of images", fontsize="medium")
    _legend(figure, next(iter(panels.values())))
    _save(figure, path)


def draw_roc(scores: Scores, id_name: str, path: Path) -> None:
    """One panel per method: the ROC curve of each OOD set, ID as the positive class, and where FPR95 is read."""
    figure, panels = _panels(list(scores[id_name]), (3.7, 3.6))
    colours = _colours(scores, id_name)
    for method, axis in panels.items():
        inside = scores[id_name][method]
        for name, by_method in scores.items():
            if name == id_name:
                continue
            is_id = np.repeat([1, 0], [len(inside), len(by_method[method])])
            fpr, tpr, _ = roc_curve(is_id, np.concatenate([inside, by_method[method]]))
            axis.plot(fpr, tpr, color=colours[name], label=_plain(f"{_short(name, 16)} {100 * auc(fpr, tpr):.1f}"))
        axis.axhline(0.95, color="grey", linewidth=0.8, linestyle=":")
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=_plain(method), xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axis.legend(fontsize="x-small", loc="lower right", title="AUROC", title_fontsize="x-small")
    figure.supxlabel("share of OOD images let through", fontsize="medium")
    figure.supylabel("share of ID images kept (dotted: 95 %)", fontsize="medium")
    _save(figure, path)


def draw_bars(results: pd.DataFrame, path: Path) -> None:
    """The main table as bars: a panel per metric, a group per OOD set and their average, a bar per method."""
    methods, ood_sets = list(results["method"].unique()), list(results["ood_set"].unique())
    groups = [*ood_sets, "average"]
    bars = len(groups) * (len(methods) + 1)
    size = (np.clip(0.16 * bars, 8, 14), 6.5)
    figure, axes = plt.subplots(len(METRICS), 1, figsize=size, sharex=True, layout="constrained")
    colours = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20").colors
    for metric, axis in zip(METRICS, axes, strict=True):
        for number, method in enumerate(methods):
            chosen = results[results["method"] == method]
            parts = [*(chosen[chosen["ood_set"] == name] for name in ood_sets), chosen]
            runs = [100 * part.groupby(run_number(part))[metric].mean() for part in parts]
            places = np.arange(len(groups)) + (number - (len(methods) - 1) / 2) / (len(methods) + 1)
            deviations = [run.std() for run in runs] if len(runs[0]) > 1 else None
            axis.bar(
                places, [run.mean() for run in runs], 1 / (len(methods) + 1), yerr=deviations, label=_plain(method),
                color=colours[number % len(colours)], error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
            )  # fmt: skip
        better = "higher" if metric == "AUROC" else "lower"
        axis.set(ylabel=f"{metric}, % ({better} is better)", xlim=(-0.6, len(groups) - 0.4), ylim=(0, 105))
        axis.set_xticks(range(len(groups)), [_plain(_short(name, 18)) for name in groups])
        axis.axvline(len(groups) - 1.5, color="grey", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    if max(map(len, groups)) * len(groups) > 9 * size[0]:
        plt.setp(axes[-1].get_xticklabels(), rotation=25, ha="right", rotation_mode="anchor")
    _legend(figure, axes[0])
    _save(figure, path)


def draw_samples(image_sets: Sequence[ImageSet], path: Path, seed: int = 0) -> None:
    """A row of randomly drawn pictures of each set, with the class folder's name over it."""
    rng = np.random.default_rng(seed)
    shape = (len(image_sets), _SAMPLES)
    size = (1.1 * _SAMPLES + 1.6, 1.35 * len(image_sets))
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for number, (row, images) in enumerate(zip(axes, image_sets, strict=True)):
        chosen = rng.permutation(len(images))[:_SAMPLES]
        for axis in row:
            axis.axis("off")
        for axis, index in zip(row, chosen, strict=False):
            axis.imshow(open_image(images.paths[index]))
            if images.labels:
                name = _short(images.classes[images.labels[index]].replace("_", " "), 16)
                axis.set_title(_plain(name), fontsize=7, pad=2)
        name = _plain(f"{_short(images.name, 16)}\n({'OOD' if number else 'ID'})")
        row[0].text(-0.12, 0.5, name, transform=row[0].transAxes, ha="right", va="center")
    height = size[1]
    edges = {"top": 1 - 0.2 / height, "bottom": 0.04 / height, "left": 1.6 / size[0], "right": 0.995}
    figure.subplots_adjust(**edges, hspace=0.3, wspace=0.05)
    _save(figure, path)


def _panels(methods: Sequence[str], inches: tuple[float, float] = (4.2, 3.0)) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    columns = min(3, len(methods))
    lines = -(-len(methods) // columns)
    size = (inches[0] * columns, inches[1] * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in list(axes.flat)[len(methods) :]:
        axis.set_visible(False)
    return figure, dict(zip(methods, axes.flat, strict=False))


def _colours(scores: Scores, id_name: str) -> dict[str, tuple]:
    """Grey for the ID set; each OOD set has one colour in all figures."""
    palette = plt.get_cmap("tab10").colors
    palette = [colour for number, colour in enumerate(palette) if number != 7]  # the grey
    ood_sets = [name for name in scores if name != id_name]
    return {id_name: (0.5, 0.5, 0.5)} | {name: palette[n % len(palette)] for n, name in enumerate(ood_sets)}


def _legend(figure: plt.Figure, axis: plt.Axes) -> None:
    """One legend over all panels, in as many columns as its labels leave room for."""
    handles, labels = axis.get_legend_handles_labels()
    room = int(figure.get_figwidth() / (0.085 * max(map(len, labels)) + 0.5))  # inches
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, min(room, len(labels))), frameon=False)


def _save(figure: plt.Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font lacks: boxes
        figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _bins(values: np.ndarray, count: int = 40) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-5 * max(abs(low), abs(high), 1e-5):  # all but equal, as saturated scores are
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, count + 1)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula, and no label to hide."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
