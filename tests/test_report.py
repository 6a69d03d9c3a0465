"""Tables with exact numbers, and the files of a report."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import set_scores, write_images

from clipn.data.image_sets import open_image_set
from clipn.evaluation.results import Evaluation, join
from clipn.metrics import bootstrap_interval
from clipn.report.tables import ablations_table, decisions_table, markdown, results_table
from clipn.report.write import bootstrap_intervals, summary, write_report


def result(ood_set, method, auroc, fpr95, seed=0) -> dict:
    metrics = {"AUROC": auroc, "FPR95": fpr95, "AUPR_IN": 0.1, "AUPR_OUT": 0.2}
    return {"id_set": "cats", "ood_set": ood_set, "method": method, **metrics, "id_accuracy": 0.5, "seed": seed}


def decision(ood_set, name, kept, detected, accuracy, seed=0) -> dict:
    shares = {"id_kept": kept, "ood_found": detected, "accuracy": accuracy}
    return {"id_set": "cats", "ood_set": ood_set, "decision": name, **shares, "seed": seed}


def cells(table: str) -> list[list[str]]:
    lines = table.strip().splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert set(lines[1]) <= set("|- ")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def main_table(results: pd.DataFrame) -> list[list[str]]:
    return cells(markdown(results_table(results)))


def run(seed, dogs, owls) -> pd.DataFrame:
    """The results of one checkpoint; for each OOD set: {method: (AUROC, FPR95)}."""
    sets = [(name, method, *pair) for name, pairs in (("dogs", dogs), ("owls", owls)) for method, pair in pairs.items()]
    return pd.DataFrame([result(*row, seed) for row in sets])


ONE_RUN = run(0, {"MSP": (0.9, 0.25), "ATD": (0.95678, 0.125)}, {"MSP": (0.8, 0.5), "ATD": (1.0, 0.0)})
OTHER_RUN = run(1, {"MSP": (0.7, 0.35), "ATD": (0.95678, 0.125)}, {"MSP": (1.0, 0.5), "ATD": (0.9, 0.1)})
TWO_RUNS = pd.concat([ONE_RUN, OTHER_RUN], ignore_index=True)


def test_one_run_in_percent():
    assert main_table(ONE_RUN) == [
        ["method", "dogs AUROC", "dogs FPR95", "owls AUROC", "owls FPR95", "average AUROC", "average FPR95"],
        ["MSP", "90.00", "25.00", "80.00", "50.00", "85.00", "37.50"],
        ["ATD", "95.68", "12.50", "100.00", "0.00", "97.84", "6.25"],
    ]
    assert main_table(ONE_RUN[:1])[1] == ["MSP", "90.00", "25.00", "90.00", "25.00"], "one set is its own average"


def test_two_runs_are_averaged_over_sets_first():
    """MSP: each run's average over the two sets is 85.00, so that average does not vary, though each set does."""
    rows = main_table(TWO_RUNS)
    dogs, owls = ["80.00 ± 14.14", "30.00 ± 7.07"], ["90.00 ± 14.14", "50.00 ± 0.00"]  # 90 and 70: sample deviation
    assert rows[1] == ["MSP", *dogs, *owls, "85.00 ± 0.00", "40.00 ± 3.54"]  # 37.5 and 42.5
    assert rows[2][1] == "95.68 ± 0.00" and rows[2][3] == "95.00 ± 7.07"
    assert main_table(TWO_RUNS.assign(seed=0)) == rows, "two checkpoints of one seed are two runs"


@pytest.mark.parametrize("name", ["average", "ID", "a|b"])
def test_a_set_may_have_the_name_of_another_column(name):
    table = results_table(ONE_RUN.replace("dogs", name), accuracy=True)
    assert table.columns[1] == (name, "AUROC") and table.iloc[0].tolist()[1:3] == ["90.00", "25.00"]
    assert table.shape == (2, 8)
    assert [line.replace(r"\|", "").count("|") for line in markdown(table).splitlines()] == [9, 9, 9, 9]


def test_decisions_in_percent():
    ctw = [decision("dogs", "CTW", 0.9, 0.6, 0.75), decision("owls", "CTW", 0.9, 0.2, 0.55)]
    atd = [decision("dogs", "ATD", 0.8, 0.7, 0.75), decision("owls", "ATD", 0.8, 1.0, 0.9)]
    rows = pd.DataFrame([ctw[0], atd[0], ctw[1], atd[1]])
    assert cells(markdown(decisions_table(rows))) == [
        ["decision", "ID kept", "dogs detected", "owls detected", "average accuracy"],
        ["CTW", "90.00", "60.00", "20.00", "65.00"],
        ["ATD", "80.00", "70.00", "100.00", "82.50"],
    ]
    two_runs = pd.concat([rows, rows.assign(id_kept=rows["id_kept"] - 0.1, seed=1)])
    row = ["CTW", "85.00 ± 7.07", "60.00 ± 0.00", "20.00 ± 0.00", "65.00 ± 0.00"]
    assert cells(markdown(decisions_table(two_runs)))[1] == row
    header, row, _ = cells(markdown(decisions_table(rows.assign(open_accuracy=0.7))))
    assert header[-2:] == ["average accuracy", "average (C+1)-way accuracy"] and row[-2:] == ["65.00", "70.00"]
    assert "way" not in markdown(decisions_table(rows.assign(open_accuracy=float("nan")))), "no labels"


def test_settings_side_by_side():
    settings = pd.concat([ONE_RUN.assign(setting="lr=1"), OTHER_RUN.assign(setting="lr=2")])
    assert cells(markdown(ablations_table(settings))) == [
        ["setting", "MSP AUROC", "MSP FPR95", "ATD AUROC", "ATD FPR95", "ID accuracy"],
        ["lr=1", "85.00", "37.50", "97.84", "6.25", "50.00"],
        ["lr=2", "85.00", "42.50", "92.84", "11.25", "50.00"],
    ]
    assert cells(markdown(ablations_table(TWO_RUNS.assign(setting="both"))))[1][2] == "40.00 ± 3.54"


def test_the_summary_names_the_id_set_and_its_accuracy():
    text = summary(ONE_RUN)
    assert "cats" in text and "ID accuracy 50.00" in text and "checkpoints" not in text
    assert markdown(results_table(ONE_RUN)) in text
    text = summary(pd.concat([ONE_RUN, OTHER_RUN.assign(id_accuracy=0.6)]))
    assert "ID accuracy 55.00 ± 7.07" in text and "2 checkpoints" in text
    text = summary(ONE_RUN.assign(id_accuracy=float("nan")))
    assert "accuracy" not in text and "nan" not in text, "the ID images have no labels"


# The files

DECISIONS = pd.DataFrame([decision("dogs", "CTW", 0.9, 0.6, 0.75)])
MAIN_SETS = ["SUN", "iNaturalist", "places", "Texture"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    cats = write_images(root / "cats", *(f"{c}/{n}.png" for c in "ab" for n in range(8)))
    sets = open_image_set("cats", cats), open_image_set("dogs", write_images(root / "dogs", "1.png", "2.png"))
    return {s.name: set_scores(s, {m: rng.random(len(s)) for m in ("MSP", "ATD")}) for s in sets}


def report(folder, scores, results=ONE_RUN, **options):
    """Write a report of these results; the scores of "dogs" stand for those of every OOD set."""
    names = results["ood_set"].unique()
    sets = {name: replace(scores["dogs"], images=replace(scores["dogs"].images, name=name)) for name in names}
    write_report(folder, Evaluation(results, DECISIONS, {"cats": scores["cats"]} | sets, ["a", "b"]), **options)


def text_of(path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_files_of_a_report(tmp_path, scores, no_figures):
    folder = tmp_path / "run"
    for _ in range(2):  # a report may be written again
        report(folder, scores)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    images = [f"figures/{name}.png" for name in ("bars", "histograms", "roc", "samples")]
    assert files == ["decisions.csv", *images, "report.html", "results.csv", "results.md", "results.tex"]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv"), ONE_RUN)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "decisions.csv"), DECISIONS)
    decisions = f"Threshold-free decisions, in percent of the images.\n\n{markdown(decisions_table(DECISIONS))}"
    assert text_of(folder / "results.md") == f"{summary(ONE_RUN)}\n{decisions}"


def test_joined_evaluations_make_one_report(tmp_path, scores, no_figures):
    results = [run[run["ood_set"] == "dogs"] for run in (ONE_RUN, OTHER_RUN)]
    write_report(tmp_path, join([Evaluation(run, DECISIONS, scores, ["a", "b"]) for run in results]))
    assert "over 2 checkpoints" in text_of(tmp_path / "results.md")
    assert "are those of the first checkpoint" in text_of(tmp_path / "report.html")


def test_unreadable_images_are_named(tmp_path, scores, no_figures):
    images = scores["cats"].images.without([3])
    rest = {method: values[: len(images)] for method, values in scores["cats"].scores.items()}
    report(tmp_path, scores | {"cats": set_scores(images, rest)})
    for name in ("results.md", "report.html"):
        text = text_of(tmp_path / name)
        assert "1 of 16 in cats" in text and str(images.left_out[0]) in text


def test_intervals_on_request(tmp_path, scores, no_figures):
    report(tmp_path, scores, TWO_RUNS, bootstrap=50)
    intervals = pd.read_csv(tmp_path / "intervals.csv")
    assert intervals[["ood_set", "method", "metric"]].value_counts().tolist() == [1] * 8
    expected = bootstrap_interval(scores["cats"].scores["ATD"], scores["dogs"].scores["ATD"], "FPR95", 50, 0)
    row = intervals.query("ood_set == 'owls' and method == 'ATD' and metric == 'FPR95'")
    assert row[["low", "high"]].to_numpy()[0] == pytest.approx(expected)
    for name in ("results.md", "report.html"):
        text = text_of(tmp_path / name)
        assert "50 bootstrap draws" in text and "of the first checkpoint" in text
        assert "{:.2f} – {:.2f}".format(*np.multiply(expected, 100)) in text
    pd.testing.assert_frame_equal(bootstrap_intervals(scores, 50), bootstrap_intervals(scores, 50))
    report(tmp_path, scores, TWO_RUNS)
    assert not (tmp_path / "intervals.csv").exists(), "no intervals of other results are left"


def latex(folder) -> list[list[str]]:
    """The rows of the table's body, cell by cell."""
    body = text_of(folder / "results.tex").split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    lines = [line.removesuffix(r" \\") for line in body.strip().splitlines() if "midrule" not in line]
    return [line.split(" & ") for line in lines]


def test_latex_has_the_papers_columns(tmp_path, scores, no_figures):
    results = TWO_RUNS.replace("dogs", "d_o&g%")
    report(tmp_path, scores, results)
    text = text_of(tmp_path / "results.tex")
    groups = [r"\multicolumn{2}{c}{d\_o\&g\%}", r"\multicolumn{2}{c}{owls}", r"\multicolumn{2}{c}{average}", "ID"]
    assert " & ".join(["", *groups]) in text and "Reported" not in text
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-5} \cmidrule(lr){6-7} \cmidrule(lr){8-8}" in text
    assert r"method & FPR95 $\downarrow$ & AUROC $\uparrow$" in text
    numbers = ["30.00 7.07", "80.00 14.14", "50.00 0.00", "90.00 14.14", "40.00 3.54", "85.00 0.00", "50.00 0.00"]
    assert latex(tmp_path)[0] == ["MSP", *(number.replace(" ", r" $\pm$ ") for number in numbers)]
    report(tmp_path, scores, results.assign(id_accuracy=float("nan")))
    assert len(latex(tmp_path)[0]) == 7, "no accuracy is known"


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(tmp_path, scores, no_figures):
    results = ONE_RUN.replace({"dogs": "iNaturalist_{}^~", "owls": "SUN#$", "cats": "50 % \\cats"})
    report(tmp_path, scores, results)
    head = r"\documentclass{article}\usepackage{booktabs,graphicx,url}\begin{document}\input{results.tex}\end{document}"
    (tmp_path / "page.tex").write_text(head)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout[-2000:]


def test_published_results_are_a_block_of_their_own(tmp_path, scores, no_figures):
    results = pd.DataFrame(
        [result(name, "ATD", 0.9, 0.25) | {"id_set": "ImageNet-1K"} for name in [*MAIN_SETS, "NINCO"]]
    )
    report(tmp_path, scores, results[:4])
    measured, published = text_of(tmp_path / "results.md").split("Reported by others, not measured")
    assert "96.20" in published and "github.com/xmed-lab/CLIPN" in published and "96.20" not in measured
    page = text_of(tmp_path / "report.html")
    places = ["Reported by others", "96.20", 'href="https://github.com/xmed-lab/CLIPN', "quoted by"]
    assert [page.index(text) for text in places] == sorted(page.index(text) for text in places)
    own, label, *published = latex(tmp_path)
    assert own[0] == "ATD" and "Reported by others" in label[0]
    assert published[1][:3] == ["ATD", "25.69", "94.18"] and published[1][-3:] == ["29.46", "93.45", "--"]
    report(tmp_path, scores, results)
    assert latex(tmp_path)[3][-5:] == ["--"] * 5, "no result for NINCO, so no average with it"
