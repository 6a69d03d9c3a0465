"""The losses against plain slow versions, at extreme margins, and split over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipn.losses import itbo_loss, tso_loss


def unit(rows, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def slow_itbo(image, yes, no, scale):
    matched, unmatched = [], []
    for i, f in enumerate(image.double()):
        for j in range(len(yes)):
            margin = float(scale * (f @ no[j].double() - f @ yes[j].double()))
            softplus = max(margin if i == j else -margin, 0) + math.log1p(math.exp(-abs(margin)))
            (matched if i == j else unmatched).append(softplus)
    return sum(matched) / len(matched), sum(unmatched) / len(unmatched)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.sampled_from([0.1, 1.0, 20.0, 100.0]), st.integers(0, 1000))
def test_itbo_is_the_slow_version(pairs, scale, seed):
    image, yes, no = (unit(pairs, seed=3 * seed + k) for k in range(3))
    found = itbo_loss(image, yes, no, scale)
    assert [float(term) for term in found] == pytest.approx(slow_itbo(image, yes, no, scale), rel=1e-4, abs=1e-6)


def test_itbo_is_finite_with_gradients_at_any_margin():
    yes = unit(4)
    no = (-yes).requires_grad_(True)
    terms = itbo_loss(yes, yes, no, 1e6)
    sum(terms).backward()
    assert all(term.isfinite() for term in terms) and no.grad.isfinite().all()
    assert terms[0].item() == 0  # every matched text's no loses by far


@pytest.mark.parametrize("ranks", [2, 3])
def test_mean_over_ranks_is_the_joined_batch(ranks):
    image, yes = unit(12, seed=1), unit(12, seed=2)
    no = unit(12, seed=3).requires_grad_(True)
    whole = itbo_loss(image, yes, no, 20.0)
    (gradient,) = torch.autograd.grad(sum(whole) + tso_loss(yes, no), no)
    share = 12 // ranks
    parts = []
    for first in range(0, 12, share):
        mine = slice(first, first + share)
        parts.append((*itbo_loss(image, yes[mine], no[mine], 20.0, first), tso_loss(yes[mine], no[mine])))
    for k in range(2):
        torch.testing.assert_close(sum(part[k] for part in parts) / ranks, whole[k])
    (shared,) = torch.autograd.grad(sum(sum(part) for part in parts) / ranks, no)
    torch.testing.assert_close(shared, gradient)


def test_one_pair_has_no_unmatched_text():
    with pytest.raises(ValueError, match="at least 2"):
        itbo_loss(unit(1), unit(1), unit(1), 20.0)


def test_tso_kinds():
    yes, no = unit(5, seed=1), unit(5, seed=2)
    l2 = [2 - math.sqrt(2 - 2 * float(g @ n) + 1e-4) for g, n in zip(yes, no, strict=True)]
    cosine = [1 + float(g @ n) for g, n in zip(yes, no, strict=True)]
    assert float(tso_loss(yes, no)) == pytest.approx(sum(l2) / 5, rel=1e-5)
    assert float(tso_loss(yes, no, "cosine")) == pytest.approx(sum(cosine) / 5, rel=1e-5)
    with pytest.raises(ValueError, match="'l1'.*'l2' or 'cosine'"):
        tso_loss(yes, no, "l1")


def test_tso_of_equal_features_has_a_finite_gradient():
    yes = unit(5)
    no = yes.clone().requires_grad_(True)
    tso_loss(yes, no).backward()
    assert no.grad.isfinite().all()


def test_losses_stay_in_float32_under_autocast():
    image, yes, no = (unit(6, seed=k) for k in range(3))
    plain = itbo_loss(image, yes, no, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = itbo_loss(image, yes, no, 100.0)
    torch.testing.assert_close(mixed, plain)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 200), st.integers(0, 1000))
def test_block_by_block_is_the_direct_loss(images, texts, block, seed):
    texts = min(images, texts)
    image, yes, no = unit(images, seed=seed), unit(texts, seed=seed + 1), unit(texts, seed=seed + 2)
    inputs = [image.requires_grad_(), yes.requires_grad_(), no.requires_grad_(), torch.tensor(20.0, requires_grad=True)]
    direct = itbo_loss(*inputs, first=images - texts)
    blocked = itbo_loss(*inputs, first=images - texts, block=block)
    torch.testing.assert_close(blocked, direct)
    for term in (0, 1):
        expected = torch.autograd.grad(direct[term], inputs, retain_graph=True)
        found = torch.autograd.grad(blocked[term], inputs, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_never_holds_all_margins():
    held = []

    def note(tensor):
        held.append(tensor.numel())
        return tensor

    image, yes, no = unit(64, seed=1), unit(64, seed=2), unit(64, seed=3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sum(itbo_loss(image, yes, no, 20.0, block=128))
    assert max(held) <= 64 * 8  # the features themselves
