"""Scores and decisions against plain loops, metrics against scikit-learn and their definitions."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from clipn.metrics import ood_metrics
from clipn.scores import DECISIONS, SCORES, p_yes

# One image at a time, one class at a time


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax(row: list[float]) -> list[float]:
    parts = [math.exp(value - max(row)) for value in row]
    return [part / sum(parts) for part in parts]


def plain_scores(yes: list[float], no: list[float], scale: float) -> dict[str, float]:
    top = yes.index(max(yes))
    chance = softmax(yes)
    says_yes = [sigmoid(y - n) for y, n in zip(yes, no, strict=True)]
    return {
        "MSP": max(chance),
        "MaxLogit": max(yes),
        "Energy": max(yes) + math.log(sum(math.exp(y - max(yes)) for y in yes)),
        "MCM": max(softmax([y / scale for y in yes])),
        "Entropy": sum(p * math.log(p) for p in chance if p > 0),
        "Variance": sum((p - 1 / len(chance)) ** 2 for p in chance) / len(chance),
        "CTW": says_yes[top],
        "ATD": sum(p * c for p, c in zip(says_yes, chance, strict=True)),
    }


def plain_decisions(yes: list[float], no: list[float]) -> dict[str, bool]:
    top = yes.index(max(yes))
    known = [sigmoid(y - n) * c for y, n, c in zip(yes, no, softmax(yes), strict=True)]
    return {"CTW": 1 - sigmoid(yes[top] - no[top]) > 0.5, "ATD": 1 - sum(known) > max(known)}


@st.composite
def logits(draw, limit: float = 30.0):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    # a coarse grid: ties of the top class would have two right answers, so they are kept out below
    values = st.integers(-1000, 1000).map(lambda n: n * limit / 1000)
    yes, no = (draw(arrays.arrays(np.float64, shape, elements=values)) for _ in range(2))
    return yes + np.linspace(0, 1e-3, shape[1]), no + 2e-4


@settings(deadline=None)
@given(pair=logits(), scale=st.sampled_from([1.0, 20.0, 100.0]))
def test_scores_are_those_of_a_plain_loop(pair, scale):
    yes, no = pair
    expected = [plain_scores(y.tolist(), n.tolist(), scale) for y, n in zip(yes, no, strict=True)]
    assert set(expected[0]) <= set(SCORES)
    for name in expected[0]:
        got = SCORES[name](torch.from_numpy(yes), torch.from_numpy(no), scale)
        assert got.shape == (len(yes),)
        np.testing.assert_allclose(got.numpy(), [row[name] for row in expected], rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(pair=logits(limit=6.0))
def test_decisions_are_those_of_a_plain_loop(pair):
    yes, no = pair
    expected = [plain_decisions(y.tolist(), n.tolist()) for y, n in zip(yes, no, strict=True)]
    assert set(expected[0]) == set(DECISIONS)
    for name, decide in DECISIONS.items():
        got = decide(torch.from_numpy(yes), torch.from_numpy(no))
        assert got.dtype == torch.bool
        assert got.tolist() == [row[name] for row in expected]


def test_a_small_case_by_hand():
    """Two classes of equal chance; the first is sure of yes, the second of no."""
    yes, no = torch.tensor([[0.0, 0.0]]), torch.tensor([[-math.log(3), math.log(3)]])
    assert torch.allclose(p_yes(yes, no), torch.tensor([[0.75, 0.25]]))
    expected = {"MSP": 0.5, "MaxLogit": 0, "Energy": math.log(2), "MCM": 0.5, "ATD": 0.5 * 0.75 + 0.5 * 0.25}
    expected |= {"Entropy": -math.log(2), "Variance": 0}
    for name, value in expected.items():
        assert SCORES[name](yes, no).item() == pytest.approx(value), name
    assert DECISIONS["ATD"](yes, no).tolist() == [True], "unknown 0.5 against 0.375 and 0.125"
    assert SCORES["CTW"](yes + torch.tensor([[0.1, 0.0]]), no).item() == pytest.approx(sigmoid(0.1 + math.log(3)))


def test_exactly_one_half_is_kept():
    yes = torch.tensor([[3.0, 1.0]])
    assert DECISIONS["CTW"](yes, yes).tolist() == [False], "OOD needs p_no above one half"


def test_mcm_reads_cosines_whatever_the_scale():
    cosines = torch.tensor([[0.3, 0.2, -0.1]], dtype=torch.float64)
    expected = cosines.softmax(dim=1).amax(dim=1)
    for scale in (1.0, 20.0, 100.0):
        assert torch.allclose(SCORES["MCM"](scale * cosines, None, scale), expected)


def test_higher_means_in_distribution():
    sure, unsure = torch.tensor([[30.0, 5.0, 5.0]]), torch.tensor([[20.0, 19.9, 19.8]])
    no_low, no_high = torch.tensor([[10.0, 20.0, 20.0]]), torch.tensor([[21.0, 21.0, 21.0]])
    for name, score in SCORES.items():
        assert score(sure, no_low).item() > score(unsure, no_high).item(), name
    for decide in DECISIONS.values():
        assert decide(sure, no_low).tolist() == [False] and decide(unsure, no_high).tolist() == [True]


@pytest.mark.parametrize("name", ["MSP", "MaxLogit", "Energy", "MCM", "Entropy", "Variance"])
def test_clips_own_scores_need_no_second_tower(name):
    yes = torch.tensor([[3.0, 1.0]])
    assert torch.equal(SCORES[name](yes, None), SCORES[name](yes, torch.tensor([[9.0, -9.0]])))


def test_entropy_and_variance_are_scipys_and_numpys():
    yes = 5 * torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chance = yes.softmax(dim=1).numpy()
    np.testing.assert_allclose(SCORES["Entropy"](yes).numpy(), -scipy.stats.entropy(chance, axis=1))
    np.testing.assert_allclose(SCORES["Variance"](yes).numpy(), np.var(chance, axis=1))
    one_class = yes[:, :1]
    assert not SCORES["Entropy"](one_class).any() and not SCORES["Variance"](one_class).any()


def test_huge_logits_stay_finite():
    rows = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [-1e4, 0.0, 1e4]]
    for yes in (torch.tensor(rows), -torch.tensor(rows)):
        for no in (torch.tensor(rows), -torch.tensor(rows)):
            for name, score in SCORES.items():
                values = score(yes, no, 100.0)
                assert torch.isfinite(values).all(), name
                if name in ("MSP", "MCM", "CTW", "ATD"):
                    assert ((values >= 0) & (values <= 1 + 1e-6)).all(), name


def test_images_do_not_influence_each_other():
    generator = torch.Generator().manual_seed(0)
    yes, no = (10 * torch.randn(6, 4, generator=generator) for _ in range(2))
    for name, score in SCORES.items():
        alone = torch.cat([score(yes[i : i + 1], no[i : i + 1]) for i in range(6)])
        assert torch.allclose(score(yes, no), alone), name


# Metrics


def draw_scores(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside, outside = rng.normal(1, 1, rng.integers(1, 200)), rng.normal(0, 1.5, rng.integers(1, 200))
    return (inside.round(1), outside.round(1)) if ties else (inside, outside)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_metrics_are_scikit_learns(seed, ties):
    inside, outside = draw_scores(seed, ties)
    scores = np.concatenate([inside, outside])
    is_id = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    fpr, tpr, _ = roc_curve(is_id, scores, drop_intermediate=False)
    got = ood_metrics(inside, outside)
    assert set(got) == {"AUROC", "FPR95", "AUPR_IN", "AUPR_OUT"}
    assert all(type(value) is float for value in got.values())
    assert got["AUROC"] == pytest.approx(roc_auc_score(is_id, scores))
    assert got["FPR95"] == pytest.approx(np.interp(0.95, tpr, fpr))
    assert got["AUPR_IN"] == pytest.approx(average_precision_score(is_id, scores))
    assert got["AUPR_OUT"] == pytest.approx(average_precision_score(1 - is_id, -scores))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_the_right_order(seed):
    inside, outside = draw_scores(seed, ties=True)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    assert ood_metrics(inside, outside)["AUROC"] == pytest.approx(np.mean(wins))


@pytest.mark.parametrize("count", [7, 33, 199])
def test_fpr95_is_the_share_of_ood_above_the_threshold(count):
    """No two scores are equal, and no number of ID images is 95 % exactly: one threshold is the answer."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        inside, outside = rng.normal(1, 1, count), rng.normal(0, 1, 150)
        threshold = next(t for t in sorted(inside, reverse=True) if np.mean([s >= t for s in inside]) >= 0.95)
        assert ood_metrics(inside, outside)["FPR95"] == pytest.approx(np.mean([s > threshold for s in outside]))


def test_fpr95_by_hand():
    """20 ID scores 1..20: 95 % are those above 1, so the threshold is 2, and 3 of 4 OOD scores lie above it."""
    inside = np.arange(1, 21, dtype=float)
    assert ood_metrics(inside, np.array([0.0, 5.5, 7.5, 30.0]))["FPR95"] == 0.75
    assert ood_metrics(inside, np.array([0.0, 0.5]))["FPR95"] == 0


def test_id_is_the_positive_class():
    inside, outside = np.array([1.0, 1, 1, 0]), np.array([0.0] * 15 + [1.0])
    taken_from_id = ood_metrics(inside, outside)["FPR95"]
    assert taken_from_id == pytest.approx(1 / 16 + 15 / 16 * (0.95 - 0.75) / 0.25)
    assert ood_metrics(-outside, -inside)["FPR95"] != pytest.approx(taken_from_id)


def test_perfect_reversed_and_blind():
    low, high, same = np.array([0.0, 1, 2]), np.array([5.0, 6]), np.full(7, 3.0)
    assert ood_metrics(high, low) == {"AUROC": 1, "FPR95": 0, "AUPR_IN": 1, "AUPR_OUT": 1}
    reverse = ood_metrics(low, high)
    assert (reverse["AUROC"], reverse["FPR95"]) == (0, 1)
    blind = ood_metrics(same, same[:3])
    assert blind["AUROC"] == 0.5 and blind["FPR95"] == pytest.approx(0.95)
    assert blind["AUPR_IN"] == pytest.approx(0.7) and blind["AUPR_OUT"] == pytest.approx(0.3)


def test_one_image_on_each_side():
    one, two = np.array([1.0]), np.array([2.0])
    assert ood_metrics(two, one)["AUROC"] == 1 and ood_metrics(one, two)["AUROC"] == 0
    assert ood_metrics(one, one)["AUROC"] == 0.5


def test_scores_may_be_lists_or_tensors():
    inside, outside = [0.2, 0.9, 0.4], [0.1, 0.5]
    expected = ood_metrics(np.array(inside), np.array(outside))
    assert ood_metrics(inside, outside) == expected
    assert ood_metrics(torch.tensor(inside).double(), torch.tensor(outside).double()) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    fine, broken = np.array([0.0, 1.0]), np.array([0.0, bad, 1.0])
    with pytest.raises(ValueError, match="id_scores: 1 of 3"):
        ood_metrics(broken, fine)
    with pytest.raises(ValueError, match="ood_scores: 1 of 3"):
        ood_metrics(fine, broken)


def test_an_empty_side_is_refused():
    with pytest.raises(ValueError, match="id_scores: empty"):
        ood_metrics(np.array([]), np.array([1.0]))
    with pytest.raises(ValueError, match="ood_scores: empty"):
        ood_metrics(np.array([1.0]), np.array([]))


SIDE = st.lists(st.integers(-50, 50), min_size=1, max_size=30)


@settings(deadline=None)
@given(inside=SIDE, outside=SIDE)
def test_only_the_order_of_scores_counts(inside, outside):
    inside, outside = np.array(inside) / 10, np.array(outside) / 10
    expected = ood_metrics(inside, outside)
    for change in (np.exp, np.arctan, lambda x: 1e-3 * x + 7, lambda x: x**3):
        got = ood_metrics(change(inside), change(outside))
        assert got == pytest.approx(expected), "AUROC, FPR95 and both precisions"
    assert all(0 <= value <= 1 for value in expected.values())
    assert ood_metrics(-inside, -outside)["AUROC"] == pytest.approx(1 - expected["AUROC"])


@settings(deadline=None)
@given(inside=SIDE, outside=SIDE, seed=st.integers(0, 99))
def test_the_order_of_images_does_not_count(inside, outside, seed):
    rng = np.random.default_rng(seed)
    mixed = ood_metrics(rng.permutation(inside), rng.permutation(outside))
    assert mixed == pytest.approx(ood_metrics(np.array(inside), np.array(outside)))
