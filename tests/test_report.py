"""Tables with exact numbers, and the files of a report."""

import numpy as np
import pandas as pd
import pytest
from helpers import write_images
from PIL import Image

from clipn.image_sets import open_image_set
from clipn.report import decision_table, draw_histograms, draw_samples, main_table, summary, write_report


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
    scores = {s.name: {m: rng.random(len(s)) for m in ("MSP", "MaxLogit", "CTW", "ATD")} for s in sets}
    return sets, scores


def test_a_report_is_five_files(tmp_path, material):
    sets, scores = material
    results = pd.DataFrame(ONE_RUN)
    decisions = pd.DataFrame([decision("dogs", "CTW", 0.9, 0.6, 0.75)])
    folder = tmp_path / "run"
    write_report(folder, results, decisions, sets, scores)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["decisions.csv", "figures/histograms.png", "figures/samples.png", "results.csv", "results.md"]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv"), results)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "decisions.csv"), decisions)
    page = (folder / "results.md").read_text(encoding="utf-8")
    assert main_table(results) in page and decision_table(decisions) in page and summary(results) in page
    for name in ("histograms", "samples"):
        image = Image.open(folder / "figures" / f"{name}.png").convert("L")
        assert min(image.size) > 100 and np.asarray(image).std() > 5, "something is drawn"
    write_report(folder, results, decisions, sets, scores)


def test_constant_scores_can_be_drawn(tmp_path):
    scores = {"cats": {"MSP": np.full(5, 0.3)}, "dogs": {"MSP": np.full(2, 0.3)}}
    draw_histograms(scores, "cats", tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_scores_that_hardly_differ_can_be_drawn(tmp_path):
    """MSP of a sure model: float32 numbers next to one."""
    near = np.nextafter(np.ones(50, np.float32), np.float32(0))
    near[::2] = 1
    draw_histograms({"cats": {"MSP": near}, "dogs": {"MSP": near[:7]}}, "cats", tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_samples_show_the_same_pictures_each_time(tmp_path, material):
    sets, _ = material
    draw_samples(sets, tmp_path / "a.png")
    draw_samples(sets, tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))
