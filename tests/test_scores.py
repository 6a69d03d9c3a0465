"""Scores and decisions against plain loops."""

import itertools
import math

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

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


@st.composite
def logits(draw, limit: float = 30.0):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    # a coarse grid, whose columns are shifted: CTW would have two right answers for two equal top classes
    values = st.integers(-1000, 1000).map(lambda n: n * limit / 1000)
    yes, no = (draw(arrays.arrays(np.float64, shape, elements=values)) for _ in range(2))
    return yes + np.linspace(0, 1e-3, shape[1]), no + 2e-4


@settings(max_examples=50, deadline=None)
@given(pair=logits(), scale=st.sampled_from([1.0, 20.0, 100.0]))
def test_scores_are_those_of_a_plain_loop(pair, scale):
    yes, no = pair
    expected = [plain_scores(y.tolist(), n.tolist(), scale) for y, n in zip(yes, no, strict=True)]
    assert set(expected[0]) == set(SCORES)
    for name, score in SCORES.items():
        actual = score(torch.from_numpy(yes), torch.from_numpy(no), scale)
        np.testing.assert_allclose(actual.numpy(), [row[name] for row in expected], rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(pair=logits(limit=6.0))
def test_decisions_are_those_of_a_plain_loop(pair):
    expected = {"CTW": [], "ATD": []}
    for yes, no in zip(*(array.tolist() for array in pair), strict=True):
        probabilities = [sigmoid(y - n) * c for y, n, c in zip(yes, no, softmax(yes), strict=True)]
        unknown = 1 - sum(probabilities)
        assume(abs(unknown - max(probabilities)) > 1e-9)
        top = yes.index(max(yes))
        expected["CTW"].append(1 - sigmoid(yes[top] - no[top]) > 0.5)
        expected["ATD"].append(unknown > max(probabilities))
    actual = {name: decide(*map(torch.from_numpy, pair)).tolist() for name, decide in DECISIONS.items()}
    assert actual == expected


def test_decisions_by_hand():
    """Two classes of equal probability; the no tower favours yes for the first and no for the second."""
    yes, no = torch.tensor([[0.0, 0.0]]), torch.tensor([[-math.log(3), math.log(3)]])
    assert torch.allclose(p_yes(yes, no), torch.tensor([[0.75, 0.25]]))
    assert DECISIONS["ATD"](yes, no).tolist() == [True], "unknown 0.5 against 0.375 and 0.125"
    assert DECISIONS["CTW"](yes, yes).tolist() == [False], "OOD needs p_no above one half"


def test_higher_means_in_distribution():
    sure, unsure = torch.tensor([[30.0, 5.0, 5.0]]), torch.tensor([[20.0, 19.9, 19.8]])
    no_low, no_high = torch.tensor([[10.0, 20.0, 20.0]]), torch.tensor([[21.0, 21.0, 21.0]])
    for name, score in SCORES.items():
        assert score(sure, no_low).item() > score(unsure, no_high).item(), name
    for decide in DECISIONS.values():
        assert decide(sure, no_low).tolist() == [False] and decide(unsure, no_high).tolist() == [True]


def test_scores_of_clip_alone_ignore_the_no_tower():
    yes = torch.tensor([[3.0, 1.0]])
    for name in set(SCORES) - {"CTW", "ATD"}:
        assert torch.equal(SCORES[name](yes, None), SCORES[name](yes, torch.tensor([[9.0, -9.0]])))


def test_huge_logits_stay_finite():
    rows = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [-1e4, 0.0, 1e4]])
    for yes, no in itertools.product((rows, -rows), repeat=2):
        for name, score in SCORES.items():
            values = score(yes, no, 100.0)
            assert torch.isfinite(values).all(), name
            if name in ("MSP", "MCM", "CTW", "ATD"):
                assert ((values >= 0) & (values <= 1 + 1e-6)).all(), name
