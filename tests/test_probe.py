"""Pseudo-label and linear probing against a hand-written Adam, scikit-learn and slow versions; its bad input."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_clipn, write_evaluation
from helpers import as_scores, messages, write_images
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from clipn import scores
from clipn.config.evaluation import ProbeConfig
from clipn.config.loading import load_config
from clipn.evaluation.evaluate import evaluate
from clipn.features import columns
from clipn.features.columns import MappedRows, open_rows
from clipn.methods import neighbours, probe_scores
from clipn.methods import probe as probes
from clipn.methods.probe import fit_probe, learning_rate, pseudo_labels, stored_probe
from clipn.methods.probe_scores import logit_distances, nearest_cosine
from clipn.report.tables import ablations_table, results_table

CLASSES, WIDTH = 5, 12


def make_data(count: int = 150, classes: int = CLASSES, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [N, W] around a centre for each class, with dimensions of different scales, and labels [N]."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(count) % classes
    tower = centres[labels] + 0.7 * torch.randn(count, width, generator=generator)
    return tower * torch.linspace(0.1, 9, width) + 3, labels


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def fitted(data):
    return fit_probe(*data, CLASSES, ProbeConfig(epochs=20, batch_size=32))


# The fit


def hand_written_adam(x, labels, weight, bias, settings, batches):
    """Autograd, and Adam's equations in float64, with the decay in the gradient."""
    parameters = [weight.double().requires_grad_(), bias.double().requires_grad_()]
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step, rows in enumerate(batches):
        loss = F.cross_entropy(x[rows] @ parameters[0].T + parameters[1], labels[rows])
        gradients = torch.autograd.grad(loss, parameters)
        rate = learning_rate(step, len(batches), settings)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, means, squares, strict=True):
                g = g + settings.weight_decay * p
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                p -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("in_memory", [2**29, 0])
def test_the_probe_agrees_with_a_hand_written_adam(data, monkeypatch, in_memory):
    monkeypatch.setattr(probes, "IN_MEMORY", in_memory)  # 0: standardised batch by batch
    monkeypatch.setattr(probes, "_ROWS", 40)
    tower, labels = data
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(CLASSES, WIDTH, generator=generator), torch.randn(CLASSES, generator=generator)
    batches = [part for _ in range(6) for part in torch.randperm(len(tower), generator=generator).split(64)]
    settings = ProbeConfig(lr=0.01, weight_decay=0.1)
    start = weight.clone()
    probe = fit_probe(tower, labels, CLASSES, settings, weight, bias, batches)
    assert torch.equal(weight, start), "the given start is not changed"
    x = (tower.double() - tower.double().mean(dim=0)) / tower.double().std(dim=0)
    expected = hand_written_adam(x, labels, weight, bias, settings, batches)
    torch.testing.assert_close(probe.weight.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probe.bias.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probe.logits(tower).double(), x @ expected[0].T + expected[1], rtol=1e-4, atol=1e-4)


def test_lbfgs_reaches_the_optimum_of_scikit_learn_and_adam_does_not(data):
    tower, labels = data
    settings = ProbeConfig(solver="lbfgs", weight_decay=0.01)
    probe = fit_probe(tower, labels, CLASSES, settings)
    x = ((tower - tower.mean(dim=0)) / tower.std(dim=0)).double()
    with_ones = torch.cat([x, torch.ones(len(x), 1)], dim=1).numpy()
    sklearn = LogisticRegression(C=1 / (0.01 * len(x)), fit_intercept=False, tol=1e-10, max_iter=10_000)
    optimum = torch.from_numpy(sklearn.fit(with_ones, labels.numpy()).coef_)
    torch.testing.assert_close(probe.weight.double(), optimum[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.bias.double(), optimum[:, -1], rtol=1e-4, atol=1e-5)

    def objective(probe):
        squares = probe.weight.square().sum() + probe.bias.square().sum()
        return float(F.cross_entropy(probe.logits(tower), labels) + 0.005 * squares)

    assert objective(probe) < objective(fit_probe(tower, labels, CLASSES, ProbeConfig(weight_decay=0.01)))


@pytest.mark.parametrize(
    ("step", "steps", "rate"),
    [
        (0, 100, 0.0),
        (1, 100, 1e-3 / 9),
        (9, 100, 1e-3),
        (10, 100, 1e-3),
        (55, 100, 0.5e-3),
        (99, 100, 0.5e-3 * (1 + math.cos(math.pi * 89 / 90))),
        (0, 10, 0.0),  # one step of warm-up
        (1, 10, 1e-3),
        (0, 9, 1e-3),  # none
    ],
)
def test_learning_rates(step, steps, rate):
    assert learning_rate(step, steps, ProbeConfig()) == pytest.approx(rate, rel=1e-12)


def test_every_epoch_takes_each_image_once_in_another_order_and_keeps_the_short_batch(data):
    batches = list(probes._draw_batches(data[1], ProbeConfig(epochs=2, batch_size=64)))
    assert [len(batch) for batch in batches] == [64, 64, 22] * 2
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(150)) and not torch.equal(first, second)


def test_the_seed_decides_the_start_which_is_that_of_a_linear_layer(data):
    def fit(**settings):
        return fit_probe(*data, CLASSES, ProbeConfig(epochs=1, **settings)).weight

    assert torch.equal(fit(), fit()) and not torch.equal(fit(), fit(seed=1))
    torch.manual_seed(7)
    layer = torch.nn.Linear(WIDTH, CLASSES)
    start = fit_probe(*data, CLASSES, ProbeConfig(seed=7), batches=[torch.arange(9)] * 10)
    torch.testing.assert_close(start.bias, layer.bias.detach(), rtol=0, atol=0.02)  # after ten small steps


def test_a_constant_dimension_keeps_its_scale(data):
    tower, labels = data[0].clone(), data[1]
    tower[:, 3] = 0.1
    probe = fit_probe(tower, labels, CLASSES, ProbeConfig(epochs=1))
    assert probe.std[3] == 1 and probe.mean[3] == tower[0, 3]
    torch.testing.assert_close(probe.std[4:], tower.std(dim=0)[4:])


def test_mapped_rows_of_half_precision_give_the_same_probe(data, monkeypatch):
    tower, labels = data[0].half(), data[1]
    mapped = MappedRows(tower.split(64), torch.device("cpu"))
    assert mapped.shape == (150, WIDTH) and torch.equal(mapped[60:70], tower[60:70])
    assert torch.equal(open_rows(tower.split(64), torch.device("cpu")), tower)
    monkeypatch.setattr(columns, "IN_MEMORY", 0)
    assert isinstance(open_rows(tower.split(64), torch.device("cpu")), MappedRows)
    monkeypatch.setattr(probes, "IN_MEMORY", 0)
    fits = [fit_probe(rows, labels, CLASSES, ProbeConfig(epochs=2, batch_size=40)) for rows in (tower, mapped)]
    assert torch.equal(fits[0].weight, fits[1].weight)
    torch.testing.assert_close(nearest_cosine(mapped)(tower), torch.ones(150))


# Labels and scores


def test_pseudo_labels_are_those_of_the_nearest_class_weight(data):
    weights = F.normalize(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(3)), dim=1)
    features = F.normalize(data[0], dim=1)
    expected = [int((weights @ feature).argmax()) for feature in features]
    assert pseudo_labels(features, weights).tolist() == expected
    features[17, 2] = float("nan")
    with pytest.raises(ValueError, match="pseudo-labels.*NaN"):
        pseudo_labels(features, weights)


def test_l1_is_the_sum_less_the_smallest_for_each_class():
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scores.l1(logits), logits.sum(dim=1) - 7 * logits.min(dim=1).values)
    torch.testing.assert_close(scores.l1(logits + 5), scores.l1(logits))
    assert scores.l1(torch.ones(2, 4)).tolist() == [0, 0]


@pytest.mark.parametrize("relative", [False, True])
def test_distances_of_logits_agree_with_a_slow_version(data, fitted, monkeypatch, relative):
    monkeypatch.setattr(probe_scores, "_ROWS", 40)
    tower, labels = data[0], data[1].clone()
    labels[labels == 4] = 3
    labels[7] = 4  # a class of one image is left out
    logits = fitted.logits(tower).double().numpy()
    groups = [logits[labels.numpy() == label] for label in range(4)]
    inverse = np.linalg.inv(np.mean([np.cov(group.T) for group in groups], axis=0))
    inverse_of_all = np.linalg.inv(np.cov(logits.T))
    expected = []
    for z in logits:
        distances = [(z - group.mean(axis=0)) @ inverse @ (z - group.mean(axis=0)) for group in groups]
        of_all = (z - logits.mean(axis=0)) @ inverse_of_all @ (z - logits.mean(axis=0)) if relative else 0
        expected.append(-min(distance - of_all for distance in distances))
    score = logit_distances(fitted, tower, labels, relative)
    np.testing.assert_allclose(score(torch.from_numpy(logits)).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_one_nearest_neighbour_is_the_largest_cosine(data, monkeypatch):
    monkeypatch.setattr(neighbours, "_BANK", 11)
    train, images = data[0][:100], data[0][100:]
    expected = [max(F.cosine_similarity(image, other, dim=0) for other in train) for image in images]
    torch.testing.assert_close(nearest_cosine(train)(images), torch.stack(expected))


# Bad input


@pytest.mark.parametrize(
    ("count", "classes", "change", "message"),
    [
        (0, CLASSES, None, r"two training images or more, got \[0, 12\]"),
        (1, 1, None, r"two training images or more, got \[1, 12\]"),
        (4, CLASSES, None, "4 training images are too few for 5 classes"),
        (150, 4, None, "labels from 0 to 4; there are 4 classes"),
        (150, CLASSES, lambda tower, labels: (tower, labels[1:]), "150 training images, but labels of shape"),
        (150, CLASSES, lambda tower, labels: (tower.index_fill(0, torch.tensor([17]), math.nan), labels), "number 17"),
        (150, CLASSES, lambda tower, labels: (tower.half() * 60000, labels), "features.dtype=float16, try float32"),
    ],
)
def test_what_does_not_fit_is_an_error(data, tmp_path, count, classes, change, message):
    tower, labels = data[0][:count], data[1][:count]
    tower, labels = change(tower, labels) if change else (tower, labels)
    with pytest.raises(ValueError, match=message):
        fit_probe(tower, labels, classes, ProbeConfig())
    with pytest.raises(ValueError, match=message):
        stored_probe(tmp_path, tower, labels, classes, ProbeConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "classes", "solver", "message"),
    [
        (150, 15, "adam", r"covariance of 15 logits needs as many outputs of the image tower \(12\)"),
        (7, CLASSES, "adam", "RMD: 7 training images; the covariance of 5 logits needs"),
        (150, CLASSES, "lbfgs", "RMD: the covariance of the probe's 5 logits is singular.*probe.solver=lbfgs"),
    ],
)
def test_a_singular_covariance_is_an_error(count, classes, solver, message):
    tower, labels = make_data(count, classes)
    probe = fit_probe(tower, labels, classes, ProbeConfig(epochs=1, solver=solver))
    with pytest.raises(ValueError, match=message):
        logit_distances(probe, tower, labels, True, "RMD")


def test_a_kept_probe_is_read_and_depends_on_data_and_settings(data, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "clipn")
    settings = ProbeConfig(epochs=2)
    first = stored_probe(tmp_path, *data, CLASSES, settings)
    assert "150 images x 12 outputs, 5 classes: 2 steps, about 3.6e-08 TFLOP an epoch" in messages(caplog)
    (file,) = tmp_path.iterdir()
    assert set(load_file(file)) == {"weight", "bias", "mean", "std"}
    with monkeypatch.context() as patch:
        patch.setattr(probes, "fit_probe", None)
        again = stored_probe(tmp_path, *data, CLASSES, settings)
    assert torch.equal(again.weight, first.weight) and torch.equal(again.logits(data[0]), first.logits(data[0]))
    changed = data[0] + F.one_hot(torch.tensor(3), WIDTH)
    stored_probe(tmp_path, changed, data[1], CLASSES, settings)
    stored_probe(tmp_path, data[0], data[1].flip(0), CLASSES, settings)
    stored_probe(tmp_path, *data, CLASSES, ProbeConfig(epochs=2, seed=1))
    assert len(list(tmp_path.iterdir())) == 4
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{file}: not a probe.*delete it, and it is fitted again$"):
        stored_probe(tmp_path, *data, CLASSES, settings)


# In an evaluation


@pytest.fixture
def evaluated(tmp_path):
    """(methods, overrides) -> the evaluation of 6 images of 3 classes against 4 others, with 45 training images."""
    noise = np.random.default_rng(0)
    for place, each in (("id", 2), ("train", 15)):
        for shade, name in enumerate(("cat", "dog", "owl")):
            for number in range(each):
                path = tmp_path / place / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = noise.integers(0, 40, (12, 12, 3)) + 100 * np.eye(3, dtype=int)[shade]
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    write_images(tmp_path / "ood", *(f"{number}.png" for number in range(4)))
    sections = f"""
features: {{part_size: 7}}
probe: {{epochs: 40, batch_size: 8}}
eval: {{id: {tmp_path}/id, ood: {tmp_path}/ood, templates: simple, train: {tmp_path}/train}}
"""
    config = write_evaluation(tmp_path, sections)
    return lambda methods, *words: evaluate(load_config(config, [f"eval.methods=[{methods}]", *words]))


def test_mcm_5_is_mcm_with_the_prompts_of_the_probe(evaluated, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(probes.PROMPTS))
    first, expected = evaluated("MCM-5"), evaluated("MCM", f"eval.templates={tmp_path}/prompts.txt")
    assert first.results["id_accuracy"].tolist() == expected.results["id_accuracy"].tolist()
    for name, of_set in first.set_scores.items():
        np.testing.assert_allclose(of_set.scores["MCM-5"], expected.set_scores[name].scores["MCM"], rtol=1e-6)


def test_the_accuracy_is_that_of_the_methods_own_classifier(evaluated):
    results = evaluated("MSP,PLP-MSP,LP-MSP,LP-L1,MCM-5").results
    accuracy = results.set_index("method")["id_accuracy"]
    assert accuracy["LP-MSP"] == accuracy["LP-L1"] == 1, "the classes differ in colour"
    assert accuracy["MSP"] < 1, "a random base"
    assert ("ID", "accuracy") in results_table(results).columns
    assert ("LP-MSP", "accuracy") in ablations_table(results.assign(setting="x")).columns
    alone = results[results["method"] == "MSP"]
    assert ("ID", "accuracy") not in results_table(alone).columns


def test_scores_with_clipn_follow_their_formulas(evaluated, tmp_path):
    evaluation = evaluated("CTW,PLP-MSP,PLP-Energy,PLP+CTW,PLP+ATD,PLP-Energy+CLIPN", "eval.class_names=[a,a,a]")
    for of_set in evaluation.set_scores.values():  # the classes have one text, thus one p_yes
        made = as_scores(of_set.scores)
        np.testing.assert_allclose(made["PLP+CTW"], made["CTW"], rtol=1e-4)
        np.testing.assert_allclose(made["PLP+ATD"], made["CTW"], rtol=1e-4)
        np.testing.assert_allclose(made["PLP-Energy+CLIPN"], made["PLP-Energy"] + np.log(made["CTW"]), rtol=1e-4)


def test_one_probe_serves_all_checkpoints_of_a_base(evaluated, tmp_path, encoded):
    write_clipn(tmp_path / "other.pt", no_seed=5)
    both = f"eval.checkpoints=[{tmp_path}/clipn.pt,{tmp_path}/other.pt]"
    results = evaluated("PLP-MSP,LP-MSP,PLP+CTW", both).results
    assert len(list((tmp_path / "run/features/probes").iterdir())) == 2 and sum(encoded) == 6 + 4 + 45
    scores = results.groupby("method")["AUROC"].nunique()
    assert scores["PLP-MSP"] == scores["LP-MSP"] == 1


def test_training_images_are_opened_for_methods_that_need_them(evaluated, tmp_path):
    assert len(evaluated("MSP,MCM-5", f"eval.train={tmp_path}/none").results) == 2


def test_methods_learn_only_from_images_that_clipn_keeps(evaluated, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "clipn")
    monkeypatch.setitem(scores.DECISIONS, "ATD", lambda yes, no: torch.arange(len(yes)) % 3 == 0)
    for number, path in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        if number % 3:
            (tmp_path / "kept" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "kept" / path.parent.name)
    methods = "PLP-L1,LP-L1,1NN,kNN"
    one_by_one = "eval.batch_size=1"  # a batch of another size may round otherwise
    expected = evaluated(methods, f"eval.train={tmp_path}/kept", one_by_one)
    made = evaluated(methods, "eval.train_filter=ATD", one_by_one)
    assert "train_filter=ATD keeps 30 of 45 training images" in messages(caplog)
    everything = evaluated(methods)
    for method in methods.split(","):
        learned, kept, unfiltered = (
            np.concatenate([of_set.scores[method] for of_set in of.set_scores.values()])
            for of in (made, expected, everything)
        )
        np.testing.assert_allclose(learned, kept, rtol=1e-6)
        assert not np.allclose(kept, unfiltered, rtol=1e-5)


def test_too_few_kept_images_are_an_error(evaluated, monkeypatch):
    monkeypatch.setitem(scores.DECISIONS, "CTW", lambda yes, no: torch.arange(len(yes)) >= 2)
    with pytest.raises(ValueError, match="2 training images are too few for 3 classes"):
        evaluated("PLP-MSP", "eval.train_filter=CTW")
    monkeypatch.setitem(scores.DECISIONS, "CTW", lambda yes, no: torch.ones(len(yes), dtype=torch.bool))
    with pytest.raises(ValueError, match="train_filter=CTW: calls each of the 45 training images OOD"):
        evaluated("kNN", "eval.train_filter=CTW")
    with pytest.raises(ValueError, match=r"eval\.train_filter='MCM': expected one of null, CTW, ATD"):
        evaluated("PLP-MSP", "eval.train_filter=MCM")


def test_a_class_without_pseudo_labels_is_named(evaluated, caplog):
    evaluated("PLP-MSP,PLP-Energy", "eval.class_names=[cat,cat,a heron]")
    assert messages(caplog).count("PLP: no training image has the label of") == 1
    (warning,) = [record for record in caplog.records if "no training image" in record.getMessage()]
    assert warning.levelname == "WARNING" and "cat" in warning.getMessage()


@pytest.mark.parametrize(
    ("methods", "words", "message"),
    [
        ("PLP-MSP", ["eval.train=null"], r"PLP-MSP needs in-distribution training images.*eval\.train"),
        ("LP-L1", ["eval.train={tmp_path}/ood"], "LP-L1 needs class folders"),
        (
            "PLP-RMD",
            ["eval.train={tmp_path}/one"],
            r"eval\.train: PLP-RMD needs 3 training images or more.*one holds 1",
        ),
        ("PLP-MSP", ["eval.train={tmp_path}/empty"], "image set 'empty': no image in"),
        ("LP-MSP", ["eval.train={tmp_path}/two"], "LP-MSP needs class folders"),
        ("1NN,PLP-MSP", ["eval.train={tmp_path}/two"], r"eval\.train: PLP-MSP needs 3 .*as classes, but .*two holds 2"),
        ("1NN", ["eval.train={tmp_path}/none"], "no such folder"),
    ],
)
def test_missing_training_images_are_reported_before_any_is_encoded(
    evaluated, tmp_path, encoded, methods, words, message
):
    write_images(tmp_path / "one", "1.png")
    write_images(tmp_path / "two", "1.png", "2.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluated(methods, *(word.replace("{tmp_path}", str(tmp_path)) for word in words))
    assert not sum(encoded)
