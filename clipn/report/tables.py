"""Results as tables of text cells, written as Markdown and LaTeX.

A table is a DataFrame of strings. Its columns have a group and a name, such as ("SUN", "AUROC"); the first column,
("", "method"), holds the row headings.
"""

import itertools
from collections.abc import Iterable, Sequence

import pandas as pd

from clipn.report.published import Published

METRICS = ("AUROC", "FPR95")
PAPER_METRICS = ("FPR95", "AUROC")  # the papers' column order

_ARROWS = {"AUROC": r" $\uparrow$", "FPR95": r" $\downarrow$"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
_LATEX_ESCAPES = str.maketrans(_LATEX | {character: f"\\{character}" for character in "&%$#_{}"})
_COLUMN_NAMES = {
    "id_accuracy": "accuracy",
    "id_kept": "kept",
    "ood_found": "detected",
    "open_accuracy": "(C+1)-way accuracy",
    "val_itbo": "100 ITBO",
    "val_accuracy": "accuracy",
    "val_auroc": "AUROC",
}
_PUBLISHED_LABEL = r"\emph{Reported by others, not measured here}"


def results_table(
    results: pd.DataFrame, metrics: Sequence[str] = METRICS, accuracy: bool | None = None
) -> pd.DataFrame:
    """The main table: per method the metrics of each OOD set and their averages, optionally the ID accuracy.

    accuracy: by default it is in the table if methods differ in it.
    """
    accuracy = accuracy_varies(results) if accuracy is None else accuracy
    parts = [(name, rows, metrics) for name, rows in [*results.groupby("ood_set", sort=False), ("average", results)]]
    return _table("method", parts + [("ID", results, ["id_accuracy"])] * accuracy)


def versions_table(results: pd.DataFrame) -> pd.DataFrame:
    """Per method: the metrics on each version of the OOD images ("pixels"), averaged over the OOD sets."""
    return _table("method", [(version, rows, METRICS) for version, rows in results.groupby("pixels", sort=False)])


def decisions_table(decisions: pd.DataFrame) -> pd.DataFrame:
    """Per threshold-free decision: the share of ID images kept, of each OOD set detected, and the accuracies.

    The (C+1)-way accuracy also requires the right class of an ID image. It is left out where labels are missing.
    """
    detected = [(name, rows, ["ood_found"]) for name, rows in decisions.groupby("ood_set", sort=False)]
    has_open_accuracy = "open_accuracy" in decisions and decisions["open_accuracy"].notna().all()
    accuracies = ["accuracy", "open_accuracy"] if has_open_accuracy else ["accuracy"]
    return _table("decision", [("ID", decisions, ["id_kept"]), *detected, ("average", decisions, accuracies)])


def ablations_table(results: pd.DataFrame) -> pd.DataFrame:
    """Per `setting`: the figures of held-out pairs, each method's metrics averaged over the OOD sets, and ID accuracy.

    The ID accuracy is that of each method if they differ. Results without a "method" have held-out figures alone.
    """
    held_out = [name for name in results if name.startswith("val_")]
    parts = [("held-out", results, held_out)] if held_out else []
    if "method" not in results:
        return _table("setting", parts)
    methods = list(results.groupby("method", sort=False))
    if accuracy_varies(results):
        return _table("setting", parts + [(name, rows, [*METRICS, "id_accuracy"]) for name, rows in methods])
    parts += [(name, rows, METRICS) for name, rows in methods]
    return _table("setting", [*parts, ("ID", results, ["id_accuracy"])])


def points_table(points: pd.DataFrame) -> pd.DataFrame:
    """Per checkpoint, the least accurate first: the 20-NN accuracy on ID images, and 1-NN's AUROC of each OOD set."""
    ordered = points.sort_values("id_accuracy", kind="stable")
    parts = [(name, ordered[ordered["ood_set"] == name], ["AUROC"]) for name in points["ood_set"].unique()]
    return _table("checkpoint", [("20-NN", ordered, ["id_accuracy"]), *parts])


def fits_table(fits: pd.DataFrame) -> pd.DataFrame:
    """Per OOD set: R², the slope of the line and the number of checkpoints; a dash where there is no correlation."""
    columns = {
        ("", "OOD set"): fits["ood_set"],
        ("", "R²"): [f"{value:.3f}" for value in fits["r_squared"]],
        ("", "slope"): [f"{round(value, 2) + 0:.2f}" for value in fits["slope"]],
        ("", "n"): fits["n"].astype(str),
    }
    return pd.DataFrame(columns).replace("nan", "–")


def intervals_table(intervals: pd.DataFrame) -> pd.DataFrame:
    """Per method: the lower and upper limit, in percent, of each OOD set and metric."""
    limits = 100 * intervals[["low", "high"]].to_numpy()
    texts = intervals.assign(text=[f"{low:.2f} – {high:.2f}" for low, high in limits])
    columns = pd.MultiIndex.from_frame(texts[["ood_set", "metric"]].drop_duplicates())
    table = texts.pivot(index="method", columns=["ood_set", "metric"], values="text")
    return table.reindex(texts["method"].unique(), columns=columns).reset_index(col_level=1, names="method")


def published_table(
    entries: Sequence[Published], ood_sets: Sequence[str], metrics: Sequence[str] = METRICS, accuracy: bool = False
) -> pd.DataFrame:
    """Published results in the columns of `results_table`; a dash for a figure that is not known.

    An average over other sets than these is left out.
    """
    rows = []
    for entry in entries:
        complete = set(ood_sets) <= entry.results.keys()
        pairs = [*(entry.results.get(name) for name in ood_sets), entry.average if complete else None]
        cells = [f"{pair[METRICS.index(metric)]:.2f}" if pair else "–" for pair in pairs for metric in metrics]
        rows.append([entry.method, *cells, *["–"] * accuracy])
    columns = [("", "method"), *itertools.product([*ood_sets, "average"], metrics), *[("ID", "accuracy")] * accuracy]
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(columns)).replace("nan", "–")


def column_groups(table: pd.DataFrame) -> list[tuple[str, int]]:
    """The groups of a table's columns in order, each with its number of columns."""
    return [(group, len(list(columns))) for group, columns in itertools.groupby(table.columns.get_level_values(0))]


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, with aligned columns and one header line."""
    header = [f"{group} {name}".strip() for group, name in table.columns]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [header, *table.to_numpy().tolist()]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def latex_table(
    measured: pd.DataFrame, caption: str, published: pd.DataFrame, sources: Iterable[tuple[str, str]]
) -> str:
    """A booktabs table of the measured rows and, if there are any, of published rows under a label.

    sources: text and address of each published row's source, printed below the table.
    """
    table = pd.concat([measured, published], ignore_index=True)
    width = table.shape[1]
    style = table.style.hide(axis="index").format(latex_text).format_index(latex_text, axis=1, level=0)
    style = style.format_index(lambda name: latex_text(name) + _ARROWS.get(name, ""), axis=1, level=1)
    lines = style.to_latex(hrules=True, multicol_align="c", column_format="l" + "r" * (width - 1)).splitlines()
    if len(published):
        first = lines.index(r"\midrule") + 1 + len(measured)
        lines[first:first] = [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{{_PUBLISHED_LABEL}}} \\"]
    ends = itertools.accumulate(count for _, count in column_groups(table))
    rules = [rf"\cmidrule(lr){{{start + 1}-{end}}}" for start, end in itertools.pairwise(ends)]
    lines.insert(lines.index(r"\toprule") + 2, " ".join(rules))
    head = [
        "% Requires booktabs, graphicx and url.",
        rf"\begin{{table*}}\centering\caption{{{latex_text(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
    ]
    lines[-1] += "}"
    notes = [rf"\par\smallskip\footnotesize {latex_text(text)}, \url{{{url}}}" for text, url in sources]
    return "\n".join([*head, *lines, *notes, r"\end{table*}", ""])


def run_number(rows: pd.DataFrame) -> pd.Series:
    """The number of each row's checkpoint: rows of the same sets and method are in the order of the checkpoints."""
    return rows.groupby([key for key in ("setting", "ood_set", "method", "decision") if key in rows]).cumcount()


def accuracy_varies(results: pd.DataFrame) -> bool:
    """Whether the ID accuracy of a run depends on the method: those of a probe have that of the probe."""
    runs = [results[key] for key in ("setting",) if key in results] + [run_number(results)]
    return bool((results.groupby(runs)["id_accuracy"].nunique() > 1).any())


def percent(values: pd.Series) -> str:
    """The mean in percent, with the standard deviation if there are several values."""
    values = 100 * values
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return text.translate(_LATEX_ESCAPES)


def _table(heading: str, parts: Sequence[tuple[str, pd.DataFrame, Sequence[str]]]) -> pd.DataFrame:
    """A row per value of `heading`; parts: for each group of columns its name, the rows of results and their keys.

    A run is averaged over its rows first; the standard deviation is that between the runs.
    """
    columns = []
    for _, rows, keys in parts:
        runs = rows.assign(run=run_number(rows)).groupby([heading, "run"], sort=False)[list(keys)].mean()
        columns.append(runs.groupby(heading, sort=False).agg(percent).rename(columns=_COLUMN_NAMES))
    table = pd.concat(columns, axis=1, keys=[group for group, *_ in parts])
    return table.fillna("–").reset_index(col_level=1, names=heading)
