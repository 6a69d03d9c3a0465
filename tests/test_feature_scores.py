"""Scores fitted on training features against numpy, scikit-learn and plain loops, and their edge cases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from clipn import feature_scores
from clipn.methods.from_features import FEATURE_SCORES, principal_dim
from clipn.model.head import Head

CLASSES, WIDTH, SCALE = 4, 12, 20.0


def unit(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def made_world(count: int = 160, classes: int = CLASSES, width: int = WIDTH, spread: float = 0.1):
    """Training features about their class's weight, their labels, the head; new ID features, and features anywhere."""
    head = Head(unit((classes, width), 0), unit((classes, width), 1))
    labels = torch.arange(count) % classes
    train = F.normalize(head.weight_yes[labels] + spread * torch.randn(count, width, generator=seeded(2)), dim=1)
    inside = F.normalize(head.weight_yes[labels] + spread * torch.randn(count, width, generator=seeded(3)), dim=1)
    return train, labels, head, inside, unit((count, width), 4)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# One image at a time


def plain_mahalanobis(train, labels, images, classes):
    means = np.array([train[labels == c].mean(axis=0) for c in range(classes)])
    within = EmpiricalCovariance(assume_centered=True).fit(train - means[labels]).precision_
    whole = EmpiricalCovariance().fit(train).precision_
    middle = train.mean(axis=0)
    nearest = [min((f - m) @ within @ (f - m) for m in means) for f in images]
    relative = [near - (f - middle) @ whole @ (f - middle) for near, f in zip(nearest, images, strict=True)]
    return {"Mahalanobis": [-near for near in nearest], "RMD": [-value for value in relative]}


def plain_vim(train, images, weights, dim):
    """With the general origin -pinv(W) b, here of no bias; the covariance's eigenvectors by numpy."""
    origin = -np.linalg.pinv(SCALE * weights) @ np.zeros(len(weights))
    covariance = EmpiricalCovariance(assume_centered=True).fit(train - origin).covariance_
    values, vectors = np.linalg.eig(covariance)
    outside = vectors[:, np.argsort(-values)[dim:]]

    def outer(features):
        return [np.linalg.norm((f - origin) @ outside) for f in features]

    alpha = np.mean([max(SCALE * weights @ f) for f in train]) / np.mean(outer(train))
    energy = [logsumexp(SCALE * weights @ f) for f in images]
    return {
        "Residual": [-length for length in outer(images)],
        "ViM": [e - alpha * length for e, length in zip(energy, outer(images), strict=True)],
    }


def plain_react(train, images, weights):
    limit = np.sort(train.ravel())
    place = 0.9 * (limit.size - 1)
    low = math.floor(place)
    limit = limit[low] + (place - low) * (limit[low + 1] - limit[low])
    return [
        logsumexp([SCALE * sum(min(x, limit) * w for x, w in zip(f, row, strict=True)) for row in weights])
        for f in images
    ]


def plain_scores(train, labels, head, images):
    train, images, labels = train.double().numpy(), images.double().numpy(), labels.numpy()
    weights = head.weight_yes.double().numpy()
    distance, _ = NearestNeighbors(n_neighbors=1).fit(train).kneighbors(images)
    return {
        "kNN": -distance[:, 0],
        **plain_mahalanobis(train, labels, images, len(weights)),
        **plain_vim(train, images, weights, principal_dim(train.shape[1])),
        "ReAct": plain_react(train, images, weights),
    }


@pytest.fixture(scope="module")
def world():
    return made_world()


def test_scores_are_those_of_plain_loops(world):
    train, labels, head, inside, outside = world
    images = torch.cat([inside[:30], outside[:30]])
    expected = plain_scores(train, labels, head, images)
    assert set(expected) == set(FEATURE_SCORES)
    for name, fit in FEATURE_SCORES.items():
        got = fit(train, labels, head, SCALE)(images)
        assert got.shape == (60,) and got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_higher_means_in_distribution(world, name):
    train, labels, head, inside, outside = world
    score = FEATURE_SCORES[name](train, labels, head, SCALE)
    assert score(inside).quantile(0.25) > score(outside).quantile(0.75)


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_blocks_do_not_show(world, monkeypatch, name):
    """Neither the images' nor the training images' blocks, nor what they are stored as."""
    train, labels, head, inside, outside = world
    images = torch.cat([inside, outside])
    whole = FEATURE_SCORES[name](train, labels, head, SCALE)(images)
    monkeypatch.setattr(feature_scores, "_ROWS", 7)
    monkeypatch.setattr(feature_scores, "_BANK", 11)
    again = FEATURE_SCORES[name](train, labels, head, SCALE)(images)
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)
    half = FEATURE_SCORES[name](train.half(), labels.int(), head, SCALE)(images)
    torch.testing.assert_close(half, whole, rtol=0.02, atol=0.02)


def test_the_neighbour_goes_with_the_number_of_training_images(monkeypatch):
    train, labels, head, inside, _ = made_world(count=90)
    for per_neighbour, k in ((1000, 1), (90, 1), (30, 3), (1, 90)):
        monkeypatch.setattr(feature_scores, "IMAGES_PER_NEIGHBOUR", per_neighbour)
        monkeypatch.setattr(feature_scores, "_BANK", 20)
        expected, _ = NearestNeighbors(n_neighbors=k).fit(train.numpy()).kneighbors(inside.numpy())
        got = FEATURE_SCORES["kNN"](train, None, head, SCALE)(inside)
        np.testing.assert_allclose(got.numpy(), -expected[:, -1], atol=1e-5)


def test_an_image_of_the_training_set_is_its_own_neighbour(world):
    train, labels, head, _, _ = world
    assert FEATURE_SCORES["kNN"](train, labels, head, SCALE)(train).abs().max() < 1e-3


def test_the_principal_space_is_that_of_the_paper_where_it_fits():
    assert [principal_dim(width) for width in (2048, 1024, 768, 512, 32, 3)] == [1000, 512, 512, 256, 16, 1]


def test_vims_alpha_matches_the_largest_logits(world):
    """On the training images the virtual logit is on average as large as the largest logit."""
    train, labels, head, _, _ = world
    virtual = (SCALE * train @ head.weight_yes.T).logsumexp(1) - FEATURE_SCORES["ViM"](train, labels, head, SCALE)(
        train
    )
    assert virtual.mean().item() == pytest.approx((SCALE * train @ head.weight_yes.T).amax(1).mean().item(), rel=1e-4)


def test_a_longer_outer_part_never_means_in_distribution():
    """Not where all cosines are negative, as a base with a logit bias has them."""
    train, _, head, inside, _ = made_world(classes=1)
    against = Head(-head.weight_yes, head.weight_no)
    virtual = (SCALE * inside @ against.weight_yes.T).logsumexp(1) - FEATURE_SCORES["ViM"](train, None, against, SCALE)(
        inside
    )
    outer = -FEATURE_SCORES["Residual"](train, None, against, SCALE)(inside)
    assert (virtual > 0).all() and np.corrcoef(virtual, outer)[0, 1] > 0.999


# Edges


def test_one_class_and_ties():
    train, labels, head, inside, outside = made_world(count=60, classes=1)
    images = torch.cat([inside, outside, outside])
    for name, fit in FEATURE_SCORES.items():
        got = fit(train, labels, head, SCALE)(images)
        assert got.isfinite().all(), name
        assert torch.allclose(got[60:120], got[120:], atol=1e-5), name


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(1, 4), width=st.integers(2, 9), each=st.integers(4, 9), seed=st.integers(0, 99))
def test_every_world_gives_finite_scores_that_no_other_image_changes(classes, width, each, seed):
    generator = seeded(seed)
    head = Head(unit((classes, width), seed), unit((classes, width), seed + 1))
    count = classes * (each + width)
    train = F.normalize(torch.randn(count, width, generator=generator).round(decimals=1) + 0.01, dim=1)
    labels, images = torch.arange(count) % classes, unit((5, width), seed + 2)
    for name, fit in FEATURE_SCORES.items():
        score = fit(train, labels, head, SCALE)
        together = score(images)
        assert together.isfinite().all(), name
        alone = torch.cat([score(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        assert score(images[:0]).shape == (0,)


def test_constant_features():
    """Nothing varies: distances know nothing, neighbours and energy still do; a principal space is not to be had."""
    _, labels, head, inside, _ = made_world()
    train = unit((1, WIDTH), 9).expand(160, WIDTH)
    for name in ("Mahalanobis", "RMD"):
        assert not FEATURE_SCORES[name](train, labels, head, SCALE)(inside).any()
    for name in ("kNN", "ReAct"):
        score = FEATURE_SCORES[name](train, labels, head, SCALE)
        assert score(inside).isfinite().all() and score(inside).std() > 0
    for name in ("ViM", "Residual"):
        with pytest.raises(ValueError, match=f"{name}.*span 1 dimensions.*more than the 6"):
            FEATURE_SCORES[name](train, labels, head, SCALE)


@pytest.mark.parametrize("name", ["Mahalanobis", "RMD"])
def test_directions_in_which_nothing_varies_say_nothing(name):
    """An image tower narrower than its embedding gives features of fewer dimensions, but for rounding."""
    few = unit((5, WIDTH), 7)
    head, labels = Head(unit((2, WIDTH), 0), unit((2, WIDTH), 1)), torch.arange(160) % 2
    train, images = F.normalize(unit((160, 5), 8) @ few, dim=1), unit((9, WIDTH), 9)
    within = images @ torch.linalg.pinv(few) @ few
    score = FEATURE_SCORES[name](train, labels, head, SCALE)
    torch.testing.assert_close(score(images), score(within), rtol=1e-3, atol=1e-3)


def test_two_images():
    train, labels, head, inside, _ = made_world()
    for name in ("kNN", "ReAct"):
        assert FEATURE_SCORES[name](train[:2], None, head, SCALE)(inside).isfinite().all()
    for name in ("ViM", "Residual"):
        with pytest.raises(ValueError, match=f"{name}: the 2 training images are too few"):
            FEATURE_SCORES[name](train[:2], None, head, SCALE)


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_no_images(world, name):
    train, labels, head, _, _ = world
    with pytest.raises(ValueError, match=f"{name}: expected training features"):
        FEATURE_SCORES[name](train[:0], labels[:0], head, SCALE)


@pytest.mark.parametrize("name", ["Mahalanobis", "RMD"])
def test_labels_that_do_not_fit(world, name):
    train, labels, head, _, _ = world
    fit = FEATURE_SCORES[name]
    with pytest.raises(ValueError, match=f"{name}: the training images' labels are missing"):
        fit(train, None, head, SCALE)
    with pytest.raises(ValueError, match="160 training images, but labels"):
        fit(train, labels[1:], head, SCALE)
    with pytest.raises(ValueError, match="labels from 0 to 7; there are 4 classes"):
        fit(train, torch.arange(160) % 8, head, SCALE)
    with pytest.raises(ValueError, match="labels from -1 to 3"):
        fit(train, torch.where(labels == 2, -1, labels), head, SCALE)
    with pytest.raises(ValueError, match="1 of 4 classes have no training image: number 2"):
        fit(train, torch.where(labels == 2, 1, labels), head, SCALE)
    with pytest.raises(ValueError, match="15 training images are too few.*at least 16"):
        fit(train[:15], labels[:15], head, SCALE)
    assert fit(train[:16], labels[:16], head, SCALE)(train).isfinite().all()
