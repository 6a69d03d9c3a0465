"""Scores and decisions against their formulas, one image at a time, with scipy's functions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import entr, expit, logsumexp, softmax

from clipn.scores import DECISIONS, LOG_ODDS, SCORES, p_yes


def plain_scores(yes: np.ndarray, no: np.ndarray, scale: float) -> dict[str, float]:
    """Of one image, from its logits [C]."""
    chance, says_yes = softmax(yes), expit(yes - no)
    return {
        "MSP": max(chance),
        "MaxLogit": max(yes),
        "Energy": logsumexp(yes),
        "MCM": max(softmax(yes / scale)),
        "Entropy": -sum(entr(chance)),
        "Variance": np.var(chance),
        "CTW": says_yes[yes.argmax()],
        "ATD": says_yes @ chance,
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
def test_scores_are_those_of_their_formulas(pair, scale):
    expected = [plain_scores(yes, no, scale) for yes, no in zip(*pair, strict=True)]
    assert set(expected[0]) == set(SCORES)
    for name, score in SCORES.items():
        actual = score(*map(torch.from_numpy, pair), scale)
        np.testing.assert_allclose(actual.numpy(), [row[name] for row in expected], rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(pair=logits(limit=6.0))
def test_decisions_are_those_of_their_formulas(pair):
    expected = {"CTW": [], "ATD": []}
    for yes, no in zip(*pair, strict=True):
        probabilities, top = expit(yes - no) * softmax(yes), yes.argmax()
        unknown = 1 - sum(probabilities)
        assume(abs(unknown - max(probabilities)) > 1e-9)
        expected["CTW"].append(expit(no[top] - yes[top]) > 0.5)
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
    """The first image is surely of a class, and the second of none."""
    yes, no = torch.tensor([[30.0, 5, 5], [20, 19.9, 19.8]]), torch.tensor([[10.0, 20, 20], [21, 21, 21]])
    for name, score in SCORES.items():
        assert score(yes, no).argmax() == 0, name
    assert all(decide(yes, no).tolist() == [False, True] for decide in DECISIONS.values())


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


@settings(max_examples=50, deadline=None)
@given(logits(limit=8.0), st.floats(-3, 3))
def test_log_odds_are_those_of_the_scores(pair, bias):
    yes, no = (torch.from_numpy(values).double() for values in pair)
    assume(yes.shape[1] > 1)
    for name, log_odds in LOG_ODDS.items():
        score = SCORES[name](yes, no, bias=bias)
        torch.testing.assert_close(log_odds(yes, no, bias=bias), score.logit(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_odds_of_equal_huge_logits_and_of_one_class(dtype):
    equal = torch.full((1, 3), 1e4, dtype=dtype)
    assert LOG_ODDS["MSP"](equal).item() == pytest.approx(-math.log(2), rel=1e-2)
    assert LOG_ODDS["MSP"](equal[:, :1]).item() == torch.finfo(dtype).max, "MSP is 1"
    assert LOG_ODDS["ATD"](equal, -equal).item() == pytest.approx(2e4, rel=1e-2)


def test_log_odds_order_scores_that_round_to_one():
    yes = torch.tensor([[30.0, 0.0], [40.0, 0.0], [50.0, 0.0]])
    no = yes - torch.tensor([[30.0], [25.0], [20.0]])
    for name, order in (("MSP", [0, 1, 2]), ("CTW", [2, 1, 0]), ("ATD", [2, 1, 0])):
        assert (SCORES[name](yes, no) == 1).all()
        assert LOG_ODDS[name](yes, no).argsort().tolist() == order
