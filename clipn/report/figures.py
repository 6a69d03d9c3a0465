"""Figures: histograms and ROC curves of the scores, bars of the main table, samples of the image sets, kept tokens.

Each function returns a matplotlib Figure without pyplot, so that the caller's backend stays as it is.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import auc, roc_curve

from clipn.data.image_sets import ImageSet
from clipn.data.images import open_image, val_transform
from clipn.evaluation.adversarial import AdversarialSet
from clipn.evaluation.results import SetScores
from clipn.methods.registry import BY_LOG_ODDS
from clipn.report.tables import METRICS, run_number

Scores = dict[str, dict[str, np.ndarray]]  # by set and method, the ID set first

_ADVERSARIAL = 8  # images of each set in `draw_adversarial`
_LEAST_SPAN = 4  # points of AUROC in a panel of `draw_correlation`, so that rounding does not look like a trend
_GREY, _GREYED = 0.6, 0.75  # what `draw_places` mixes into a picture, and its share: neither black nor white hides it
_SAMPLES = 12  # images of each set in `draw_samples`
_ID_COLOUR = "tab:gray"
_OOD_COLOURS = [colour for colour in matplotlib.colors.TABLEAU_COLORS if colour != _ID_COLOUR]
_THIN = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}


def draw_histograms(scores: Scores) -> Figure:
    """One panel per method: the scores (log odds of probabilities) of the ID set (filled) and each OOD set (lines)."""
    id_set, *ood_sets = scores
    figure, panels = _panels(list(scores[id_set]), 4.2, 3.0)
    for method, axis in panels:
        bins = _bins(np.concatenate([by_method[method] for by_method in scores.values()]))
        styles = [
            (id_set, {"histtype": "stepfilled", "alpha": 0.4, "color": _ID_COLOUR, "label": _label(f"{id_set} (ID)")})
        ]
        for name, colour in _colours(ood_sets):
            styles.append((name, {"histtype": "step", "linewidth": 1.5, "color": colour, "label": _label(name)}))
        for name, style in styles:
            values = scores[name][method]
            axis.hist(values, bins, weights=np.full(len(values), 1 / len(values)), **style)
        axis.locator_params(axis="x", nbins=5)
        if method in BY_LOG_ODDS:
            axis.set_title(f"{method}, log odds")
    figure.supxlabel("score (higher: in-distribution)", fontsize="medium")
    figure.supylabel("share of images", fontsize="medium")
    _add_legend(figure)
    return figure


def draw_roc(scores: Scores) -> Figure:
    """One panel per method: the ROC curve of each OOD set, with ID as the positive class."""
    id_set, *ood_sets = scores
    figure, panels = _panels(list(scores[id_set]), 3.7, 3.6)
    for method, axis in panels:
        for name, colour in _colours(ood_sets):
            both = [scores[id_set][method], scores[name][method]]
            fpr, tpr, _ = roc_curve(np.repeat([1, 0], list(map(len, both))), np.concatenate(both))
            axis.plot(fpr, tpr, color=colour, label=_label(f"{_shorten(name, 16)} {100 * auc(fpr, tpr):.1f}"))
        axis.axhline(0.95, **_THIN)
        axis.plot([0, 1], [0, 1], **_THIN)
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axis.legend(fontsize="x-small", loc="lower right", title="AUROC", title_fontsize="x-small")
    figure.supxlabel("share of OOD images accepted (FPR)", fontsize="medium")
    figure.supylabel("share of ID images accepted (TPR; dotted: 95 %)", fontsize="medium")
    return figure


def draw_bars(results: pd.DataFrame) -> Figure:
    """The main table as bars: one panel per metric, a group per OOD set and their average, a bar per method."""
    results = results.assign(run=run_number(results))
    methods = list(results["method"].unique())
    groups = [*results.groupby("ood_set", sort=False), ("average", results)]
    names, step = [name for name, _ in groups], 1 / (len(methods) + 1)
    width = np.clip(0.16 * len(groups) / step, 8, 14)
    figure = Figure((width, 6.5), layout="constrained")
    colours = matplotlib.colormaps["tab10" if len(methods) <= 10 else "tab20"].colors
    axes = figure.subplots(len(METRICS), sharex=True)
    for metric, axis in zip(METRICS, axes, strict=True):
        runs = [100 * rows.pivot_table(metric, "run", "method") for _, rows in groups]
        for number, method in enumerate(methods):
            left = np.arange(len(groups)) + (number - (len(methods) - 1) / 2) * step
            style = {"color": colours[number % len(colours)], "error_kw": {"elinewidth": 0.8, "ecolor": "0.3"}}
            deviations = [run[method].std() for run in runs] if results["run"].any() else None
            axis.bar(left, [run[method].mean() for run in runs], step, yerr=deviations, label=_label(method), **style)
        better = "higher" if metric == "AUROC" else "lower"
        axis.set(ylabel=f"{metric}, % ({better} is better)", xlim=(-0.6, len(groups) - 0.4), ylim=(0, 105))
        axis.set_xticks(range(len(groups)), [_label(_shorten(name, 18)) for name in names])
        axis.axvline(len(groups) - 1.5, **_THIN)
        axis.spines[["top", "right"]].set_visible(False)
    if max(map(len, names)) * len(groups) > 9 * width:
        matplotlib.artist.setp(axis.get_xticklabels(), rotation=25, ha="right", rotation_mode="anchor")
    _add_legend(figure)
    return figure


def draw_correlation(points: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """A panel per OOD set and their average: ID accuracy against AUROC, a point per checkpoint, and the fitted line."""
    figure, panels = _panels(list(fits["ood_set"]), 3.6, 3.2)
    for (name, axis), (_, fit) in zip(panels, fits.iterrows(), strict=True):
        of_set = points[points["ood_set"] == name]
        x, y = 100 * of_set["id_accuracy"], 100 * of_set["AUROC"]
        axis.plot(x, y, "o", markersize=4, clip_on=False)  # whole at 100 %
        text = "no correlation"
        if np.isfinite(fit["r_squared"]):
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, fit["slope"] * ends + 100 * fit["intercept"], color="0.4", linewidth=1)
            text = f"R² = {fit['r_squared']:.2f}"
        axis.set_title(f"{_label(_shorten(name, 22))}: {text}", fontsize="medium")
        axis.margins(0.08)
        low, high = axis.get_ylim()
        spare = max(0, _LEAST_SPAN - (high - low)) / 2
        top = min(100, high + spare)
        axis.set_ylim(min(low - spare, top - _LEAST_SPAN), top)
    figure.supxlabel(f"ID accuracy of 20-NN, % ({len(x)} checkpoints)", fontsize="medium")
    figure.supylabel("AUROC of 1-NN, %", fontsize="medium")
    return figure


def draw_samples(image_sets: Sequence[ImageSet], seed: int = 0) -> Figure:
    """A row of randomly drawn images of each set, with the class folder's name above each image."""
    return _draw_rows(image_sets, seed, lambda row, index: (open_image(image_sets[row].paths[index]), ""))


def draw_places(set_scores: Sequence[SetScores], seed: int = 0) -> Figure:
    """The images of `draw_samples` as the tagger sees them; the places whose tokens are not kept are grey."""

    def show(row: int, index: int) -> tuple[np.ndarray, str]:
        (kept, tagged, preprocess), path = set_scores[row].places, set_scores[row].images.paths[index]
        mean, std = (torch.tensor(preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
        picture = (val_transform(preprocess)(open_image(path)) * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        rows, columns = (np.arange(size) * len(kept[index]) // size for size in picture.shape[:2])
        mask = kept[index][rows][:, columns, None]
        return np.where(mask, picture, (1 - _GREYED) * picture + _GREYED * _GREY), "" if tagged[index] else "no tag"

    return _draw_rows([of_set.images for of_set in set_scores], seed, show)


def _draw_rows(image_sets: Sequence[ImageSet], seed: int, show: Callable[[int, int], tuple[Any, str]]) -> Figure:
    """A row of randomly drawn images of each set. show: number of the set, and of its image -> image, note below it."""
    rng = np.random.default_rng(seed)
    width, height = 1.1 * _SAMPLES + 1.6, 1.35 * len(image_sets)
    figure = Figure((width, height))
    axes = figure.subplots(len(image_sets), _SAMPLES, squeeze=False)
    for number, (row, images) in enumerate(zip(axes, image_sets, strict=True)):
        for axis in row:
            axis.axis("off")
        for axis, index in zip(row, rng.permutation(len(images)), strict=False):
            image, note = show(number, index)
            axis.imshow(image)
            if note:
                axis.text(0.5, 0.02, note, transform=axis.transAxes, ha="center", va="bottom", fontsize=7)
            if images.labels:
                class_name = images.classes[images.labels[index]].replace("_", " ")
                axis.set_title(_label(_shorten(class_name, 16)), fontsize=7, pad=2)
        name = _label(f"{_shorten(images.name, 16)}\n({'OOD' if number else 'ID'})")
        row[0].text(-0.12, 0.5, name, transform=row[0].transAxes, ha="right", va="center")
    edges = {"top": 1 - 0.2 / height, "bottom": 0.04 / height, "left": 1.6 / width, "right": 0.995}
    figure.subplots_adjust(**edges, hspace=0.3, wspace=0.05)
    return figure


def draw_adversarial(sets: Sequence[AdversarialSet]) -> Figure:
    """Rows of each set: images, their changes times 10 around grey, adversarial images, and the ID targets."""
    titles = ("clean", "change × 10", "adversarial", "target (ID)")
    width, height = 1.1 * _ADVERSARIAL + 1.6, 1.15 * len(titles) * len(sets)
    figure = Figure((width, height))
    axes = figure.subplots(len(sets) * len(titles), _ADVERSARIAL, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for first, of in zip(range(0, len(axes), len(titles)), sets, strict=True):
        files = zip(*(of.versions[kind].paths for kind in ("clean", "float", "png")), of.targets, strict=True)
        for column, (clean, pixels, png, target) in zip(axes[first : first + len(titles)].T, files, strict=False):
            before, after = np.asarray(open_image(clean)) / 255, np.load(pixels).transpose(1, 2, 0)
            change = (0.5 + 10 * (after - before)).clip(0, 1)
            for axis, image in zip(column, (before, change, open_image(png), open_image(target)), strict=True):
                axis.imshow(image)
        for axis, title in zip(axes[first:, 0], titles, strict=False):
            text = _label(f"{_shorten(of.name, 16)}\n{title}")
            axis.text(-0.12, 0.5, text, transform=axis.transAxes, ha="right", va="center")
    edges = {"top": 1 - 0.05 / height, "bottom": 0.05 / height, "left": 1.6 / width, "right": 0.995}
    figure.subplots_adjust(**edges, hspace=0.06, wspace=0.05)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file. Letters that the font lacks become boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=120)


def _panels(names: Sequence[str], width: float, height: float) -> tuple[Figure, list[tuple[str, Axes]]]:
    """A figure, and each name with its titled panel of this size in inches, three in a row."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure((width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, n + 1, title=_label(name)) for n, name in enumerate(names)]
    return figure, list(zip(names, axes, strict=True))


def _colours(ood_sets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each OOD set with its colour, the same in all figures."""
    return ((name, _OOD_COLOURS[number % len(_OOD_COLOURS)]) for number, name in enumerate(ood_sets))


def _add_legend(figure: Figure) -> None:
    """One legend for all panels above the first, in as many columns as fit."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = int(figure.get_figwidth() / (0.085 * max(map(len, labels)) + 0.5))  # inches
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, min(columns, len(labels))), frameon=False)


def _bins(values: np.ndarray, count: int = 40) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-5 * max(abs(low), abs(high), 1e-5):  # nearly equal, as MSP's of a single class are
        half = 0.5 + 1e-3 * abs(low)
        low, high = low - half, high + half
    return np.linspace(low, high, count + 1)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _label(text: str) -> str:
    """Text in which matplotlib sees no formula ($) and no label to hide (leading _)."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
