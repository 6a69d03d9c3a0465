"""The losses against plain slow versions, at extreme margins, in blocks, and split over ranks."""

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


@torch.no_grad()
def slow_itbo(image, yes, no, scale, first):
    matched, unmatched = [], []
    for i, f in enumerate(image.double()):
        for j in range(len(yes)):
            margin = float(scale * (f @ no[j].double() - f @ yes[j].double()))
            softplus = max(margin if i == first + j else -margin, 0) + math.log1p(math.exp(-abs(margin)))
            (matched if i == first + j else unmatched).append(softplus)
    return sum(matched) / len(matched), sum(unmatched) / len(unmatched)


BATCH = {"images": st.integers(2, 9), "texts": st.integers(1, 9), "block": st.integers(1, 100)}


@settings(max_examples=25, deadline=None)
@given(**BATCH, scale=st.sampled_from([0.1, 20.0, 100.0]), seed=st.integers(0, 1000))
def test_itbo_equals_the_slow_version_for_any_block_size(images, texts, block, scale, seed):
    texts = min(images, texts)
    image, yes, no = unit(images, seed=3 * seed), unit(texts, seed=3 * seed + 1), unit(texts, seed=3 * seed + 2)
    inputs = [image.requires_grad_(), yes.requires_grad_(), no.requires_grad_(), torch.tensor(scale).requires_grad_()]
    first = images - texts
    direct, blocked = itbo_loss(*inputs, first=first), itbo_loss(*inputs, first=first, block=block)
    expected = slow_itbo(image, yes, no, scale, first)
    assert [float(term.detach()) for term in blocked] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for term in (0, 1):
        expected = torch.autograd.grad(direct[term], inputs, retain_graph=True)
        actual = torch.autograd.grad(blocked[term], inputs, retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("sign", [1, -1], ids=["equal features", "opposite features"])
def test_losses_and_gradients_are_finite_at_any_margin(sign):
    yes = unit(4)
    no = (sign * yes).requires_grad_(True)
    terms = (*itbo_loss(yes, yes, no, 1e6), tso_loss(yes, no))
    sum(terms).backward()
    assert all(term.isfinite() for term in terms) and no.grad.isfinite().all()
    assert sign == 1 or terms[0].item() == 0, "every matched margin is about -2e6"


def test_itbo_never_holds_all_margins():
    sizes = []
    image, yes, no = unit(64, seed=1), unit(64, seed=2), unit(64, seed=3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sum(itbo_loss(image, yes, no, 20.0, block=128))
    assert max(sizes) <= 64 * 8, "the features are the largest tensor"


def test_itbo_needs_two_images():
    with pytest.raises(ValueError, match="a batch of 1 pair .* at least 2"):
        itbo_loss(unit(1), unit(1), unit(1), 20.0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_over_ranks_is_the_loss_of_the_joined_batch(ranks):
    image, yes = unit(12, seed=1), unit(12, seed=2)
    no = unit(12, seed=3).requires_grad_(True)
    joined = (*itbo_loss(image, yes, no, 20.0), tso_loss(yes, no))
    size = 12 // ranks
    parts = [
        (*itbo_loss(image, g, n, 20.0, first=rank * size), tso_loss(g, n))
        for rank, (g, n) in enumerate(zip(yes.split(size), no.split(size), strict=True))
    ]
    means = tuple(sum(terms) / ranks for terms in zip(*parts, strict=True))
    torch.testing.assert_close(means, joined)
    torch.testing.assert_close(torch.autograd.grad(sum(means), no), torch.autograd.grad(sum(joined), no))


def test_tso_kinds():
    yes, no = unit(5, seed=1), unit(5, seed=2)
    cosines = [float(g @ n) for g, n in zip(yes, no, strict=True)]
    l2 = sum(2 - math.sqrt(2 - 2 * cosine + 1e-4) for cosine in cosines) / 5
    assert float(tso_loss(yes, no)) == pytest.approx(l2, rel=1e-5)
    assert float(tso_loss(yes, no, "cosine")) == pytest.approx(1 + sum(cosines) / 5, rel=1e-5)
    with pytest.raises(ValueError, match="'l1'.*'l2' or 'cosine'"):
        tso_loss(yes, no, "l1")


def test_losses_stay_in_float32_under_autocast():
    image, yes, no = (unit(6, seed=k) for k in range(3))
    plain = (*itbo_loss(image, yes, no, 100.0), tso_loss(yes, no))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = (*itbo_loss(image, yes, no, 100.0), tso_loss(yes, no))
    torch.testing.assert_close(mixed, plain)
