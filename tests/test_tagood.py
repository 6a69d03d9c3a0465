"""TagOOD's projector against torchvision's ViT, centres and scores against slow versions, its fit, and bad input."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import messages
from sklearn.metrics.pairwise import cosine_similarity
from torchvision.models.vision_transformer import Encoder

from clipn.config.evaluation import TagoodConfig
from clipn.features.columns import MappedRows, RaggedRows
from clipn.methods import tagood_fit
from clipn.methods.tagood import MeanToken, Projector, centre_loss, centre_score, update_centres
from clipn.methods.tagood_fit import class_means, fit_tagood, learning_rate, stored_tagood

DIM, CLASSES = 6, 3
SMALL = TagoodConfig(width=16, layers=2, heads=2, groups=4, epochs=3, batch_size=8, max_tokens=6)


@pytest.fixture
def projector():
    torch.manual_seed(0)
    made = Projector(DIM, CLASSES, width=16, layers=2, heads=2, max_tokens=8).eval()
    with torch.no_grad():  # the initial biases are near zero
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def make_sets(count: int = 24, seed: int = 0) -> tuple[RaggedRows, torch.Tensor]:
    """Sets of 1 to 6 tokens around a direction for each class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels, counts = torch.arange(count) % CLASSES, torch.arange(count) % 6 + 1
    directions = 3 * torch.eye(DIM)[:CLASSES]
    values = directions[labels.repeat_interleave(counts)]
    return RaggedRows(values + torch.randn(values.shape, generator=generator), counts), labels


@pytest.fixture
def sets():
    return make_sets()


# The projector


def torchvision_features(projector: Projector, tokens: torch.Tensor) -> torch.Tensor:
    """torchvision's encoder with the projector's weights, of the tokens [n, dim] of one image."""
    width, length = projector.norm.normalized_shape[0], len(tokens) + 1
    heads = projector.blocks[0].self_attn.num_heads
    encoder = Encoder(length, len(projector.blocks), heads, width, 4 * width, 0.1, 0.1).eval()
    state = {"pos_embedding": projector.positions[None, :length]}
    for number, block in enumerate(projector.blocks):
        names = {
            "self_attn": "self_attention",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "linear1": "mlp.0",
            "linear2": "mlp.3",
        }
        for name, value in block.state_dict().items():
            own, _, rest = name.partition(".")
            state[f"layers.encoder_layer_{number}.{names[own]}.{rest}"] = value
    state |= {f"ln.{name}": value for name, value in projector.norm.state_dict().items()}
    encoder.load_state_dict(state)
    cls = torch.zeros(1, width)
    return encoder(torch.cat([cls, projector.project(tokens)])[None])[0, 0]


@pytest.mark.parametrize("grad", [True, False])  # without gradients, PyTorch takes another path
def test_the_projector_is_torchvisions_encoder(projector, sets, grad):
    tokens, mask = sets[0].take(torch.arange(24))
    with torch.set_grad_enabled(grad):
        features = projector(tokens, mask)
        expected = torch.stack([torchvision_features(projector, t[m]) for t, m in zip(tokens, mask, strict=True)])
    assert features.shape == (24, 16) and features.requires_grad is grad
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projector.classify(features), projector.classifier(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_may_be_anywhere(projector, sets):
    tokens, mask = sets[0].take(torch.tensor([3, 9]))
    expected = projector(tokens, mask)
    wider, places = torch.full((2, 12, DIM), 99.0), torch.zeros(2, 12, dtype=torch.bool)
    for row, (start, step) in enumerate([(2, 2), (0, 3)]):
        chosen = torch.arange(start, start + 4 * step, step)
        wider[row, chosen], places[row, chosen] = tokens[row, :4], True
    torch.testing.assert_close(projector(wider, places), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(projector(tokens[:1, :4].half(), mask[:1, :4]), expected[:1], rtol=1e-2, atol=1e-2)


def test_dropout_is_for_training_alone(projector, sets):
    tokens, mask = sets[0].take(torch.arange(4))
    torch.testing.assert_close(projector(tokens, mask), projector(tokens, mask))
    projector.train()
    assert (projector(tokens, mask) - projector(tokens, mask)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ((2, 3, DIM), [[1, 1, 1], [0, 0, 0]], "image 1 has 0 tokens; expected 1 to 7"),
        ((1, 8, DIM), [[1] * 8], "image 0 has 8 tokens; expected 1 to 7"),
        ((1, 0, DIM), [[]], "image 0 has 0 tokens"),
        ((2, 3, DIM + 1), [[1, 1, 1]] * 2, r"expected tokens \[B, n, 6\].*got \[2, 3, 7\]"),
        ((0, 3, DIM), [], r"got \[0, 3, 6\]"),
        ((2, 3, DIM), [[1, 1]] * 2, r"boolean mask \[B, n\], got \[2, 3, 6\] and \[2, 2\]"),
    ],
)
def test_impossible_token_sets_are_errors(projector, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        projector(torch.ones(tokens), torch.tensor(mask, dtype=torch.bool))


def test_a_set_as_large_as_the_positions(projector):
    assert projector(torch.ones(1, 7, DIM), torch.ones(1, 7, dtype=torch.bool)).isfinite().all()
    with pytest.raises(ValueError, match="torch.int64"):
        projector(torch.ones(1, 1, DIM), torch.ones(1, 1, dtype=torch.long))


# Centres


@pytest.fixture
def centred():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(7, 12, generator=generator)
    return features, torch.randn(CLASSES, 4, 3, generator=generator), torch.tensor([0, 2, 2, 0, 2, 0, 0])


def test_centre_loss_against_a_loop(centred):
    features, centres, labels = centred
    total = 0.0
    for feature, label in zip(features, labels, strict=True):
        for group in range(4):
            part = feature[3 * group : 3 * group + 3] - centres[label, group]
            total += sum(float(x) ** 2 for x in part) / 3
    assert centre_loss(*centred).item() == pytest.approx(total / 7, rel=1e-5)
    wide = torch.randn(5, 512), torch.randn(CLASSES, 4, 128), torch.tensor([0, 1, 2, 0, 1])
    expected = (wide[0] - wide[1][wide[2]].flatten(1)).square().sum(dim=1).mean() / 128
    torch.testing.assert_close(centre_loss(*wide), expected)


def test_centres_move_to_the_mean_of_their_class_in_a_batch(centred):
    features, centres, labels = centred
    expected = centres.clone()
    for label in (0, 2):
        mean = torch.stack([f for f, y in zip(features, labels, strict=True) if y == label]).mean(dim=0)
        expected[label] = 0.9 * expected[label] + 0.1 * mean.view(4, 3)
    made = update_centres(centres, features.requires_grad_(), labels, decay=0.9)
    torch.testing.assert_close(made, expected)
    assert made is centres and not made.requires_grad and torch.equal(made[1], expected[1])


@pytest.mark.parametrize("groups", [1, 4])
def test_centre_score_against_scikit_learn(centred, groups):
    features, centres, _ = centred
    centres = centres.flatten(1).unflatten(1, (groups, -1))
    cosines = sum(
        cosine_similarity(features.unflatten(1, (groups, -1))[:, group], centres[:, group]) for group in range(groups)
    )
    torch.testing.assert_close(
        centre_score(features, centres).double(), torch.tensor(cosines).double().amax(1) / groups
    )


def test_mean_token_and_class_means_against_loops(sets, monkeypatch):
    monkeypatch.setattr(tagood_fit, "_ROWS", 5)
    tokens, labels = sets
    labels = labels.clamp(max=1)
    images = [tokens.values[start : start + count] for start, count in zip(tokens.starts, tokens.counts, strict=True)]
    expected = torch.zeros(CLASSES, DIM)
    for label in (0, 1):
        expected[label] = torch.stack([i.mean(0) for i, y in zip(images, labels, strict=True) if y == label]).mean(0)
    means = class_means(MeanToken(), tokens, labels, CLASSES, groups=2)
    torch.testing.assert_close(means, expected.unflatten(1, (2, 3)))


# Ragged rows


def test_ragged_rows_from_disk_and_their_subsets(sets):
    tokens, _ = sets
    mapped = RaggedRows(MappedRows([*tokens.values.split(17)], torch.device("cpu")), tokens.counts)
    numbers = torch.tensor([7, 0, 23, 7])
    rows, mask = tokens.take(numbers)
    assert rows.shape == (4, 6, DIM) and mask.sum(dim=1).tolist() == [2, 1, 6, 2] and not rows[~mask].any()
    start = int(tokens.counts[:7].sum())
    assert torch.equal(rows[0, :2], tokens.values[start : start + 2])
    for same in (mapped.take(numbers), tokens.subset(numbers).take(torch.arange(4))):
        assert torch.equal(same[0], rows) and torch.equal(same[1], mask)


# The fit


def plain_fit(tokens, labels, settings):
    """The same training with autograd and PyTorch's own schedule, without padding."""
    torch.manual_seed(settings.seed)
    projector, centres = tagood_fit._new(DIM, CLASSES, settings)
    optimizer = torch.optim.AdamW(projector.parameters(), settings.lr, weight_decay=settings.weight_decay)
    batches = list(tagood_fit._draw_batches(len(labels), settings))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), settings.lr_min)
    for numbers in batches:
        sets = [tokens.take(number[None])[0] for number in numbers]
        features = torch.cat([projector(t, torch.ones(1, t.shape[1], dtype=torch.bool)) for t in sets])
        loss = F.cross_entropy(projector.classify(features), labels[numbers])
        difference = features - centres[labels[numbers]].flatten(1)
        loss += settings.centre_weight * difference.square().sum(dim=1).mean() / (settings.width / settings.groups)
        for label in labels[numbers].unique():
            mean = features[labels[numbers] == label].mean(dim=0).detach().view(settings.groups, -1)
            centres[label] = settings.centre_decay * centres[label] + (1 - settings.centre_decay) * mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return projector, centres


def test_the_fit_takes_the_steps_of_a_plain_training(sets, monkeypatch):
    tokens, labels = sets
    settings = dataclasses.replace(SMALL, centre_decay=0.9, lr=0.01, batch_size=10)
    monkeypatch.setattr(tagood_fit, "Projector", partial(Projector, dropout=0.0))
    expected, expected_centres = plain_fit(tokens, labels, settings)
    fitted = fit_tagood(tokens, labels, CLASSES, settings)
    torch.testing.assert_close(fitted.centres, expected_centres, rtol=1e-3, atol=1e-4)
    batch = tokens.take(torch.arange(24))  # the weights themselves differ where their gradient is rounding alone
    torch.testing.assert_close(fitted.projector(*batch), expected(*batch), rtol=1e-3, atol=1e-3)


def test_the_learning_rate_is_a_cosine():
    settings = TagoodConfig(lr=0.01, lr_min=1e-5)
    rates = [learning_rate(step, 10, settings) for step in (0, 5, 10)]
    assert rates == pytest.approx([0.01, (0.01 + 1e-5) / 2, 1e-5])


def test_the_fit_finds_the_classes(sets):
    tokens, labels = sets
    fitted = fit_tagood(tokens, labels, CLASSES, dataclasses.replace(SMALL, epochs=40))
    others, _ = make_sets(seed=5)
    features = fitted.projector(*others.take(torch.arange(24)))
    assert (fitted.projector.classify(features).argmax(dim=1) == labels).float().mean() > 0.9
    nearest = [centre_score(features, fitted.centres[[label]]) for label in range(CLASSES)]
    assert (torch.stack(nearest).argmax(dim=0) == labels).float().mean() > 0.9
    strangers = torch.zeros(4, 1, DIM).index_fill_(2, torch.tensor(5), 5.0)
    outside = fitted.projector(strangers, torch.ones(4, 1, dtype=torch.bool))
    assert centre_score(features, fitted.centres).mean() > centre_score(outside, fitted.centres).mean()
    assert not fitted.projector.training and not features.requires_grad


def test_a_seed_repeats_a_fit_and_leaves_other_draws_alone(sets):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = fit_tagood(*sets, CLASSES, SMALL)
    assert torch.equal(torch.rand(1), expected)
    again, other = (fit_tagood(*sets, CLASSES, dataclasses.replace(SMALL, seed=seed)) for seed in (0, 1))
    assert torch.equal(again.centres, first.centres) and not torch.equal(other.centres, first.centres)
    assert torch.equal(again.projector.positions, first.projector.positions)


def test_a_stopped_fit_resumes_exactly(sets, tmp_path, monkeypatch, caplog):
    straight = stored_tagood(tmp_path / "straight", *sets, CLASSES, SMALL)
    monkeypatch.setattr(tagood_fit, "_SAVE_EVERY", -1.0)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tagood_fit, "stop_if_asked", stop)
        with pytest.raises(KeyboardInterrupt):
            stored_tagood(tmp_path / "stopped", *sets, CLASSES, SMALL)
    assert [path.suffix for path in (tmp_path / "stopped").iterdir()] == [".unfinished"]
    with caplog.at_level("INFO"):
        resumed = stored_tagood(tmp_path / "stopped", *sets, CLASSES, SMALL)
    assert "resuming" in messages(caplog) and "after 5 steps" in messages(caplog)
    assert torch.equal(resumed.centres, straight.centres)
    for name, value in straight.projector.state_dict().items():
        assert torch.equal(resumed.projector.state_dict()[name], value), name
    assert [path.suffix for path in (tmp_path / "stopped").iterdir()] == [".safetensors"]


def test_a_fit_is_kept_for_the_same_tokens_labels_and_settings(sets, tmp_path, monkeypatch):
    tokens, labels = sets
    first = stored_tagood(tmp_path, tokens, labels, CLASSES, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(tagood_fit, "fit_tagood", None)
        kept = dataclasses.replace(SMALL, score="cosine*tag", untagged="reject")
        again = stored_tagood(tmp_path, tokens, labels, CLASSES, kept)
    batch = tokens.take(torch.arange(4))
    assert torch.equal(again.projector(*batch), first.projector(*batch)) and torch.equal(again.centres, first.centres)
    assert not again.projector.training
    one_less = torch.arange(23)
    stored_tagood(tmp_path, RaggedRows(tokens.values + 1, tokens.counts), labels, CLASSES, SMALL)
    stored_tagood(tmp_path, tokens.subset(one_less), labels[:-1], CLASSES, SMALL)
    stored_tagood(tmp_path, tokens, labels.flip(0), CLASSES, SMALL)
    stored_tagood(tmp_path, tokens, labels, CLASSES, dataclasses.replace(SMALL, centre_weight=0.0))
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("kind", ["safetensors", "unfinished"])
def test_a_damaged_file_is_named(sets, tmp_path, kind):
    stored_tagood(tmp_path, *sets, CLASSES, SMALL)
    (file,) = tmp_path.iterdir()
    damaged = file.rename(file.with_suffix(f".{kind}"))
    damaged.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{damaged}: not .*delete it, and "):
        stored_tagood(tmp_path, *sets, CLASSES, SMALL)


@pytest.mark.parametrize(
    ("count", "labels", "scale", "message"),
    [
        (24, torch.zeros(23, dtype=torch.long), 1, r"the tokens of 24 training images, but labels of shape \[23\]"),
        (0, torch.zeros(0, dtype=torch.long), 1, "the tokens of 0 training images"),
        (24, torch.full((24,), 3), 1, "labels from 3 to 3; there are 3 classes"),
        (24, torch.zeros(24, dtype=torch.long), float("nan"), "tokens that are not finite.*tagood.lr=0.001"),
    ],
)
def test_impossible_training_data_are_errors(count, labels, scale, message):
    tokens, _ = make_sets(24)
    tokens = RaggedRows(tokens.values * scale, tokens.counts).subset(torch.arange(count))
    with pytest.raises(ValueError, match=message):
        fit_tagood(tokens, labels, CLASSES, SMALL)
