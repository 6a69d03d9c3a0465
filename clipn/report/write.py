"""Results for people: tables (results.csv, results.md, results.tex), figures, and report.html with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from clipn.data.image_sets import ImageSet
from clipn.metrics import bootstrap_interval
from clipn.report.figures import draw_bars, draw_histograms, draw_roc, draw_samples
from clipn.report.html import figure, gallery, link, page, paragraph
from clipn.report.published import Published, published_for
from clipn.report.tables import (
    METRICS,
    PAPER_METRICS,
    Table,
    ablations_table,
    decisions_table,
    intervals_table,
    latex_table,
    percent,
    published_table,
    results_table,
    run_number,
)
from clipn.runtime.console import printable

if TYPE_CHECKING:
    from clipn.evaluation.results import SetScores

_FIGURES = {
    "bars": "The main table as bars",
    "histograms": "Scores of the ID set (filled) and of each OOD set (lines)",
    "roc": "ROC curves, ID as the positive class",
    "samples": "Samples of the image sets",
}


class Block(NamedTuple):
    """A table of the report, and what a reader needs beside it."""

    heading: str
    text: str
    table: Table
    sources: Sequence[Published] = ()


def write_report(
    folder: Path,
    results: pd.DataFrame,
    decisions: pd.DataFrame,
    found: dict[str, SetScores],
    class_names: Sequence[str],
    bootstrap: int = 0,
) -> None:
    """Write results.csv, .md and .tex, decisions.csv, figures/ and report.html into a run's folder.

    found: what one checkpoint says of each image set, the ID set first. bootstrap: how many draws the confidence
    intervals are made of (a table of their own, and intervals.csv); 0 leaves them out.
    """
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    results.to_csv(folder / "results.csv", index=False)
    decisions.to_csv(folder / "decisions.csv", index=False)
    blocks = _blocks(results, decisions)
    (folder / "intervals.csv").unlink(missing_ok=True)
    if bootstrap:
        intervals = bootstrap_intervals(found, bootstrap)
        intervals.to_csv(folder / "intervals.csv", index=False)
        blocks.append(_intervals_block(results, intervals, bootstrap))
    image_sets = [one.images for one in found.values()]
    pages = [*(_markdown(block) for block in blocks), _left_out(image_sets)]
    (folder / "results.md").write_text("\n".join(pages), encoding="utf-8")
    (folder / "results.tex").write_text(_latex(results), encoding="utf-8")
    scores, id_set = {name: one.scores for name, one in found.items()}, image_sets[0].name
    draw_bars(results, figures / "bars.png")
    draw_histograms(scores, id_set, figures / "histograms.png")
    draw_roc(scores, id_set, figures / "roc.png")
    draw_samples(image_sets, figures / "samples.png")
    html = _html(folder, blocks, results, found, class_names)
    (folder / "report.html").write_text(html, encoding="utf-8")


def bootstrap_intervals(found: dict[str, SetScores], draws: int, seed: int = 0) -> pd.DataFrame:
    """95 % intervals of every method and OOD set: id_set, ood_set, method, metric, low, high (fractions)."""
    inside, *outside = found.values()
    rows = [
        (inside.images.name, ood.images.name, method, metric, *bootstrap_interval(scores, others, metric, draws, seed))
        for ood in outside
        for method, scores in inside.scores.items()
        for others in [ood.scores[method]]
        for metric in METRICS
    ]
    return pd.DataFrame(rows, columns=["id_set", "ood_set", "method", "metric", "low", "high"])


def main_table(results: pd.DataFrame) -> str:
    """The papers' table in Markdown: a row per method; AUROC and FPR95 per OOD set, then their averages, in percent."""
    return results_table(results).markdown()


def decision_table(decisions: pd.DataFrame) -> str:
    """Markdown: the share of ID images kept, of each OOD set found, and of all these images judged rightly."""
    return decisions_table(decisions).markdown()


def ablation_table(results: pd.DataFrame) -> str:
    """Markdown: a row per `setting`; each method's averages over the OOD sets, and the ID accuracy."""
    return ablations_table(results).markdown()


def summary(results: pd.DataFrame) -> str:
    """What a terminal shows: the sentence and the table of results.md."""
    return f"{_title(results)}\n\n{main_table(results)}"


def _blocks(results: pd.DataFrame, decisions: pd.DataFrame) -> list[Block]:
    blocks = [Block("Results", _title(results), results_table(results))]
    published = _published(results)
    if published:
        text = "Reported by others, not measured here. AUROC and FPR95 in percent."
        table = published_table(published, list(published[0].figures))
        blocks.append(Block("Published figures", text, table, published))
    text, table = "Threshold-free decisions, in percent of the images.", decisions_table(decisions)
    if table.columns[-1][1].startswith("(C+1)"):
        text += " (C+1)-way: an ID image also needs its class."
    return [*blocks, Block("Decisions", text, table)]


def _published(results: pd.DataFrame) -> list[Published]:
    return published_for(str(results["id_set"].iloc[0]), list(results["ood_set"].unique()))


def _intervals_block(results: pd.DataFrame, intervals: pd.DataFrame, draws: int) -> Block:
    first = " of the first checkpoint" if results.groupby(run_number(results)).ngroups > 1 else ""
    text = f"95 % confidence intervals{first}, in percent: {draws} bootstrap draws of the images."
    return Block("Confidence intervals", text, intervals_table(intervals))


def _markdown(block: Block) -> str:
    sources = [f"- {one.method}: {one.about()}, {one.url}" for one in block.sources]
    return "\n".join([f"{block.text}\n", block.table.markdown(), *sources, *([""] if sources else [])])


def _latex(results: pd.DataFrame) -> str:
    """The measured rows, and others' in a block of their own, as the papers print them."""
    known = bool(results["id_accuracy"].notna().all())
    published = _published(results)
    theirs = published_table(published, list(results["ood_set"].unique()), PAPER_METRICS, known)
    notes = [(f"{one.method}: {one.about()}", one.url) for one in published]
    return latex_table(results_table(results, PAPER_METRICS, known), _title(results), theirs, notes)


def _html(
    folder: Path,
    blocks: Sequence[Block],
    results: pd.DataFrame,
    found: dict[str, SetScores],
    class_names: Sequence[str],
) -> str:
    sections = []
    for block in blocks:
        body = paragraph(block.text) + block.table.html()
        if block.sources:
            sources = [paragraph(f"{one.method}: {one.about()}") + link(one.url) for one in block.sources]
            body = f'<div class="published">{body}<ul><li>{"</li><li>".join(sources)}</li></ul></div>'
        sections.append((block.heading, body))
    image_sets = [one.images for one in found.values()]
    sections.append(("Images left out", "".join(paragraph(line) for line in _left_out(image_sets).split("\n") if line)))
    first = "Histograms, ROC curves and mistakes are those of the first checkpoint. "
    first = paragraph(first) if results.groupby(run_number(results)).ngroups > 1 else ""
    drawn = [figure(folder / "figures" / f"{name}.png", caption) for name, caption in _FIGURES.items()]
    sections.append(("Figures", first + "".join(drawn)))
    methods = list(results["method"].unique())
    method = "ATD" if "ATD" in methods else methods[-1]
    sections.append((f"Worst mistakes of {method}", gallery(found, results, class_names, method)))
    return page(f"CLIPN report: {folder}", sections)


def _left_out(image_sets: Sequence[ImageSet]) -> str:
    """A paragraph that names the unreadable images, or nothing."""
    lost = [(images, path) for images in image_sets for path in images.left_out]
    if not lost:
        return ""
    counts = ", ".join(f"{len(i.left_out)} of {len(i) + len(i.left_out)} in {i.name}" for i in image_sets if i.left_out)
    return "\n".join(
        [f"Unreadable images were left out: {counts}.\n", *(f"- {printable(path)}" for _, path in lost), ""]
    )


def _title(results: pd.DataFrame) -> str:
    runs = results.groupby(run_number(results))
    count = runs.ngroups
    many = f"; mean ± standard deviation over {count} checkpoints" if count > 1 else ""
    accuracy = runs["id_accuracy"].first()
    known = f", ID accuracy {percent(accuracy)}" if accuracy.notna().all() else ""
    return f"ID: {results['id_set'].iloc[0]}{known}. AUROC (higher is better) and FPR95 (lower) in percent{many}."
