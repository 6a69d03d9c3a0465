"""The files of a report: tables (results.csv, .md, .tex), figures, and report.html, which contains all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd

from clipn.data.image_sets import ImageSet
from clipn.evaluation.adversarial import VERSIONS, AdversarialSet
from clipn.evaluation.results import Evaluation, SetScores
from clipn.methods.registry import BY_LOG_ODDS
from clipn.metrics import bootstrap_interval
from clipn.report import tables
from clipn.report.figures import (
    draw_adversarial,
    draw_bars,
    draw_correlation,
    draw_histograms,
    draw_places,
    draw_roc,
    draw_samples,
    save_figure,
)
from clipn.report.html import figure_uri, thumbnail_uri, worst_mistakes
from clipn.report.published import Published, published_for
from clipn.runtime.console import printable

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name == "report.html.j2",
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
for _filter in (tables.markdown, tables.column_groups, printable, thumbnail_uri, worst_mistakes):
    _TEMPLATES.filters[_filter.__name__] = _filter


class Block(NamedTuple):
    """A part of the report: a text, a table, and a list of texts, each with an address or an empty string."""

    heading: str
    text: str
    table: pd.DataFrame | None = None
    items: Sequence[tuple[str, str]] = ()


def write_report(folder: Path, evaluation: Evaluation, bootstrap: int = 0) -> None:
    """Write results.csv, .md and .tex, decisions.csv, figures/ and report.html into a run's folder.

    bootstrap: the number of bootstrap draws for confidence intervals (a table and intervals.csv); 0 leaves them out.
    """
    results, decisions, set_scores = evaluation.results, evaluation.decisions, evaluation.set_scores
    several_checkpoints = bool(tables.run_number(results).any())
    image_sets = [of_set.images for of_set in set_scores.values()]
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    results.to_csv(folder / "results.csv", index=False)
    decisions.to_csv(folder / "decisions.csv", index=False)
    published = published_for(str(results["id_set"].iloc[0]), list(results["ood_set"].unique()))
    blocks = [Block("Results", _title(results), tables.results_table(results))]
    blocks += [*_published_block(published), _decisions_block(decisions)]
    (folder / "intervals.csv").unlink(missing_ok=True)
    if bootstrap:
        intervals = bootstrap_intervals(set_scores, bootstrap)
        intervals.to_csv(folder / "intervals.csv", index=False)
        first = " of the first checkpoint" if several_checkpoints else ""
        text = f"95 % confidence intervals{first}, in percent: {bootstrap} bootstrap draws of the images."
        blocks.append(Block("Confidence intervals", text, tables.intervals_table(intervals)))
    blocks += _left_out_block(image_sets)
    _write(folder / "results.md", blocks=blocks)
    (folder / "results.tex").write_text(_latex(results, published), encoding="utf-8")
    scores = {name: of_set.scores for name, of_set in set_scores.items()}
    figures = {
        "bars": ("The main table as bars", draw_bars(results)),
        "histograms": ("Scores of the ID set (filled) and of each OOD set (lines)", draw_histograms(scores)),
        "roc": ("ROC curves, ID as the positive class", draw_roc(scores)),
        "samples": ("Samples of the image sets", draw_samples(image_sets)),
    }
    (folder / "figures/tokens.png").unlink(missing_ok=True)
    if all(of_set.places for of_set in set_scores.values()):
        caption = "Tokens that TagOOD keeps; grey: those it drops. The images are those above, as its tagger sees them"
        figures["tokens"] = caption, draw_places([*set_scores.values()])
    for name, (_, figure) in figures.items():
        save_figure(figure, folder / f"figures/{name}.png")
    method = "ATD" if "ATD" in set(results["method"]) else results["method"].iloc[-1]
    id_set, *ood_sets = set_scores.values()
    _write(
        folder / "report.html",
        title=f"CLIPN report: {printable(folder)}",
        blocks=blocks,
        several_checkpoints=several_checkpoints,
        figures=[(caption, figure_uri(folder / f"figures/{name}.png")) for name, (caption, _) in figures.items()],
        method=method,
        log_odds=", log odds" if method in BY_LOG_ODDS else "",
        fpr95=results[results["method"] == method].groupby("ood_set")["FPR95"].first().to_dict(),
        set_scores=[*ood_sets, id_set],
        class_names=evaluation.class_names,
    )


def write_adversarial(folder: Path, results: pd.DataFrame, sets: Sequence[AdversarialSet]) -> None:
    """Write results.csv, results.md and samples.png of adversarial OOD images into a folder."""
    changes = pd.DataFrame(
        {
            ("", "OOD set"): [of.name for of in sets],
            ("", "images"): [str(len(of.targets)) for of in sets],
            **{
                ("cosine to target", kind): [f"{float(of.cosines[kind].mean()):.3f}" for of in sets]
                for kind in VERSIONS
            },
            ("change of a pixel", "(of 255)"): [f"{float(of.change.mean()):.2f}" for of in sets],
        }
    )
    text = "Mean cosine to the target, an ID training image, and mean absolute change of a pixel."
    blocks = [Block("Perturbation", text, changes)]
    for name, rows in [*results.groupby("ood_set", sort=False), ("average over the OOD sets", results)]:
        text = f"{name}: AUROC (higher is better) and FPR95 (lower) in percent; ID: {results['id_set'].iloc[0]}."
        blocks.append(Block(name, text, tables.versions_table(rows)))
    results.to_csv(folder / "results.csv", index=False)
    _write(folder / "results.md", blocks=blocks)
    save_figure(draw_adversarial(sets), folder / "samples.png")


def write_correlation(folder: Path, points: pd.DataFrame, fits: pd.DataFrame) -> None:
    """Write results.csv (the points), fits.csv, results.md and scatter.png of a correlation into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    points.to_csv(folder / "results.csv", index=False)
    fits.to_csv(folder / "fits.csv", index=False)
    text = f"ID: {points['id_set'].iloc[0]}. Accuracy of a 20-NN classifier and AUROC of 1-NN, in percent."
    fitted = "Squared Pearson correlation R² of this accuracy and AUROC, and slope: AUROC points per accuracy point."
    blocks = [Block("Checkpoints", text, tables.points_table(points))]
    blocks.append(Block("Correlation", fitted, tables.fits_table(fits)))
    _write(folder / "results.md", blocks=blocks)
    save_figure(draw_correlation(points, fits), folder / "scatter.png")


def bootstrap_intervals(set_scores: dict[str, SetScores], draws: int, seed: int = 0) -> pd.DataFrame:
    """95 % intervals of every method and OOD set: id_set, ood_set, method, metric, low, high (fractions)."""
    id_set, *ood_sets = set_scores.values()
    rows = [
        (id_set.images.name, ood.images.name, method, metric)
        + bootstrap_interval(id_scores, ood.scores[method], metric, draws, seed)
        for ood in ood_sets
        for method, id_scores in id_set.scores.items()
        for metric in tables.METRICS
    ]
    return pd.DataFrame(rows, columns=["id_set", "ood_set", "method", "metric", "low", "high"])


def summary(results: pd.DataFrame) -> str:
    """The title and the main table, for a terminal."""
    return f"{_title(results)}\n\n{tables.markdown(tables.results_table(results))}"


def _title(results: pd.DataFrame) -> str:
    accuracies = results.groupby(tables.run_number(results))["id_accuracy"].first()
    shown = accuracies.notna().all() and not tables.accuracy_varies(results)  # else in the table
    accuracy = f", ID accuracy {tables.percent(accuracies)}" if shown else ""
    several = f"; mean ± standard deviation over {len(accuracies)} checkpoints" if len(accuracies) > 1 else ""
    metrics = f"AUROC (higher is better) and FPR95 (lower) in percent{several}."
    return f"ID: {results['id_set'].iloc[0]}{accuracy}. {metrics}"


def _published_block(published: list[Published]) -> list[Block]:
    if not published:
        return []
    text = "Reported by others, not measured here. AUROC and FPR95 in percent."
    table = tables.published_table(published, list(published[0].results))
    return [Block("Published results", text, table, [(row.source, row.url) for row in published])]


def _decisions_block(decisions: pd.DataFrame) -> Block:
    table = tables.decisions_table(decisions)
    open_set = " (C+1)-way: an ID image also needs its right class." * table.columns[-1][1].startswith("(C+1)")
    return Block("Decisions", f"Threshold-free decisions, in percent of the images.{open_set}", table)


def _left_out_block(image_sets: list[ImageSet]) -> list[Block]:
    sets = [images for images in image_sets if images.left_out]
    counts = ", ".join(f"{len(s.left_out)} of {len(s) + len(s.left_out)} in {s.name}" for s in sets)
    paths = [(printable(path), "") for images in sets for path in images.left_out]
    return [Block("Images left out", f"Unreadable images were left out: {counts}.", items=paths)] if sets else []


def _latex(results: pd.DataFrame, published: list[Published]) -> str:
    """The measured results in the papers' columns, and the published ones below them."""
    options = {"metrics": tables.PAPER_METRICS, "accuracy": bool(results["id_accuracy"].notna().all())}
    measured, sources = tables.results_table(results, **options), [(row.source, row.url) for row in published]
    others = tables.published_table(published, list(results["ood_set"].unique()), **options)
    return tables.latex_table(measured, _title(results), others, sources)


def _write(path: Path, **values: object) -> None:
    """Fill in the template of a file."""
    text = _TEMPLATES.get_template(f"{path.name}.j2").render(values)
    path.write_text(text.strip() + "\n", encoding="utf-8")
