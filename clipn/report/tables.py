"""Results as tables of text cells, and those as Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from clipn.report.published import Published

METRICS = ("AUROC", "FPR95")
PAPER_METRICS = ("FPR95", "AUROC")  # the papers' column order
_ARROWS = {"AUROC": r" $\uparrow$", "FPR95": r" $\downarrow$"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
_LATEX |= {mark: "\\" + mark for mark in "&%$#_{}"}


@dataclass(frozen=True)
class Table:
    """Text cells. A column has a group and a name, "near" and "AUROC"; columns of one group follow each other."""

    columns: list[tuple[str, str]]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Aligned columns under one header line."""
        header = [f"{group} {name}".strip() for group, name in self.columns]
        texts = [[cell.replace("|", r"\|") for cell in line] for line in [header, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        lines = [texts[0], ["-" * width for width in widths], *texts[1:]]
        return "".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
            for line in lines
        )

    def html(self) -> str:
        """A table in a box that scrolls sideways where the screen is narrow."""
        groups = [
            f'<th colspan="{count}" scope="colgroup">{html.escape(group)}</th>' if group else "<td></td>" * count
            for group, count in self._groups()
        ]
        names = [f'<th scope="col">{html.escape(name)}</th>' for _, name in self.columns]
        rows = [
            f'<tr><th scope="row">{html.escape(first)}</th>{"".join(_html_cell(cell) for cell in cells)}</tr>'
            for first, *cells in self.rows
        ]
        head = f"<thead><tr>{''.join(groups)}</tr><tr>{''.join(names)}</tr></thead>"
        return f'<div class="wide" tabindex="0"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'

    def latex_header(self) -> str:
        """Two header lines of booktabs: the groups with a rule under each, then the names."""
        groups, rules, start = [], [], 1
        for group, count in self._groups():
            groups.append(rf"\multicolumn{{{count}}}{{c}}{{{latex_text(group)}}}" if group else "&" * (count - 1))
            if group:
                rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
            start += count
        names = [latex_text(name) + _ARROWS.get(name, "") for _, name in self.columns]
        return f"{' & '.join(groups)} \\\\\n{' '.join(rules)}\n{' & '.join(names)} \\\\\n"

    def latex_rows(self) -> str:
        """The rows, each a line."""
        return "".join(" & ".join(latex_text(cell) for cell in row) + " \\\\\n" for row in self.rows)

    def _groups(self) -> list[tuple[str, int]]:
        return [(group, len(list(same))) for group, same in itertools.groupby(group for group, _ in self.columns)]


def results_table(results: pd.DataFrame, metrics: Sequence[str] = METRICS, accuracy: bool = False) -> Table:
    """A row per method, in percent: the metrics per OOD set, then their averages, then, if asked, the ID accuracy."""
    ood_sets = list(results["ood_set"].unique())
    columns = _columns(ood_sets, metrics, accuracy)
    rows = []
    for method, group in results.groupby("method", sort=False):
        row = [str(method)]
        for name in [*ood_sets, None]:
            chosen = group if name is None else group[group["ood_set"] == name]
            runs = chosen.groupby(run_number(chosen))  # a run's average over sets comes before the mean over runs
            row += [percent(runs[metric].mean()) for metric in metrics]
        rows.append(row + ([percent(runs["id_accuracy"].first())] if accuracy else []))
    return Table(columns, rows)


def decisions_table(decisions: pd.DataFrame) -> Table:
    """The share of ID images kept, of each OOD set found, and of all these images judged rightly.

    The last column, where the ID images' classes are known, asks for the right class as well as the right side.
    """
    ood_sets = list(decisions["ood_set"].unique())
    shares = {"accuracy": "accuracy"}
    if "open_accuracy" in decisions and decisions["open_accuracy"].notna().all():
        shares["open_accuracy"] = "(C+1)-way accuracy"
    rows = []
    for name, group in decisions.groupby("decision", sort=False):
        runs = group.groupby(run_number(group))
        found = [percent(group[group["ood_set"] == ood]["ood_found"]) for ood in ood_sets]
        averages = [percent(runs[share].mean()) for share in shares]
        rows.append([str(name), percent(runs["id_kept"].mean()), *found, *averages])
    columns = [("", "decision"), ("ID", "kept"), *((ood, "found") for ood in ood_sets)]
    return Table([*columns, *(("average", share) for share in shares.values())], rows)


def ablations_table(results: pd.DataFrame) -> Table:
    """A row per `setting`: each method's metrics averaged over the OOD sets, then the ID accuracy, in percent."""
    methods = list(results["method"].unique())
    rows = []
    for setting, group in results.groupby("setting", sort=False):
        row = [str(setting)]
        for method in methods:
            chosen = group[group["method"] == method]
            runs = chosen.groupby(run_number(chosen))
            row += [percent(runs[metric].mean()) for metric in METRICS]
        rows.append([*row, percent(runs["id_accuracy"].first())])
    columns = [("", "setting"), *((method, metric) for method in methods for metric in METRICS), ("ID", "accuracy")]
    return Table(columns, rows)


def intervals_table(intervals: pd.DataFrame, metrics: Sequence[str] = METRICS) -> Table:
    """A row per method: from and to, in percent, per OOD set and metric."""
    ood_sets = list(intervals["ood_set"].unique())
    cells = {
        key: f"{100 * low:.2f} – {100 * high:.2f}"
        for *key, low, high in intervals[["method", "ood_set", "metric", "low", "high"]].itertuples(index=False)
        for key in [tuple(key)]
    }
    rows = [
        [str(method), *(cells[method, ood, metric] for ood in ood_sets for metric in metrics)]
        for method in intervals["method"].unique()
    ]
    return Table([("", "method"), *((ood, metric) for ood in ood_sets for metric in metrics)], rows)


def published_table(
    entries: Sequence[Published], ood_sets: Sequence[str], metrics: Sequence[str] = METRICS, accuracy: bool = False
) -> Table:
    """Others' figures in the columns of `results_table`. An average over other sets than these is left out."""
    rows = []
    for entry in entries:
        pairs = [entry.figures.get(name) for name in ood_sets]
        pairs.append(entry.average if None not in pairs else None)
        by_metric = [dict(zip(METRICS, pair, strict=True)) if pair else {} for pair in pairs]
        cells = [f"{one[metric]:.2f}" if one else "–" for one in by_metric for metric in metrics]
        rows.append([entry.method, *cells, *(["–"] if accuracy else [])])
    return Table(_columns(ood_sets, metrics, accuracy), rows)


def latex_table(measured: Table, caption: str, published: Table, notes: Sequence[tuple[str, str]]) -> str:
    """A booktabs table: the measured rows, then, if there are any, others' rows in the same columns under a label.

    notes: text and address of the others' sources, printed below.
    """
    width = len(measured.columns)
    lines = [
        "% Needs booktabs, graphicx and url.",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{latex_text(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        measured.latex_header() + r"\midrule",
        measured.latex_rows()
        + (_published_label(width) + published.latex_rows() if published.rows else "")
        + r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\smallskip\footnotesize {latex_text(text)}, \url{{{url}}}" for text, url in notes),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _published_label(width: int) -> str:
    label = r"\emph{Reported by others, not measured here}"
    return "\\midrule\n" + rf"\multicolumn{{{width}}}{{l}}{{{label}}} \\" + "\n"


def run_number(rows: pd.DataFrame) -> pd.Series:
    """Which checkpoint a row is of: rows of the same sets and method follow each other in the order of checkpoints."""
    keys = [key for key in ("ood_set", "method", "decision") if key in rows]
    return rows.groupby(keys).cumcount()


def percent(values: pd.Series) -> str:
    """Mean, and the deviation if there are several, in percent."""
    values = 100 * values
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def latex_text(text: str) -> str:
    """Text with LaTeX's own marks escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _columns(ood_sets: Sequence[str], metrics: Sequence[str], accuracy: bool) -> list[tuple[str, str]]:
    columns = [("", "method"), *((name, metric) for name in [*ood_sets, "average"] for metric in metrics)]
    return [*columns, *([("ID", "accuracy")] if accuracy else [])]


def _html_cell(cell: str) -> str:
    mean, sign, deviation = cell.partition(" ± ")
    return f"<td>{html.escape(mean)}{f' <small>± {html.escape(deviation)}</small>' if sign else ''}</td>"
