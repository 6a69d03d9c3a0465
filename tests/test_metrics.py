"""Metrics and bootstrap intervals against their definitions in plain loops, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipn.metrics import bootstrap_interval, ood_metrics

NAMES = ["AUROC", "FPR95", "AUPR_IN", "AUPR_OUT"]


def draw_scores(seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside, outside = rng.normal(1, 1, rng.integers(1, 100)), rng.normal(0, 1.5, rng.integers(1, 100))
    return (inside.round(1), outside.round(1)) if ties else (inside, outside)


def average_precision(positive, negative) -> float:
    """The sum over thresholds, highest first, of precision times the step in recall."""
    area, recall = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        hits, misses = np.sum(positive >= threshold), np.sum(negative >= threshold)
        area += hits / (hits + misses) * (hits / len(positive) - recall)
        recall = hits / len(positive)
    return area


def fpr95(inside, outside) -> float:
    """The curve through (tpr, fpr) at every threshold, at tpr = 0.95."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*inside, *outside}, reverse=True):
        points.append((np.mean(inside >= threshold), np.mean(outside >= threshold)))
    after = next(k for k, (tpr, _) in enumerate(points) if tpr > 0.95)
    (tpr, fpr), (next_tpr, next_fpr) = points[after - 1], points[after]
    return fpr + (next_fpr - fpr) * (0.95 - tpr) / (next_tpr - tpr)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_metrics_follow_their_definitions(seed, ties):
    inside, outside = draw_scores(seed, ties)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    metrics = ood_metrics(inside, outside)
    assert list(metrics) == NAMES and all(type(value) is float for value in metrics.values())
    aupr = average_precision(inside, outside), average_precision(-outside, -inside)
    assert list(metrics.values()) == pytest.approx([np.mean(wins), fpr95(inside, outside), *aupr])


def test_fpr95_by_hand_with_id_as_the_positive_class():
    """20 ID scores 1..20: 95 % are those above 1, so the threshold is 2, and 3 of 4 OOD scores are above it."""
    inside = np.arange(1, 21, dtype=float)
    assert ood_metrics(inside, np.array([0.0, 5.5, 7.5, 30.0]))["FPR95"] == 0.75
    assert ood_metrics(inside, np.array([0.0, 0.5]))["FPR95"] == 0
    assert ood_metrics(inside, np.array([1.5]))["FPR95"] == 1, "of the points at exactly 95 %, the highest"
    inside, outside = np.array([1.0, 1, 1, 0]), np.array([0.0] * 15 + [1.0])
    assert ood_metrics(inside, outside)["FPR95"] == pytest.approx(1 / 16 + 15 / 16 * (0.95 - 0.75) / 0.25)


def test_separated_reversed_and_equal_scores():
    low, high, same = [0.0, 1, 2], [5.0, 6], [3.0] * 7
    assert ood_metrics(high, low) == {"AUROC": 1, "FPR95": 0, "AUPR_IN": 1, "AUPR_OUT": 1}
    reverse = ood_metrics(torch.tensor(low), torch.tensor(high))
    assert (reverse["AUROC"], reverse["FPR95"]) == (0, 1)
    assert list(ood_metrics(same, same[:3]).values()) == pytest.approx([0.5, 0.95, 0.7, 0.3])


@pytest.mark.parametrize("function", [ood_metrics, lambda *sides: bootstrap_interval(*sides, "AUROC", 10)])
@pytest.mark.parametrize("bad", [[], [0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0], [0.0, -float("inf"), 1.0]])
def test_bad_scores_are_refused(function, bad):
    message = "1 of 3 scores are NaN or infinite" if bad else "empty"
    with pytest.raises(ValueError, match=f"^id_scores: {message}"):
        function(bad, [0.0, 1.0])
    with pytest.raises(ValueError, match=f"^ood_scores: {message}"):
        function([0.0, 1.0], bad)


SIDE = st.lists(st.integers(-50, 50), min_size=1, max_size=30)


@settings(max_examples=15, deadline=None)
@given(inside=SIDE, outside=SIDE)
def test_only_the_order_of_scores_counts(inside, outside):
    inside, outside = np.array(inside) / 10, np.array(outside) / 10
    expected = ood_metrics(inside, outside)
    for change in (np.exp, lambda x: 1e-3 * x + 7, lambda x: x[::-1]):
        assert ood_metrics(change(inside), change(outside)) == pytest.approx(expected)
    assert all(0 <= value <= 1 for value in expected.values())


# Bootstrap intervals


@pytest.fixture(scope="module")
def resampled():
    """ID and OOD scores with ties, and each metric of 100 plain draws with seed 7."""
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(1, 1, 60).round(1), rng.normal(0, 1, 40).round(1)
    rng = np.random.default_rng(7)
    draws = [ood_metrics(inside[rng.integers(60, size=60)], outside[rng.integers(40, size=40)]) for _ in range(100)]
    return inside, outside, {name: [draw[name] for draw in draws] for name in NAMES}


@pytest.mark.parametrize("metric", NAMES)
def test_an_interval_is_that_of_plain_resampling(resampled, metric):
    inside, outside, values = resampled
    low, high = bootstrap_interval(inside, outside, metric, draws=100, seed=7)
    assert (low, high) == pytest.approx(tuple(np.quantile(values[metric], [0.025, 0.975])), abs=1e-9)
    assert low < ood_metrics(inside, outside)[metric] < high
    assert bootstrap_interval(inside, outside, metric, 100, seed=8) != (low, high)


def test_an_interval_narrows_with_more_images():
    rng = np.random.default_rng(0)
    few, many = (bootstrap_interval(rng.normal(1, 1, n), rng.normal(0, 1, n), "AUROC", 200) for n in (50, 5000))
    assert many[1] - many[0] < 0.3 * (few[1] - few[0])


def test_an_interval_of_equal_or_separated_scores():
    assert bootstrap_interval(np.ones(5), np.zeros(3), "AUROC", 20) == (1, 1)
    assert bootstrap_interval(np.ones(5), np.ones(3), "AUROC", 20) == (0.5, 0.5)
    assert bootstrap_interval(np.ones(1), np.zeros(1), "FPR95", 20) == (0, 0)


def test_bad_arguments_of_an_interval_are_refused():
    with pytest.raises(ValueError, match="metric='F1': expected one of AUROC, FPR95, AUPR_IN, AUPR_OUT"):
        bootstrap_interval([1.0], [0.0], "F1")
    with pytest.raises(ValueError, match="draws=0: expected at least 1"):
        bootstrap_interval([1.0], [0.0], "AUROC", draws=0)
