"""TagOOD in an evaluation: scores against a slow version, what is kept, images without a tag, and bad input."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import architecture, write_clipn, write_evaluation
from helpers import messages, write_images, write_noise
from safetensors.torch import load_file

from clipn.config.evaluation import TagoodConfig
from clipn.config.loading import load_config
from clipn.config.schema import Config
from clipn.data.image_sets import open_image_set
from clipn.data.images import open_image, val_transform
from clipn.evaluation.evaluate import check_evaluation, evaluate
from clipn.features.columns import RaggedRows
from clipn.methods import registry, tokens
from clipn.methods.taggers import Tags, tag
from clipn.methods.tagood import MeanToken, centre_score
from clipn.methods.tagood_fit import class_means, fit_tagood
from clipn.methods.tokens import REJECTED, TagScore, TrainingTokens, fit_row, open_tokens, token_columns
from clipn.metrics import ood_metrics
from clipn.report.write import write_report

SMALL = TagoodConfig(width=16, layers=1, heads=2, groups=4, epochs=2, batch_size=8, max_tokens=4)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with 6 images of 3 classes, 4 others and 12 training images, a ViT of 16 patches, and a config."""
    folder = tmp_path_factory.mktemp("material")
    names = [
        f"{place}/{name}/{n}.png" for place, each in (("id", 2), ("train", 4)) for name in "abc" for n in range(each)
    ]
    write_noise(folder, *names, *(f"ood/{n}.png" for n in range(4)))
    sections = f"""
features: {{part_size: 5}}
tagood: {{width: 16, layers: 1, heads: 2, epochs: 2, batch_size: 8, max_tokens: 4}}
eval: {{id: {folder}/id, ood: {folder}/ood, templates: simple, train: {folder}/train}}
"""
    vision = {"layers": 2, "patch_size": 8}
    write_evaluation(folder, sections, vision=vision)
    write_clipn(folder / "other.pt", vision=vision, no_seed=5)
    return folder


@pytest.fixture
def evaluated(material, tmp_path):
    """(methods, overrides) -> the evaluation of the 6 images against the 4 others."""
    words = [f"run.dir={tmp_path}/run"]
    return lambda methods, *more: evaluate(
        load_config(material / "config.yaml", [*words, f"eval.methods=[{methods}]", *more])
    )


@pytest.fixture
def inputs(monkeypatch):
    """What methods were made from in an evaluation."""
    made = []

    def remember(*arguments, **options):
        made.append(registry.MethodInputs(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("clipn.evaluation.evaluate.MethodInputs", remember)
    return made


def scores_of(evaluation, name) -> list[float]:
    return [score for of_set in evaluation.set_scores.values() for score in of_set.scores[name].tolist()]


def slow_tokens(tags, settings) -> torch.Tensor:
    """The tokens of the first image: the whole image, and its patches in the order of their attention."""
    ranked = sorted(range(tags.tokens.shape[1]), key=lambda place: -tags.attention[0, place])[: settings.max_tokens + 1]
    return tags.tokens[0, sorted(place for place in ranked if tags.attention[0, place] > settings.attention_threshold)]


def test_scores_of_an_evaluation_against_a_slow_version(evaluated, inputs, monkeypatch):
    """Every image alone: its tags, tokens, feature and centres, and a fit of its own."""
    pixels = []
    tagged = tokens.tag
    monkeypatch.setattr(tokens, "tag", lambda tagger, batch: pixels.append(batch) or tagged(tagger, batch))
    rows = {"TagOOD": "", "TagOOD-mean": "mean", "TagOOD-image": "image", "TagOOD-CE": "CE"}
    evaluation = evaluated(",".join([*rows, "TagOOD-tag"]), "eval.keep_features=false")
    (made,) = inputs
    images = torch.cat(pixels).split(1)
    training, test = images[:12], images[12:]
    settings = made.tagood

    def sets(row):
        kept = [tag(made.tagger, image) for image in training]
        kept = [tags.tokens[0, :1] if row == "image" else slow_tokens(tags, settings) for tags in kept]
        return RaggedRows(torch.cat(kept).half(), torch.tensor([len(of_image) for of_image in kept]))

    for name, row in rows.items():
        encoder, centres, ragged = MeanToken(), None, sets(row)
        if row != "mean":
            weight = 0.0 if row == "CE" else 0.1
            of_fit = dataclasses.replace(settings, centre_weight=weight)
            encoder, centres = fit_tagood(ragged, made.labels, 3, of_fit)
        if row in ("mean", "CE"):
            centres = class_means(encoder, ragged, made.labels, 3, 1 if row == "mean" else 4)
        expected = []
        for image in test:
            tags = tag(made.tagger, image)
            kept = tags.tokens[:, :1] if row == "image" else slow_tokens(tags, settings)[None]
            feature = encoder(kept, torch.ones(kept.shape[:2], dtype=torch.bool))
            groups = zip(feature.view(centres.shape[1], -1), centres.transpose(0, 1), strict=True)
            cosines = [F.cosine_similarity(part[None], of_classes) for part, of_classes in groups]
            expected.append(torch.stack(cosines).mean(dim=0).max().item())
        assert scores_of(evaluation, name) == pytest.approx(expected, abs=1e-3), name  # float16 tokens
    confidence = [tag(made.tagger, image).confidence.item() for image in test]
    assert scores_of(evaluation, "TagOOD-tag") == pytest.approx(confidence, abs=1e-4)
    assert len({tuple(scores_of(evaluation, name)) for name in [*rows, "TagOOD-tag"]}) == 5


def test_tokens_of_training_images_are_kept_and_those_of_test_images_are_not(evaluated, tmp_path, caplog):
    with caplog.at_level("INFO"):
        evaluated("TagOOD,MSP")
    assert "train: tokens of 12 images take" in messages(caplog)
    folders = {path.name.rpartition("-")[0]: path for path in (tmp_path / "run/features/tokens").iterdir()}
    assert set(folders) == {"train", "id", "ood"}
    parts = [load_file(file) for file in sorted(folders["train"].glob("*.safetensors"))]
    counts = torch.cat([part["count"] for part in parts])
    assert [len(part["image"]) for part in parts] == [5, 5, 2] and counts.min() >= 2 and counts.max() <= 5
    assert sum(len(part["tokens"]) for part in parts) == counts.sum() and parts[0]["tokens"].dtype == torch.float16
    for name in ("id", "ood"):
        columns = load_file(folders[name] / "part_00000.safetensors")
        assert set(columns) == {"TagOOD", "tagged", "kept", "skipped"} and columns["TagOOD"].ndim == 1
    manifest = json.loads((folders["train"] / "manifest.json").read_text())
    assert {"tagger", "attention_threshold", "max_tokens", "images", "preprocess"} <= manifest.keys()


def test_a_pass_is_repeated_only_for_what_it_depends_on(evaluated, tmp_path, encoded, material):
    def count(*words):
        encoded.clear()
        made = evaluated("TagOOD", *words)
        return sum(encoded), scores_of(made, "TagOOD")

    features = 12 + 6 + 4
    encodings, first = count()
    assert encodings == 2 * features
    assert count() == (0, first)
    assert count(f"eval.checkpoints={material}/other.pt") == (0, first), "only the no tower differs"
    for word in ("tagood.score=cosine*tag", "tagood.epochs=1", "tagood.seed=3", "tagood.untagged=reject"):
        encodings, scores = count(word)
        assert encodings == 6 + 4 and (scores != first or "reject" in word), word
    for word in (
        "tagood.attention_threshold=0.8",
        "tagood.max_tokens=2",
        "tagood.tag_threshold=0.95",
        "tagood.tags=clipn",
    ):
        assert count(word)[0] == features, word
    fits = len(list((tmp_path / "run/features/tagood").iterdir()))
    count("tagood.score=cosine*tag", "tagood.tags=clipn")
    assert len(list((tmp_path / "run/features/tagood").iterdir())) == fits


def test_cosine_times_tag(evaluated):
    both = [
        np.array(scores_of(evaluated("TagOOD", f"tagood.score={score}"), "TagOOD"))
        for score in ("cosine", "cosine*tag")
    ]
    confidence = np.array(scores_of(evaluated("TagOOD-tag"), "TagOOD-tag"))
    np.testing.assert_allclose(both[1], both[0] * confidence, rtol=1e-5)


def test_pseudo_labels_need_no_class_folders(evaluated, material, tmp_path, inputs, monkeypatch):
    flat = write_images(tmp_path / "flat", *(f"{n}.png" for n in range(5)))
    evaluation = evaluated("TagOOD-PL,TagOOD-PL-mean,TagOOD-PL-CE,TagOOD-PL-image", f"eval.train={flat}")
    assert inputs[0].labels is None and np.isfinite(scores_of(evaluation, "TagOOD-PL")).all()
    monkeypatch.setattr(registry, "pseudo_labels", lambda features, weights: inputs[-1].labels)
    alike = evaluated("TagOOD,TagOOD-PL")
    assert scores_of(alike, "TagOOD") == scores_of(alike, "TagOOD-PL")
    with pytest.raises(ValueError, match="eval.train: TagOOD-mean needs class folders, but .*flat has none"):
        evaluated("TagOOD-mean", f"eval.train={flat}")
    other = write_images(tmp_path / "other", "cat/1.png")
    with pytest.raises(ValueError, match=r"its class folders \(cat\) are not those of eval.id \(a, b, c\)"):
        evaluated("kNN", f"eval.train={other}")


def test_shots_are_drawn_before_training_images_are_encoded(evaluated, material, tmp_path, encoded, inputs):
    made = [evaluated("TagOOD-mean,kNN", "eval.train_shots=2", f"run.seed={seed}") for seed in (0, 1)]
    assert sum(encoded) == 2 * (6 + 4) + 2 * 2 * 6 + 6 + 4, "two draws of 6 training images"
    assert inputs[0].labels.tolist() == [0, 0, 1, 1, 2, 2] and len(inputs[0].train) == len(inputs[0].tokens.tagged) == 6
    assert scores_of(made[0], "kNN") != scores_of(made[1], "kNN")
    everything = [scores_of(evaluated("kNN", *more), "kNN") for more in ([], ["eval.train_shots=9"])]
    assert everything[0] == everything[1] != scores_of(made[0], "kNN")
    flat = write_images(tmp_path / "flat", "1.png", "2.png")
    with pytest.raises(ValueError, match="eval.train_shots=2: .*flat has no class folders"):
        evaluated("kNN", "eval.train_shots=2", f"eval.train={flat}")
    with pytest.raises(ValueError, match="eval.train_shots=0: expected 1 or more, or null"):
        evaluated("kNN", "eval.train_shots=0")


def test_a_class_without_training_images_has_no_centre(evaluated, inputs, monkeypatch, caplog):
    made = []
    monkeypatch.setattr(registry, "fit_row", lambda *arguments: made.append(fit_row(*arguments)) or made[-1])
    monkeypatch.setattr(registry, "pseudo_labels", lambda features, weights: torch.arange(12) % 2)
    evaluation = evaluated("TagOOD-PL,TagOOD-PL-mean,TagOOD-PL-CE")
    assert [len(score.centres) for score in made] == [2, 2, 2]
    assert np.isfinite(scores_of(evaluation, "TagOOD-PL")).all()
    (warning,) = [record for record in caplog.records if "no training image" in record.getMessage()]
    assert "TagOOD-PL" in warning.getMessage() and warning.getMessage().endswith(": c")


# Images without a tag


def make_tags(count=6, places=5, dim=8, seed=0) -> Tags:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, places, dim, generator=generator)
    attention, confidence = torch.rand(count, places, generator=generator), torch.rand(count, generator=generator)
    return Tags(values, attention, confidence, torch.arange(count) % 3 > 0)


@pytest.mark.parametrize("score", ["cosine", "cosine*tag"])
def test_images_without_a_tag_have_the_lowest_score_or_that_of_their_best_tag(score):
    tags = make_tags()
    kept, rejecting = (dataclasses.replace(SMALL, score=score, untagged=untagged) for untagged in ("keep", "reject"))
    centres = torch.randn(3, 1, 8)
    for arguments in ((), (MeanToken(), centres)):
        scores, rejected = TagScore(kept, *arguments)(tags), TagScore(rejecting, *arguments)(tags)
        assert (rejected[~tags.tagged] == REJECTED).all() and torch.equal(rejected[tags.tagged], scores[tags.tagged])
        assert scores.min() > REJECTED
    everything = dataclasses.replace(SMALL, score=score, attention_threshold=0.0, max_tokens=20)
    expected = centre_score(tags.tokens.mean(dim=1), centres) * (tags.confidence if "tag" in score else 1)
    torch.testing.assert_close(TagScore(everything, MeanToken(), centres)(tags), expected)


def test_damaged_and_too_large_tokens_are_errors():
    columns, device = token_columns(make_tags(4), SMALL), torch.device("cpu")
    for name in ("tokens", "tagged"):
        with pytest.raises(ValueError, match="tokens of 4 images: the stored columns do not fit each other"):
            open_tokens([columns | {name: columns[name][:-1]}], device)
    tags = make_tags(4)
    with pytest.raises(ValueError, match="tokens beyond 65504"):
        token_columns(tags._replace(tokens=1e5 * tags.tokens), SMALL)


def test_training_images_without_a_tag_are_left_out_if_they_are_rejected():
    tags, labels = make_tags(12), torch.arange(12) % 3
    opened = open_tokens([token_columns(tags, SMALL)], torch.device("cpu"))
    rejecting = dataclasses.replace(SMALL, untagged="reject")
    for row in tokens.ROWS:
        made = fit_row(row, opened, labels, 3, rejecting)
        numbers = tags.tagged.nonzero()[:, 0]
        expected = fit_row(row, opened.subset(numbers), labels[numbers], 3, SMALL)
        torch.testing.assert_close(made.centres, expected.centres)
        assert made.centres.shape[0] == 2, "class 0 has no tagged image"
    nothing = opened._replace(tagged=torch.zeros(12, dtype=torch.bool))
    with pytest.raises(ValueError, match="tagood.untagged=reject: no training image has a tag"):
        fit_row("", nothing, labels, 3, rejecting)


def make_untagging(settings, model, head, class_names, scale):
    """A tagger that finds no tag in every second image of a batch."""
    base = registry.make_tagger(dataclasses.replace(settings, tagger="clip"), model, head, class_names, scale)

    class Untagging:
        identity, dim, preprocess = "every second", base.dim, base.preprocess

        def __call__(self, pixels):
            return base(pixels)._replace(tagged=torch.arange(len(pixels)) % 2 > 0)

    return Untagging()


def test_the_share_without_a_tag_is_reported(evaluated, caplog):
    with caplog.at_level("INFO"):
        evaluation = evaluated(
            "TagOOD,TagOOD-tag", f"tagood.tagger={__name__}:make_untagging", "tagood.untagged=reject"
        )
    assert "ood: 50.00 % of 4 images have no tag" in messages(caplog)
    assert "id: 66.67 % of 6 images have no tag; where these are ID images, FPR95" in messages(caplog)
    assert scores_of(evaluation, "TagOOD-tag").count(REJECTED) == 4 + 2
    caplog.clear()
    with caplog.at_level("INFO"):
        evaluated("TagOOD")
    assert "id: 0.00 % of 6 images have no tag" in messages(caplog) and "FPR95" not in messages(caplog)


# Where the kept tokens are


def test_places_of_kept_tokens_against_a_loop(evaluated, inputs):
    evaluation = evaluated("TagOOD-tag", "tagood.attention_threshold=0.3", "eval.keep_features=false")
    tagger, settings = inputs[0].tagger, inputs[0].tagood
    for of_set in evaluation.set_scores.values():
        (kept, tagged, preprocess), paths = of_set.places, of_set.images.paths
        assert kept.shape == (len(paths), 4, 4) and tagged.all() and preprocess == tagger.preprocess
        for path, places in zip(paths, kept, strict=True):
            tags = tag(tagger, val_transform(preprocess)(open_image(path))[None])
            ranked = sorted(range(1, 17), key=lambda place: -tags.attention[0, place])[: settings.max_tokens]
            expected = [place for place in ranked if tags.attention[0, place] > settings.attention_threshold]
            assert sorted(expected) == (np.flatnonzero(places) + 1).tolist()
    assert evaluated("MSP").set_scores["id"].places is None


def make_oblong(settings, model, head, class_names, scale):
    """A tagger of 12 patches, which are no square."""
    base = registry.make_tagger(dataclasses.replace(settings, tagger="clip"), model, head, class_names, scale)

    class Oblong:
        identity, dim, preprocess = "oblong", base.dim, base.preprocess

        def __call__(self, pixels):
            tokens, attention, *rest = base(pixels)
            return Tags(tokens[:, :13], attention[:, :13], *rest)

    return Oblong()


def test_a_tagger_without_a_square_grid_has_no_places(evaluated, caplog):
    with caplog.at_level("INFO"):
        evaluation = evaluated("TagOOD-tag", f"tagood.tagger={__name__}:make_oblong")
    assert "ood: the 12 patches of the tagger are no square grid" in messages(caplog)
    assert evaluation.set_scores["id"].places is None and np.isfinite(scores_of(evaluation, "TagOOD-tag")).all()


def test_the_figure_of_kept_tokens_is_in_the_report(evaluated, tmp_path, no_figures):
    for methods, shown in (("MSP,TagOOD-tag", True), ("MSP", False)):
        write_report(tmp_path / "report", evaluated(methods))
        assert (tmp_path / "report/figures/tokens.png").is_file() is shown
        assert ("Tokens that TagOOD keeps" in (tmp_path / "report/report.html").read_text()) is shown


# What it is for


def planted(count: int, known: bool, seed: int) -> tuple[Tags, torch.Tensor]:
    """Images of 12 places: 3 show a thing, of a class or unknown, 9 one of six scenes; the attention is right."""
    generator = torch.Generator().manual_seed(seed)
    axes = 2 * torch.eye(16)
    labels = torch.randint(0, 3, (count,), generator=generator)
    things = axes[labels] if known else axes[3 + torch.randint(0, 3, (count,), generator=generator)]
    values = axes[8 + torch.randint(0, 6, (count,), generator=generator)][:, None].repeat(1, 12, 1)
    values[:, 5:8] = things[:, None]
    values += 0.7 * torch.randn(values.shape, generator=generator)
    attention = torch.zeros(count, 12).index_fill_(1, torch.tensor([5, 6, 7]), 1.0)
    return Tags(values, attention, torch.ones(count), torch.ones(count, dtype=torch.bool)), labels


@pytest.mark.parametrize(("row", "least"), [("mean", 0.2), ("", 0.15)])
def test_tokens_of_the_thing_beat_all_tokens(row, least):
    def auroc(threshold):
        more = {"layers": 1, "heads": 4, "batch_size": 8, "max_tokens": 12}
        settings = TagoodConfig(width=64, epochs=15, attention_threshold=threshold, **more)

        def tagged(*what):
            tags, labels = planted(*what)
            return tags._replace(attention=tags.attention.clamp(min=0.1)), labels

        training, labels = tagged(60, True, 0)
        opened = open_tokens([token_columns(training, settings)], torch.device("cpu"))
        score = fit_row(row, opened, labels, 3, settings)
        return ood_metrics(*(score(tagged(150, known, 1 + known)[0]).numpy() for known in (True, False)))["AUROC"]

    of_thing, of_all = auroc(0.5), auroc(0.0)
    assert of_thing > 0.8 and of_thing > of_all + least, (of_thing, of_all)


# Bad input


def test_a_base_without_patch_tokens_is_an_error(evaluated, material, tmp_path):
    vision = {"attentional_pool": True, "attn_pooler_heads": 2}
    (tmp_path / "pooled.json").write_text(json.dumps(architecture(vision)))
    pooled = [
        f"model.name={tmp_path}/pooled.json",
        f"model.pretrained={write_clipn(tmp_path / 'pooled.pt', vision=vision)}",
    ]
    with pytest.raises(ValueError, match="tagood.tagger=clip need a base with patch features"):
        evaluated("TagOOD", *pooled)


def test_a_tagger_that_is_not_installed_is_found_before_a_training(material):
    config = load_config(material / "config.yaml", ["eval.methods=[TagOOD-tag]", "tagood.tagger=ram"])
    for check in (check_evaluation, evaluate):
        with pytest.raises((ValueError, FileNotFoundError), match="tagood.tagger=ram: the package"):
            check(config)
    check_evaluation(load_config(material / "config.yaml", ["eval.methods=[MSP]", "tagood.tagger=ram"]))


def test_an_image_that_can_no_longer_be_read_is_an_error(material, tmp_path):
    write_images(tmp_path / "set", "1.png")
    (tmp_path / "set/2.png").write_bytes(b"broken")
    config = Config()
    config.features.dir, config.run.device, config.data.workers = str(tmp_path / "features"), "cpu", 0

    class Plain:
        identity, dim, preprocess = "plain", 3, load_preprocess(material)

        def __call__(self, pixels):
            count = len(pixels)
            return Tags(torch.ones(count, 2, 3), torch.ones(count, 2), torch.ones(count), torch.ones(count) > 0)

    with pytest.raises(ValueError, match="image set 'set': .*2.png can no longer be read"):
        tokens.training_tokens(config, Plain(), open_image_set("set", tmp_path / "set"))


def load_preprocess(material):
    from clipn.model.clipn import configured_model

    return configured_model(load_config(material / "config.yaml").model, "cpu").preprocess


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tagger": "blip"}, "tagood.tagger='blip': expected clip, ram, ram\\+\\+ or MODULE:FUNCTION"),
        ({"tags": "tags.txt"}, "tagood.tags='tags.txt': expected classes or clipn, with tagood.tagger=clip"),
        ({"tagger": "ram", "tags": "clipn"}, "tagood.tags='clipn': expected classes or a .txt file"),
        ({"width": 100}, "tagood.heads=8: expected a divisor of tagood.width=100"),
        ({"groups": 3}, "tagood.groups=3: expected a divisor"),
        ({"lr_min": 0.1}, "tagood.lr_min=0.1: expected 0 to tagood.lr=0.001"),
        ({"attention_threshold": 1.0}, "tagood.attention_threshold=1.0: expected 0 or more, below 1"),
        ({"untagged": "drop"}, "tagood.untagged='drop': expected one of keep, reject"),
        ({"score": "tag"}, "tagood.score='tag': expected one of cosine, cosine\\*tag"),
    ],
)
def test_impossible_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        TagoodConfig(**settings)


def test_missing_training_tokens_are_an_error():
    inputs = registry.MethodInputs(None, None, [], labels=torch.zeros(3, dtype=torch.long))
    for tokens_, labels, lacks in ((None, inputs.labels, "tokens"), (TrainingTokens(None, None, None), None, "labels")):
        inputs.tokens, inputs.labels = tokens_, labels
        with pytest.raises(ValueError, match=f"TagOOD: the {lacks} of the training images are missing"):
            registry.METHODS["TagOOD-mean"].make(inputs)
