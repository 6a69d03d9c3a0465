"""Correlation of ID accuracy and OOD detection over base CLIPs."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_clipn
from helpers import files, messages
from PIL import Image
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsClassifier

from clipn.cli import main
from clipn.config.loading import load_config
from clipn.evaluation.correlation import AVERAGE, correlate, fit_lines
from clipn.evaluation.evaluate import evaluate, open_models, open_sets
from clipn.features.image_sets import image_set_features
from clipn.methods import neighbours
from clipn.methods.neighbours import knn_classifier, nearest
from clipn.report.figures import draw_correlation
from clipn.report.tables import fits_table

CLASSES = ("cat", "dog", "fox")


def make_points(accuracy, **aurocs) -> pd.DataFrame:
    rows = [
        {"checkpoint": f"{n}.pt", "id_set": "pets", "ood_set": name, "id_accuracy": x, "AUROC": y}
        for name, values in aurocs.items()
        for n, (x, y) in enumerate(zip(accuracy, values, strict=True))
    ]
    return pd.DataFrame(rows)


# The classifier


@pytest.mark.parametrize(("count", "k"), [(200, 20), (7, 20), (200, 1)])
def test_the_classifier_is_scikit_learns(monkeypatch, count, k):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    centres = torch.randn(4, 12, generator=generator)
    train = 3 * (centres[labels] + 2.5 * torch.randn(count, 12, generator=generator))
    images = 5 * (centres.repeat(50, 1) + 2.5 * torch.randn(200, 12, generator=generator))
    reference = KNeighborsClassifier(min(k, count), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.02))
    expected = reference.fit(train.double().numpy(), labels.numpy()).predict(images.double().numpy())
    assert count < 20 or 0.4 < (expected == np.tile(np.arange(4), 50)).mean() < 1
    for bank in (neighbours._BANK, 33):
        monkeypatch.setattr(neighbours, "_BANK", bank)
        assert knn_classifier(train, labels, 4, k)(images).tolist() == expected.tolist()
    uniform = KNeighborsClassifier(min(k, count), metric="cosine").fit(train.numpy(), labels.numpy())
    assert k == 1 or (uniform.predict(images.numpy()) != expected).any(), "the weights matter"


def test_nearest_images_come_with_their_numbers_in_falling_order(monkeypatch):
    monkeypatch.setattr(neighbours, "_BANK", 7)
    train, images = torch.randn(40, 6), torch.randn(5, 6)
    cosines, numbers = nearest(images, train.half(), 9)
    expected = torch.nn.functional.cosine_similarity(images[:, None], train.half().float()[None], dim=2)
    torch.testing.assert_close(cosines, expected.sort(dim=1, descending=True).values[:, :9])
    torch.testing.assert_close(cosines, expected.gather(1, numbers))


# The fit


def test_the_fit_is_that_of_scikit_learn_per_set():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.3, 0.9, 8)
    points = make_points(x, near=0.5 + 0.4 * x + rng.normal(0, 0.05, 8), far=0.9 - 0.2 * x)
    near, far = (row for _, row in fit_lines(points).iterrows())
    y = points["AUROC"][:8].to_numpy()
    line = LinearRegression().fit(x[:, None], y)
    assert (near["ood_set"], near["n"], far["ood_set"]) == ("near", 8, "far")
    assert 0.1 < near["r_squared"] < 0.99 and near["r_squared"] == pytest.approx(line.score(x[:, None], y))
    assert (near["slope"], near["intercept"]) == pytest.approx((line.coef_[0], line.intercept_))
    assert (far["r_squared"], far["slope"], far["intercept"]) == pytest.approx((1, -0.2, 0.9))


def test_equal_values_have_no_correlation(tmp_path, recwarn):
    same = fit_lines(make_points([0.5, 0.5, 0.5], ood=[0.7, 0.8, 0.9])).iloc[0]
    assert same[["r_squared", "slope", "intercept"]].isna().all()
    perfect = fit_lines(make_points([0.5, 0.6, 0.7], ood=[1.0, 1.0, 1.0])).iloc[0]
    assert np.isnan(perfect["r_squared"]) and perfect["slope"] == pytest.approx(0)
    assert not recwarn.list


def test_a_panel_per_set_shows_the_points_and_their_line():
    points = make_points([0.5, 0.6, 0.8], near=[0.6, 0.75, 0.9], far=[1.0, 1.0, 1.0])
    near, far = draw_correlation(points, fit_lines(points)).axes
    np.testing.assert_allclose(near.lines[0].get_xydata(), [[50, 60], [60, 75], [80, 90]])
    np.testing.assert_allclose(
        near.lines[1].get_ydata(), np.polyval(np.polyfit([50, 60, 80], [60, 75, 90], 1), [50, 80])
    )
    assert near.get_title() == "near: R² = 0.96" and far.get_title() == "far: no correlation" and len(far.lines) == 1
    points = make_points([0.5, 0.6, 0.8], same=[1.0, 0.9999, 1.0])
    assert draw_correlation(points, fit_lines(points)).axes[0].get_ylim() == pytest.approx((96, 100))
    assert far.get_ylim()[1] == 100 and near.get_ylim()[1] < 100


def test_the_table_has_a_dash_where_there_is_no_correlation():
    fits = fit_lines(make_points([0.5, 0.6, 0.8], near=[0.8, 0.8, 0.7999], far=[1.0, 1.0, 1.0]))
    assert fits_table(fits).to_numpy().tolist() == [["near", "0.893", "0.00", "3"], ["far", "–", "0.00", "3"]]


# The command


@pytest.fixture
def arranged(tmp_path):
    """Three bases, a copy of the first with another no tower, and image sets of coloured noise; words of the config."""
    rng = np.random.default_rng(0)
    for folder, count in (("id", 12), ("train", 9), ("far", 20), ("near", 16)):
        for number, name in enumerate(CLASSES if folder in ("id", "train") else ("",)):
            (tmp_path / folder / name).mkdir(parents=True)
            for n in range(count):
                noise = rng.integers(0, 256, (8, 8, 3)) * 0.9 + 16 * np.eye(3)[number] * (folder != "far")
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(tmp_path / folder / name / f"{n}.png")
    for number in range(3):
        write_clipn(tmp_path / f"base_{number}.pt", base_seed=number)
    write_clipn(tmp_path / "other_no_tower.pt", base_seed=0, no_seed=5)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""run: {{dir: {tmp_path}/run, device: cpu}}
data: {{workers: 0}}
features: {{dtype: float32}}
eval:
  id: {{pets: {tmp_path}/id}}
  ood: {{far: {tmp_path}/far, near: {tmp_path}/near}}
  train: {tmp_path}/train
  checkpoints: {tmp_path}/*.pt
  methods: [1NN]
  class_names: folders
  templates: simple
"""
    )
    return config


def test_the_command_writes_points_fits_and_a_plot(arranged, tmp_path, capsys, encoded):
    main(["correlation", "--config", str(arranged)])
    (out, err), folder = capsys.readouterr(), tmp_path / "run" / "correlation"
    assert files(folder) == ["fits.csv", "results.csv", "results.md", "scatter.png"]
    assert "done: " in out and (folder / "results.md").read_text() in out
    points, fits = pd.read_csv(folder / "results.csv"), pd.read_csv(folder / "fits.csv")
    assert list(points) == ["checkpoint", "id_set", "id_accuracy", "ood_set", "AUROC"]
    pd.testing.assert_frame_equal(fits, fit_lines(points))
    assert list(fits["ood_set"]) == ["far", "near", AVERAGE] and set(fits["n"]) == {3}
    assert "other_no_tower.pt is left out: its image tower is that of an earlier checkpoint" in err

    count = len(encoded)
    assert sum(encoded) == 3 * (3 * 12 + 3 * 9 + 20 + 16)
    results = evaluate(load_config(arranged)).results.iloc[:6]  # the fourth checkpoint repeats the first
    measured = points[points["ood_set"] != AVERAGE]
    np.testing.assert_allclose(measured["AUROC"], results["AUROC"])
    assert len(encoded) == count, "the features of the correlation serve the evaluation"
    means = measured.groupby("checkpoint")["AUROC"].mean()
    np.testing.assert_allclose(points[points["ood_set"] == AVERAGE].set_index("checkpoint")["AUROC"], means)


def test_the_accuracy_is_that_of_20_nn_on_the_towers_outputs(arranged):
    config = load_config(arranged)
    points, _ = correlate(config)
    accuracies, sets = (
        points.groupby("checkpoint", sort=False)["id_accuracy"].first().tolist(),
        open_sets(config.eval, train=True),
    )
    for accuracy, (model, _) in zip(accuracies, open_models(config), strict=False):
        stored = image_set_features(config, model, [sets.train, sets.id], tower=True)
        (train, _, bank), (images, _, outputs) = stored
        reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.02))
        reference.fit(bank["tower"].numpy(), train.labels)
        assert accuracy == pytest.approx(reference.score(outputs["tower"].numpy(), images.labels))
    assert len(set(accuracies)) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.checkpoints=[DIR/base_0.pt,DIR/base_1.pt]"], r"eval\.checkpoints: found 2; .* at least 3"),
        (["eval.checkpoints=null"], r"eval\.checkpoints: found 0; .* at least 3"),
        (["eval.checkpoints=DIR/none*.pt"], r"eval\.checkpoints='.*none\*\.pt': no such file"),
        (["eval.train=null", "eval.methods=[MCM]"], r"eval\.train: names no in-distribution training images"),
        (["eval.train=DIR/far"], r"eval\.train: .*needs class folders, but .*far has none"),
        (["eval.id={flat: DIR/far}", "eval.ood={near: DIR/near}"], r"eval\.id: 20-NN needs class folders, but .*far"),
        (["eval.id=null"], r"eval\.id: names no image set"),
    ],
)
def test_what_cannot_be_correlated_is_one_line_before_any_image_is_read(
    arranged, tmp_path, capsys, encoded, words, message
):
    with pytest.raises(SystemExit) as error:
        main(["correlation", "--config", str(arranged), *(word.replace("DIR", str(tmp_path)) for word in words)])
    assert error.value.code == 1 and not encoded
    assert re.search(message, capsys.readouterr().err)


def test_copies_of_one_base_are_too_few(arranged, tmp_path):
    config = load_config(arranged, [f"eval.checkpoints=[{tmp_path}/base_0.pt,{tmp_path}/base_1.pt,{tmp_path}/other*]"])
    with pytest.raises(ValueError, match=r"eval\.checkpoints: found 2; .* different image towers"):
        correlate(config)


def test_fewer_training_images_than_neighbours_all_vote(arranged, tmp_path, caplog):
    for number in range(6, 9):
        for name in CLASSES:
            (tmp_path / "train" / name / f"{number}.png").unlink()
    points, _ = correlate(load_config(arranged))
    assert "eval.train: 18 images are fewer than 20 neighbours: all vote" in messages(caplog)
    assert points["id_accuracy"].between(0, 1).all()
