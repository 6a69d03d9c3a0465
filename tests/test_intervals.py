"""Bootstrap intervals against plain resampling."""

import numpy as np
import pytest

from clipn.metrics import bootstrap_interval, ood_metrics


@pytest.mark.parametrize("metric", ["AUROC", "FPR95", "AUPR_IN", "AUPR_OUT"])
def test_an_interval_is_that_of_plain_resampling(metric):
    """Scores with ties; each draw as a plain one with `ood_metrics` on the drawn scores."""
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(1, 1, 60).round(1), rng.normal(0, 1, 40).round(1)
    rng = np.random.default_rng(7)
    values = []
    for _ in range(200):
        drawn = inside[rng.integers(60, size=60)], outside[rng.integers(40, size=40)]
        values.append(ood_metrics(*drawn)[metric])
    low, high = bootstrap_interval(inside, outside, metric, draws=200, seed=7)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-9)
    assert low < ood_metrics(inside, outside)[metric] < high
    assert bootstrap_interval(inside, outside, metric, 200, seed=8) != (low, high)


def test_an_interval_narrows_with_more_images():
    rng = np.random.default_rng(0)
    few, many = (bootstrap_interval(rng.normal(1, 1, n), rng.normal(0, 1, n), "AUROC", 200) for n in (50, 5000))
    assert many[1] - many[0] < 0.3 * (few[1] - few[0])


def test_an_interval_of_equal_or_parted_scores():
    assert bootstrap_interval(np.ones(5), np.zeros(3), "AUROC", 20) == (1, 1)
    assert bootstrap_interval(np.ones(5), np.ones(3), "AUROC", 20) == (0.5, 0.5)
    assert bootstrap_interval(np.ones(1), np.zeros(1), "FPR95", 20) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [0.0], "F1", 10), "metric='F1': expected one of AUROC, FPR95, AUPR_IN, AUPR_OUT"),
        (([1.0], [0.0], "AUROC", 0), "draws=0: expected at least 1"),
        (([], [0.0], "AUROC", 10), "id_scores: empty"),
        (([1.0], [float("nan")], "AUROC", 10), "ood_scores: 1 of 1 scores are NaN"),
    ],
)
def test_an_interval_that_cannot_be(arguments, message):
    with pytest.raises(ValueError) as error:
        bootstrap_interval(*arguments)
    assert message in str(error.value)
