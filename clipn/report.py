"""Results for people: tables (results.csv, results.md) and figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from .image_sets import ImageSet
from .images import open_image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

log = logging.getLogger(__name__)

_SAMPLES = 12  # pictures of each set in figures/samples.png


def write_report(
    folder: Path,
    results: pd.DataFrame,
    decisions: pd.DataFrame,
    image_sets: Sequence[ImageSet],
    scores: dict[str, dict[str, np.ndarray]],
) -> None:
    """Write results.csv, decisions.csv, results.md and figures/ into a run's folder.

    image_sets: the ID set first. scores: by set and method, of one checkpoint.
    """
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    results.to_csv(folder / "results.csv", index=False)
    decisions.to_csv(folder / "decisions.csv", index=False)
    pages = [_title(results), main_table(results), _DECISIONS_TITLE, decision_table(decisions), _left_out(image_sets)]
    (folder / "results.md").write_text("\n".join(pages), encoding="utf-8")
    draw_histograms(scores, image_sets[0].name, figures / "histograms.png")
    draw_samples(image_sets, figures / "samples.png")


def main_table(results: pd.DataFrame) -> str:
    """The papers' table in Markdown: a row per method; AUROC and FPR95 per OOD set, then their averages, in percent."""
    ood_sets = list(results["ood_set"].unique())
    header = ["method", *(f"{name} {metric}" for name in [*ood_sets, "average"] for metric in ("AUROC", "FPR95"))]
    rows = []
    for method, group in results.groupby("method", sort=False):
        row = [method]
        for name in [*ood_sets, None]:
            chosen = group if name is None else group[group["ood_set"] == name]
            runs = chosen.groupby(_run_number(chosen))  # a run's average over sets comes before the mean over runs
            row += [_percent(runs[metric].mean()) for metric in ("AUROC", "FPR95")]
        rows.append(row)
    return _markdown(header, rows)


def decision_table(decisions: pd.DataFrame) -> str:
    """Markdown: the share of ID images kept, of each OOD set found, and of all these images judged rightly."""
    ood_sets = list(decisions["ood_set"].unique())
    rows = []
    for name, group in decisions.groupby("decision", sort=False):
        runs = group.groupby(_run_number(group))
        found = [_percent(group[group["ood_set"] == ood]["ood_found"]) for ood in ood_sets]
        rows.append([name, _percent(runs["id_kept"].mean()), *found, _percent(runs["accuracy"].mean())])
    return _markdown(["decision", "ID kept", *(f"{ood} found" for ood in ood_sets), "average accuracy"], rows)


def summary(results: pd.DataFrame) -> str:
    """What a terminal shows: the sentence and the table of results.md."""
    return f"{_title(results)}\n{main_table(results)}"


def _left_out(image_sets: Sequence[ImageSet]) -> str:
    """A paragraph that names the unreadable images, or nothing."""
    lost = [(images, path) for images in image_sets for path in images.left_out]
    if not lost:
        return ""
    counts = ", ".join(f"{len(i.left_out)} of {len(i) + len(i.left_out)} in {i.name}" for i in image_sets if i.left_out)
    return "\n".join([f"\nUnreadable images were left out: {counts}.\n", *(f"- {path}" for _, path in lost), ""])


def draw_histograms(scores: dict[str, dict[str, np.ndarray]], id_name: str, path: Path) -> None:
    """One panel per method: the scores of the ID set (filled) and of each OOD set (lines)."""
    methods = list(scores[id_name])
    columns = min(3, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3 * lines), squeeze=False, layout="constrained")
    for axis, method in zip(axes.flat, methods, strict=False):
        bins = _bins(np.concatenate([s[method] for s in scores.values()]))
        for name, by_method in scores.items():
            inside = name == id_name
            style = {"histtype": "stepfilled", "alpha": 0.35} if inside else {"histtype": "step", "linewidth": 1.5}
            label = f"{name} (ID)" if inside else name
            weights = np.full(len(by_method[method]), 1 / len(by_method[method]))
            axis.hist(by_method[method], bins=bins, weights=weights, label=label, **style)
        axis.set_title(method)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("score (higher: in-distribution)")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of images")
    for axis in list(axes.flat)[len(methods) :]:
        axis.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_samples(image_sets: Sequence[ImageSet], path: Path, seed: int = 0) -> None:
    """A row of randomly drawn pictures of each set, with the class folder's name under it."""
    rng = np.random.default_rng(seed)
    shape = (len(image_sets), _SAMPLES)
    figure, axes = plt.subplots(*shape, figsize=(1.1 * _SAMPLES, 1.35 * len(image_sets)), squeeze=False)
    for number, (row, images) in enumerate(zip(axes, image_sets, strict=True)):
        chosen = rng.permutation(len(images))[:_SAMPLES]
        for axis in row:
            axis.axis("off")
        for axis, index in zip(row, chosen, strict=False):
            axis.imshow(open_image(images.paths[index]))
            if images.labels:
                axis.set_title(images.classes[images.labels[index]].replace("_", " "), fontsize=7, pad=2)
        kind = "ID" if number == 0 else "OOD"
        row[0].text(-0.15, 0.5, f"{images.name}\n({kind})", transform=row[0].transAxes, ha="right", va="center")
    figure.subplots_adjust(left=0.1, right=0.995, top=0.95, bottom=0.01, hspace=0.3, wspace=0.05)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bins(values: np.ndarray, count: int = 40) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-5 * max(abs(low), abs(high), 1e-5):  # all but equal, as saturated scores are
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, count + 1)


_DECISIONS_TITLE = "\nThreshold-free decisions, in percent of the images.\n"


def _title(results: pd.DataFrame) -> str:
    runs = results.groupby(_run_number(results))
    count = runs.ngroups
    many = f"; mean ± standard deviation over {count} checkpoints" if count > 1 else ""
    accuracy = runs["id_accuracy"].first()
    known = f", ID accuracy {_percent(accuracy)}" if accuracy.notna().all() else ""
    return f"ID: {results['id_set'].iloc[0]}{known}. AUROC (higher is better) and FPR95 (lower) in percent{many}.\n"


def _run_number(rows: pd.DataFrame) -> pd.Series:
    """Which checkpoint a row is of: rows of the same sets and method follow each other in the order of checkpoints."""
    keys = [key for key in ("ood_set", "method", "decision") if key in rows]
    return rows.groupby(keys).cumcount()


def _percent(values: pd.Series) -> str:
    values = 100 * values
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )
