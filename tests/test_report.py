"""Tables with exact numbers, and the files of a report."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import set_scores, write_images
from PIL import Image

from clipn import report
from clipn.data.image_sets import open_image_set
from clipn.evaluation.results import Evaluation, join
from clipn.metrics import bootstrap_interval, ood_metrics
from clipn.report.write import ablation_table, bootstrap_intervals, decision_table, main_table, summary, write_report


def result(ood_set, method, auroc, fpr95, seed=0, accuracy=0.5) -> dict:
    metrics = {"AUROC": auroc, "FPR95": fpr95, "AUPR_IN": 0.1, "AUPR_OUT": 0.2}
    return {"id_set": "cats", "ood_set": ood_set, "method": method, **metrics, "id_accuracy": accuracy, "seed": seed}


def decision(ood_set, name, kept, found, accuracy, seed=0) -> dict:
    shares = {"id_kept": kept, "ood_found": found, "accuracy": accuracy}
    return {"id_set": "cats", "ood_set": ood_set, "decision": name, **shares, "seed": seed}


def cells(table: str) -> list[list[str]]:
    lines = table.strip().splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert set(lines[1]) <= set("|- ")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


ONE_RUN = [
    result("dogs", "MSP", 0.9, 0.25),
    result("dogs", "ATD", 0.95678, 0.125),
    result("owls", "MSP", 0.8, 0.5),
    result("owls", "ATD", 1.0, 0.0),
]
OTHER_RUN = [
    result("dogs", "MSP", 0.7, 0.35, seed=1),
    result("dogs", "ATD", 0.95678, 0.125, seed=1),
    result("owls", "MSP", 1.0, 0.5, seed=1),
    result("owls", "ATD", 0.9, 0.1, seed=1),
]


def test_one_run_in_percent():
    assert cells(main_table(pd.DataFrame(ONE_RUN))) == [
        ["method", "dogs AUROC", "dogs FPR95", "owls AUROC", "owls FPR95", "average AUROC", "average FPR95"],
        ["MSP", "90.00", "25.00", "80.00", "50.00", "85.00", "37.50"],
        ["ATD", "95.68", "12.50", "100.00", "0.00", "97.84", "6.25"],
    ]


def test_one_set_has_its_own_numbers_as_average():
    (_, row) = cells(main_table(pd.DataFrame(ONE_RUN[:1])))
    assert row == ["MSP", "90.00", "25.00", "90.00", "25.00"]


def test_two_runs_are_averaged_over_sets_first():
    """MSP: each run's average over the two sets is 85.00, so that average does not vary, though each set does."""
    rows = cells(main_table(pd.DataFrame(ONE_RUN + OTHER_RUN)))
    assert rows[1] == [
        "MSP",
        "80.00 ± 14.14",  # 90 and 70: the sample deviation
        "30.00 ± 7.07",
        "90.00 ± 14.14",
        "50.00 ± 0.00",
        "85.00 ± 0.00",
        "40.00 ± 3.54",  # 37.5 and 42.5
    ]
    assert rows[2][1] == "95.68 ± 0.00" and rows[2][3] == "95.00 ± 7.07"


def test_two_checkpoints_of_one_seed_are_two_runs():
    again = [row | {"seed": 0} for row in OTHER_RUN]
    assert main_table(pd.DataFrame(ONE_RUN + again)) == main_table(pd.DataFrame(ONE_RUN + OTHER_RUN))


def test_results_read_back_from_csv_give_the_same_table(tmp_path):
    results = pd.DataFrame(ONE_RUN + OTHER_RUN)
    results.to_csv(tmp_path / "results.csv", index=False)
    assert main_table(pd.read_csv(tmp_path / "results.csv")) == main_table(results)


def test_decisions_in_percent():
    rows = [
        decision("dogs", "CTW", 0.9, 0.6, 0.75),
        decision("dogs", "ATD", 0.8, 0.7, 0.75),
        decision("owls", "CTW", 0.9, 0.2, 0.55),
        decision("owls", "ATD", 0.8, 1.0, 0.9),
    ]
    assert cells(decision_table(pd.DataFrame(rows))) == [
        ["decision", "ID kept", "dogs found", "owls found", "average accuracy"],
        ["CTW", "90.00", "60.00", "20.00", "65.00"],
        ["ATD", "80.00", "70.00", "100.00", "82.50"],
    ]
    other = [row | {"id_kept": row["id_kept"] - 0.1, "seed": 1} for row in rows]
    assert cells(decision_table(pd.DataFrame(rows + other)))[1] == [
        "CTW",
        "85.00 ± 7.07",
        "60.00 ± 0.00",
        "20.00 ± 0.00",
        "65.00 ± 0.00",
    ]


def test_the_summary_says_what_is_in_distribution():
    one = summary(pd.DataFrame(ONE_RUN))
    assert "cats" in one and "ID accuracy 50.00" in one and "checkpoints" not in one
    assert main_table(pd.DataFrame(ONE_RUN)) in one
    two = summary(pd.DataFrame(ONE_RUN + [row | {"id_accuracy": 0.6} for row in OTHER_RUN]))
    assert "ID accuracy 55.00 ± 7.07" in two and "2 checkpoints" in two


def test_a_flat_folder_has_no_accuracy():
    rows = [row | {"id_accuracy": float("nan")} for row in ONE_RUN]
    text = summary(pd.DataFrame(rows))
    assert "accuracy" not in text and "nan" not in text


@pytest.fixture
def material(tmp_path):
    sets = [
        open_image_set("cats", write_images(tmp_path / "cats", *(f"{c}/{n}.png" for c in "ab" for n in range(8)))),
        open_image_set("dogs", write_images(tmp_path / "dogs", "1.png")),
        open_image_set("größe_$1", write_images(tmp_path / "owls", "snowy_owl/1.png", "snowy_owl/2.png")),
    ]
    rng = np.random.default_rng(0)
    methods = ("MSP", "MaxLogit", "CTW", "ATD")
    return {s.name: set_scores(s, {m: rng.random(len(s)) for m in methods}) for s in sets}


def judged(found, id_set="cats", seeds=(0,)) -> pd.DataFrame:
    """The results of these scores."""
    inside, *outside = found.values()
    rows = [
        {"id_set": id_set, "ood_set": one.images.name, "method": method}
        | ood_metrics(inside.scores[method], one.scores[method])
        | {"id_accuracy": 0.5, "seed": seed}
        for seed in seeds
        for one in outside
        for method in inside.scores
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def undrawn(monkeypatch):
    """Reports with dots for figures: drawing takes seconds."""
    for name in ("draw_bars", "draw_histograms", "draw_roc", "draw_samples"):
        monkeypatch.setattr(report, name, lambda *arguments: Image.new("RGB", (1, 1)).save(arguments[-1]))


DECISIONS = pd.DataFrame([decision("dogs", "CTW", 0.9, 0.6, 0.75)])
FIGURES = ("bars", "histograms", "roc", "samples")


def test_the_files_of_a_report(tmp_path, material):
    results, folder = judged(material), tmp_path / "run"
    write_report(folder, results, DECISIONS, material, ["a", "b"])
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    tables = ["report.html", "results.csv", "results.md", "results.tex"]
    assert files == ["decisions.csv", *(f"figures/{name}.png" for name in FIGURES), *tables]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv"), results)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "decisions.csv"), DECISIONS)
    page = (folder / "results.md").read_text(encoding="utf-8")
    assert main_table(results) in page and decision_table(DECISIONS) in page and summary(results) in page
    assert "Reported by others" not in page and "bootstrap" not in page
    for name in FIGURES:
        image = Image.open(folder / "figures" / f"{name}.png").convert("L")
        assert min(image.size) > 100 and np.asarray(image).std() > 5, "something is drawn"
    write_report(folder, results, DECISIONS, material, ["a", "b"])


def test_joined_evaluations_make_one_report(tmp_path, material, undrawn):
    one, other = (Evaluation(judged(material, seeds=[seed]), DECISIONS, material, ["a", "b"]) for seed in (0, 1))
    write_report(tmp_path / "run", *join([one, other]))
    assert "over 2 checkpoints" in (tmp_path / "run/results.md").read_text(encoding="utf-8")
    assert "are those of the first checkpoint" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_unreadable_images_are_named(tmp_path, material, undrawn):
    one = material["cats"].images.without([3])
    cut = {"cats": set_scores(one, {m: v[: len(one)] for m, v in material["cats"].scores.items()})}
    write_report(tmp_path / "run", judged(material), DECISIONS, material | cut, ["a", "b"])
    for name in ("results.md", "report.html"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert "1 of 16 in cats" in text and str(one.left_out[0]) in text


def test_decisions_with_the_class_asked_for():
    rows = pd.DataFrame([decision("dogs", "CTW", 0.9, 0.6, 0.75) | {"open_accuracy": 0.7}])
    assert cells(decision_table(rows))[0][-2:] == ["average accuracy", "average (C+1)-way accuracy"]
    assert cells(decision_table(rows))[1][-2:] == ["75.00", "70.00"]
    assert "way" not in decision_table(rows.assign(open_accuracy=float("nan"))), "no labels"


def test_settings_side_by_side():
    one, other = (pd.DataFrame(rows) for rows in (ONE_RUN, OTHER_RUN))
    rows = cells(ablation_table(pd.concat([one.assign(setting="lr=1"), other.assign(setting="lr=2")])))
    assert rows[0] == ["setting", "MSP AUROC", "MSP FPR95", "ATD AUROC", "ATD FPR95", "ID accuracy"]
    assert rows[1:] == [
        ["lr=1", "85.00", "37.50", "97.84", "6.25", "50.00"],
        ["lr=2", "85.00", "42.50", "92.84", "11.25", "50.00"],
    ]
    assert cells(ablation_table(pd.concat([one, other]).assign(setting="both")))[1][2] == "40.00 ± 3.54"


# LaTeX


def latex(folder) -> list[list[str]]:
    """The rows of the table's body, cell by cell."""
    body = (folder / "results.tex").read_text(encoding="utf-8").split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    lines = [line.removesuffix(r" \\") for line in body.strip().splitlines() if "midrule" not in line]
    return [line.split(" & ") for line in lines]


def test_latex_has_the_papers_columns(tmp_path, material, undrawn):
    results = pd.DataFrame(ONE_RUN + OTHER_RUN).assign(ood_set=lambda rows: rows["ood_set"].replace("dogs", "d_o&g%"))
    found = _named(material, ["d_o&g%", "owls"])
    write_report(tmp_path, results, DECISIONS, found, ["a", "b"])
    text = (tmp_path / "results.tex").read_text(encoding="utf-8")
    groups = [r"\multicolumn{2}{c}{d\_o\&g\%}", r"\multicolumn{2}{c}{owls}", r"\multicolumn{2}{c}{average}"]
    assert " & ".join(groups) in text
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-5} \cmidrule(lr){6-7} \cmidrule(lr){8-8}" in text
    assert r"method & FPR95 $\downarrow$ & AUROC $\uparrow$" in text and "Reported" not in text
    assert latex(tmp_path)[0] == [
        "MSP",
        r"30.00 $\pm$ 7.07",
        r"80.00 $\pm$ 14.14",
        r"50.00 $\pm$ 0.00",
        r"90.00 $\pm$ 14.14",
        r"40.00 $\pm$ 3.54",
        r"85.00 $\pm$ 0.00",
        r"50.00 $\pm$ 0.00",
    ]
    write_report(tmp_path, results.assign(id_accuracy=float("nan")), DECISIONS, found, ["a", "b"])
    assert len(latex(tmp_path)[0]) == 7, "no accuracy is known"


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
def test_latex_compiles(tmp_path, material, undrawn):
    found = _named(material, ["iNaturalist_{}^~", "SUN#$"])
    write_report(tmp_path, judged(found, "50 % \\cats"), DECISIONS, found, ["a", "b"])
    head = r"\documentclass{article}\usepackage{booktabs,graphicx,url}\begin{document}\input{results.tex}\end{document}"
    (tmp_path / "page.tex").write_text(head)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


# Published figures

MAIN_SETS = ["SUN", "iNaturalist", "places", "Texture"]


def test_published_figures_stand_in_a_block_of_their_own(tmp_path, material, undrawn):
    rows = [result(name, "ATD", 0.9, 0.25) | {"id_set": "ImageNet-1K"} for name in [*MAIN_SETS, "NINCO"]]
    write_report(tmp_path, pd.DataFrame(rows[:4]), DECISIONS, _named(material, MAIN_SETS), ["a", "b"])
    measured, others = (tmp_path / "results.md").read_text(encoding="utf-8").split("Reported by others, not measured")
    assert "96.20" in others and "github.com/xmed-lab/CLIPN" in others and "96.20" not in measured
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        page.index("Reported by others") < page.index("96.20") < page.index('href="https://github.com/xmed-lab/CLIPN')
    )
    mine, label, *theirs = latex(tmp_path)
    assert mine[0] == "ATD" and "Reported by others" in label[0]
    assert theirs[1][:3] == ["ATD", "25.69", "94.18"] and theirs[1][-3:] == ["29.46", "93.45", "--"]
    write_report(tmp_path, pd.DataFrame(rows), DECISIONS, _named(material, [*MAIN_SETS, "NINCO"]), ["a", "b"])
    assert latex(tmp_path)[3][-5:] == ["--"] * 5, "no figure for NINCO, so no average with it"


def _named(material, names):
    """The material's ID set, and its other images under these names."""
    inside, *outside = material.values()
    renamed = {
        name: replace(outside[n % 2], images=replace(outside[n % 2].images, name=name)) for n, name in enumerate(names)
    }
    return {"cats": inside} | renamed


# Confidence intervals


def test_intervals_on_request(tmp_path, material, undrawn):
    results = judged(material, seeds=(0, 1))
    write_report(tmp_path, results, DECISIONS, material, ["a", "b"], bootstrap=50)
    intervals = pd.read_csv(tmp_path / "intervals.csv")
    assert len(intervals) == 2 * 4 * 2 and ((intervals["low"] >= 0) & (intervals["high"] <= 1)).all()
    low, high = bootstrap_interval(material["cats"].scores["CTW"], material["dogs"].scores["CTW"], "FPR95", 50, 0)
    for name in ("results.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "50 bootstrap draws" in text and "of the first checkpoint" in text
        assert f"{100 * low:.2f} – {100 * high:.2f}" in text
    again = bootstrap_intervals(material, 50)
    assert np.allclose(again[["low", "high"]], intervals[["low", "high"]]), "seeded"
    write_report(tmp_path, results, DECISIONS, material, ["a", "b"])
    assert not (tmp_path / "intervals.csv").exists(), "no intervals of other numbers are left"
