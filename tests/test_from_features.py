"""Scores fitted on training features against numpy, scikit-learn and plain loops, and their edge cases."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from clipn.methods import from_features, neighbours
from clipn.methods.from_features import principal_dim
from clipn.methods.registry import METHODS, MethodInputs
from clipn.model.head import Head

CLASSES, WIDTH, SCALE = 4, 12, 20.0
NAMES = [name for name, method in METHODS.items() if "train" in method.needs and method.takes == "features"]


def fitted(name, train, labels, head):
    return METHODS[name].make(MethodInputs(None, head, [], SCALE, train, labels))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=seeded(seed)), dim=1)


def make_world(count: int = 160, classes: int = CLASSES, width: int = WIDTH, spread: float = 0.1):
    """Training features around their class's weight, labels, head; new ID features, and features anywhere."""
    head = Head(unit((classes, width), 0), unit((classes, width), 1))
    labels = torch.arange(count) % classes
    train, inside = (
        F.normalize(head.weight_yes[labels] + spread * torch.randn(count, width, generator=seeded(seed)), dim=1)
        for seed in (2, 3)
    )
    return train, labels, head, inside, unit((count, width), 4)


@pytest.fixture(scope="module")
def world():
    return make_world()


# Slow versions, one image at a time


def slow_mahalanobis(train, labels, images, classes):
    means = np.array([train[labels == c].mean(axis=0) for c in range(classes)])
    within = EmpiricalCovariance(assume_centered=True).fit(train - means[labels]).precision_
    whole = EmpiricalCovariance().fit(train)
    nearest = np.array([min((f - m) @ within @ (f - m) for m in means) for f in images])
    return {"Mahalanobis": -nearest, "RMD": whole.mahalanobis(images) - nearest}


def slow_vim(train, images, weights, dim):
    values, vectors = np.linalg.eig(EmpiricalCovariance(assume_centered=True).fit(train).covariance_)
    outside = vectors[:, np.argsort(-values)[dim:]]
    residual = np.array([np.linalg.norm(f @ outside) for f in images])
    alpha = np.mean([max(SCALE * weights @ f) for f in train]) / np.mean([np.linalg.norm(f @ outside) for f in train])
    return {"Residual": -residual, "ViM": [logsumexp(SCALE * weights @ f) for f in images] - alpha * residual}


def slow_react(train, images, weights):
    limit = np.quantile(train, 0.9)
    return [logsumexp([SCALE * sum(np.minimum(f, limit) * row) for row in weights]) for f in images]


def test_scores_agree_with_slow_versions(world):
    train, labels, head, inside, outside = world
    images = torch.cat([inside[:30], outside[:30]])
    arrays = [values.double().numpy() for values in (train, images, head.weight_yes)]
    distance, _ = NearestNeighbors(n_neighbors=1).fit(arrays[0]).kneighbors(arrays[1])
    expected = {
        "kNN": -distance[:, 0],
        **slow_mahalanobis(arrays[0], labels.numpy(), arrays[1], CLASSES),
        **slow_vim(*arrays, principal_dim(WIDTH)),
        "ReAct": slow_react(*arrays),
    }
    assert set(expected) == set(NAMES)
    for name in NAMES:
        scores = fitted(name, train, labels, head)(images)
        assert scores.shape == (60,) and scores.dtype == torch.float32
        np.testing.assert_allclose(scores.numpy(), expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_higher_means_in_distribution_for_any_block_size_and_type(world, monkeypatch, name):
    train, labels, head, inside, outside = world
    images = torch.cat([inside, outside])
    whole = fitted(name, train, labels, head)(images)
    assert whole[:160].quantile(0.25) > whole[160:].quantile(0.75)
    monkeypatch.setattr(from_features, "_ROWS", 7)
    monkeypatch.setattr(neighbours, "_BANK", 11)
    torch.testing.assert_close(fitted(name, train, labels, head)(images), whole, rtol=1e-5, atol=1e-5)
    half = fitted(name, train.half(), labels.int(), head)(images)
    torch.testing.assert_close(half, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("per_neighbour", "k"), [(1000, 1), (90, 1), (30, 3), (1, 90)])
def test_k_grows_with_the_number_of_training_images(monkeypatch, per_neighbour, k):
    train, _, head, inside, _ = make_world(count=90)
    monkeypatch.setattr(from_features, "IMAGES_PER_NEIGHBOUR", per_neighbour)
    monkeypatch.setattr(neighbours, "_BANK", 20)
    expected, _ = NearestNeighbors(n_neighbors=k).fit(train.numpy()).kneighbors(inside.numpy())
    np.testing.assert_allclose(fitted("kNN", train, None, head)(inside).numpy(), -expected[:, -1], atol=1e-5)
    if k == 1:
        assert fitted("kNN", train, None, head)(train).abs().max() < 1e-3, "an image is its own neighbour"


def test_the_principal_space_is_that_of_the_paper_where_it_fits():
    assert [principal_dim(width) for width in (2048, 1024, 768, 512, 32, 3)] == [1000, 512, 512, 256, 16, 1]


def test_a_larger_residual_lowers_vim_even_if_all_cosines_are_negative():
    """A base with a logit bias has negative cosines alone."""
    train, _, head, inside, _ = make_world(classes=1)
    opposite = Head(-head.weight_yes, head.weight_no)
    energy = (SCALE * inside @ opposite.weight_yes.T).logsumexp(1)
    virtual = energy - fitted("ViM", train, None, opposite)(inside)
    residual = -fitted("Residual", train, None, opposite)(inside)
    assert (virtual > 0).all() and np.corrcoef(virtual, residual)[0, 1] > 0.999


# Edge cases


@settings(deadline=None, max_examples=20)
@given(classes=st.integers(1, 4), width=st.integers(2, 9), each=st.integers(4, 9), seed=st.integers(0, 99))
def test_scores_are_finite_and_independent_of_the_other_images(classes, width, each, seed):
    head = Head(unit((classes, width), seed), unit((classes, width), seed + 1))
    count = classes * (each + width)
    train = F.normalize(torch.randn(count, width, generator=seeded(seed)).round(decimals=1) + 0.01, dim=1)
    labels, images = torch.arange(count) % classes, unit((5, width), seed + 2)
    for name in NAMES:
        if name == "RMD" and classes == 1:
            continue  # it is always 0 and refused
        score = fitted(name, train, labels, head)
        together = score(images)
        assert together.isfinite().all(), name
        alone = torch.cat([score(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        assert score(images[:0]).shape == (0,)


def test_constant_features(world):
    """Nothing varies: distances are 0, nearest neighbours and energy still differ, and there is no principal space."""
    _, labels, head, inside, _ = world
    train = unit((1, WIDTH), 9).expand(160, WIDTH)
    for name in ("Mahalanobis", "RMD"):
        assert not fitted(name, train, labels, head)(inside).any()
    for name in ("kNN", "ReAct"):
        scores = fitted(name, train, labels, head)(inside)
        assert scores.isfinite().all() and scores.std() > 0
    for name in ("ViM", "Residual"):
        with pytest.raises(
            ValueError, match=f"{name}: the 160 training images are.*span 1 dimensions.*more than the 6"
        ):
            fitted(name, train, labels, head)


@pytest.mark.parametrize("name", ["Mahalanobis", "RMD"])
def test_directions_without_variance_do_not_count(name):
    """An image tower narrower than its embedding gives features of fewer dimensions, apart from rounding."""
    directions = unit((5, WIDTH), 7)
    head, labels = Head(unit((2, WIDTH), 0), unit((2, WIDTH), 1)), torch.arange(160) % 2
    train, images = F.normalize(unit((160, 5), 8) @ directions, dim=1), unit((9, WIDTH), 9)
    within = images @ torch.linalg.pinv(directions) @ directions
    score = fitted(name, train, labels, head)
    torch.testing.assert_close(score(images), score(within), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_images(world, name):
    train, labels, head, inside, _ = world
    with pytest.raises(ValueError, match=f"{name}: expected training features"):
        fitted(name, train[:0], labels[:0], head)
    least = {"kNN": 1, "ReAct": 1, "ViM": 7, "Residual": 7, "Mahalanobis": 16, "RMD": 16}[name]
    assert fitted(name, train[:least], labels[:least], head)(inside).isfinite().all()


@pytest.mark.parametrize("name", ["Mahalanobis", "RMD"])
@pytest.mark.parametrize(
    ("count", "change", "message"),
    [
        (160, lambda labels: None, "the labels of the training images are missing"),
        (160, lambda labels: labels[1:], "160 training images, but labels"),
        (160, lambda labels: torch.arange(160) % 8, "labels from 0 to 7; there are 4 classes"),
        (160, lambda labels: torch.where(labels == 2, -1, labels), "labels from -1 to 3"),
        (160, lambda labels: torch.where(labels == 2, 1, labels), "1 of 4 classes have no training image: number 2"),
        (15, lambda labels: labels, "15 training images are too few.*at least 16"),
    ],
)
def test_labels_that_do_not_fit(world, name, count, change, message):
    train, labels, head, _, _ = world
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        fitted(name, train[:count], change(labels[:count]), head)
