"""Detector: images of every kind give the results of the evaluation."""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import architecture, write_clipn
from helpers import as_scores, image_bytes, messages, png_header
from PIL import Image
from scipy.special import logit

import clipn
from clipn.config.evaluation import ProbeConfig
from clipn.data.image_sets import open_image_set
from clipn.data.prompts import simple_templates
from clipn.evaluation.evaluate import score_features
from clipn.scores import SCORES

NAMES = ["cat", "dog", "a red fire engine"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_clipn(tmp_path_factory.mktemp("detector") / "clipn.pt")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return clipn.Detector.from_pretrained(checkpoint, NAMES, device="cpu")


@pytest.fixture
def detector(loaded):
    return loaded.with_classes(NAMES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images of noise, of different sizes."""
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for n in range(7):
        Image.fromarray(generator.integers(0, 256, (30 + 9 * n, 80, 3), np.uint8)).save(folder / f"{n}.png")
    return sorted(folder.iterdir())


def scores(results):
    return [result.score for result in results]


def close(values):
    """Equal but for rounding, which other batch sizes and CPUs change: 1e-5 of a logit, so 1e-5 of a score."""
    return pytest.approx(values, rel=1e-3)


def test_scores_are_those_of_the_evaluation(checkpoint, detector, photos):
    images = open_image_set("photos", photos[0].parent)
    model, _, preprocess = clipn.create_model_and_transforms(architecture(), checkpoint)
    head = clipn.build_head(model, clipn.get_tokenizer(architecture()), NAMES, simple_templates())
    features = model.encode_image(torch.stack([preprocess(clipn.open_image(path)) for path in images.paths]))
    expected = score_features(head, images, features, list(SCORES))
    for method in SCORES:
        results = detector.with_classes(NAMES, method=method).predict(images.paths, batch_size=3)
        assert scores(results) == close(as_scores(expected.scores)[method].tolist())
        assert scores(results) == [result.scores[method] for result in results]
        if method in expected.says_ood:
            assert [result.is_ood for result in results] == expected.says_ood[method].tolist()
    assert [result.label for result in results] == [NAMES[c] for c in expected.predicted]
    assert [result.p_yes for result in results] == close(expected.p_yes.tolist())
    assert [result.p_yes + result.p_no for result in results] == close([1.0] * 7)


def test_top_ranks_the_classes(detector, photos):
    result = detector.predict(photos[0])
    top = result.top(5)
    assert [c.label for c in result.top(1)] == [result.label] and len(top) == 3
    assert [c.probability for c in top] == sorted((c.probability for c in top), reverse=True)
    assert sum(c.probability for c in top) == close(1) and all(c.p_yes + c.p_no == 1 for c in top)
    assert top[0].p_yes == close(result.p_yes)
    assert result.scores["ATD"] == close(sum(c.probability * c.p_yes for c in top))
    with pytest.raises(ValueError, match="top"):
        result.top(0)


def test_every_kind_of_input_is_the_same_image(detector, photos):
    path, image = photos[3], Image.open(photos[3])
    array, content = np.array(image), path.read_bytes()
    kinds = [path, str(path), content, bytearray(content), memoryview(content), image, array, array / 255]
    kinds += [torch.from_numpy(array).permute(2, 0, 1), detector.preprocess(image)]
    results = [*detector.predict(kinds), *(detector.predict(kind) for kind in kinds)]
    with open(path, "rb") as file:
        results += [detector.predict(file), detector.predict(io.BytesIO(content))]
    assert scores(results) == close([detector.predict(path).score] * 22)
    grey = np.full((20, 30), 99, np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=2)
    kinds = [grey, grey[..., None], colour, torch.from_numpy(grey)[None], Image.fromarray(grey)]
    kinds.append(Image.fromarray(colour).convert("RGBA"))
    values = scores(detector.predict(kinds))
    assert values == close([values[0]] * 6)


def test_an_image_a_list_and_an_iterator(detector, photos):
    as_list = detector.predict(photos, batch_size=2)
    assert isinstance(as_list, list) and len(as_list) == 7
    lazy = detector.predict(iter(photos), batch_size=2)
    assert [next(lazy).score, *scores(lazy)] == close(scores(as_list))
    same = np.stack([np.asarray(Image.open(photos[0]))] * 3)
    assert len(detector.predict(same)) == len(detector.predict(torch.from_numpy(same).permute(0, 3, 1, 2))) == 3
    assert detector.predict([]) == [] and list(detector.predict(iter([]))) == []


def test_an_iterator_is_read_at_most_two_batches_ahead(detector, photos):
    read = []

    def endless():
        while True:
            read.append(1)
            yield photos[0]

    results = detector.predict(endless(), batch_size=4)
    for _ in range(9):
        next(results)
    assert len(read) <= 9 + 2 * 4
    results.close()
    single = detector.predict(endless(), batch_size=1)
    read.clear()
    next(single)
    assert len(read) == 1


@pytest.mark.parametrize(
    "image, words",
    [
        ("https://example.org/cat.jpg", ["https://example.org/cat.jpg", "not downloaded"]),
        ("nowhere.jpg", ["nowhere.jpg", "no such file"]),
        (b"no image", ["image 0", "unknown format"]),
        (image_bytes()[:300], ["image 0", "no readable image"]),
        (png_header(20_000, 10_000), ["image 0", "200000000 pixels"]),
        (Image.new("RGB", (0, 5)), ["image 0", "0 x 5"]),
        (Image.new("1", (1, 3_000_000)), ["1000 times"]),
        (Image.new("1", (2000, 1)), ["1000 times"]),
        (np.zeros((3, 20, 20), np.uint8), ["[3, 20, 20]", "[height, width]"]),
        (np.zeros((0, 5, 3), np.uint8), ["[0, 5, 3]"]),
        (np.full((5, 5), 7.0), ["0..1"]),
        (np.full((5, 5), np.nan), ["0..1"]),
        (np.zeros((5, 5), np.int64), ["int64", "uint8"]),
        (torch.zeros(20, 20, 3, dtype=torch.uint8), ["[20, 20, 3]", "[1 or 3, height, width]"]),
        (torch.randn(3, 32, 31), ["[3, 32, 31]", "[3, 32, 32]"]),
        (torch.full((3, 32, 32), torch.nan), ["not finite"]),
        (7, ["int", "expected a path"]),
    ],
)
def test_an_unreadable_image_is_one_line(detector, photos, image, words):
    with pytest.raises((ValueError, OSError)) as error:
        detector.predict([image])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    returned, good = detector.predict([image, photos[0]], on_error="return")
    assert isinstance(returned, (ValueError, OSError)) and str(returned) == str(error.value)
    assert isinstance(good, clipn.Result)


def test_pipes_folders_and_text_files_are_unreadable(detector, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "list.txt").write_text(str(photos[0]))
    with open(tmp_path / "list.txt") as text:
        *errors, good = detector.predict([tmp_path / "pipe.jpg", tmp_path, text, photos[0]], on_error="return")
    assert [type(error) for error in errors] == [ValueError] * 3 and isinstance(good, clipn.Result)
    assert "pipe.jpg: not a file" in str(errors[0]) and "binary mode" in str(errors[2])


def test_a_pil_image_that_fails_while_it_is_decoded(detector, photos):
    content = bytearray(image_bytes(size=(300, 300), kind="PNG"))
    content[content.rindex(b"IDAT") + 20] ^= 255
    broken, good = detector.predict([Image.open(io.BytesIO(content)), photos[0]], on_error="return")
    assert "PIL image: no readable image" in str(broken) and good.score == close(detector.predict(photos[0]).score)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_an_error_takes_the_place_of_its_result(detector, photos, tmp_path, batch_size):
    def failing():
        yield from photos[:3]
        raise OSError("the camera is disconnected")

    text = tmp_path / "text.jpg"
    text.write_text("these are words")
    mixed = [photos[0], text, photos[1], b"", photos[2]]
    expected = scores(detector.predict(photos[:3]))
    results = detector.predict(mixed, batch_size=batch_size, on_error="return")
    assert isinstance(results[1], ValueError) and "text.jpg" in str(results[1]) and isinstance(results[3], ValueError)
    assert scores(results[::2]) == close(expected)
    assert isinstance(detector.predict(text, on_error="return"), ValueError)
    for images, results_before, message in ((mixed, 1, "text.jpg"), (failing(), 3, "the camera is disconnected")):
        lazy = detector.predict(iter(images), batch_size=batch_size)
        assert [next(lazy).score for _ in range(results_before)] == close(expected[:results_before])
        with pytest.raises((ValueError, OSError), match=message):
            next(lazy)


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        ([], {"on_error": "ignore"}, "on_error='ignore'"),
        ([], {"batch_size": 0}, "batch_size=0"),
        (None, {}, "expected an image, or a list"),
        (3, {}, "expected an image, or a list"),
        ([], {"keep": 1}, "at least one"),
        (["x.png"], {"keep": 0.0}, "keep=0.0"),
    ],
)
def test_bad_arguments_of_predict_and_calibrate_are_refused(detector, images, options, words):
    with pytest.raises(ValueError, match=words):
        (detector.calibrate if "keep" in options else detector.predict)(images, **options)


def test_calibration_keeps_the_requested_share(detector, photos):
    ranked = sorted(result.log_odds for result in detector.predict(photos))
    assert detector.threshold is None
    for keep, ood in ((1.0, 0), (0.95, 0), (0.8, 1), (0.5, 3)):
        threshold = detector.calibrate(iter(photos), keep=keep)
        assert threshold == detector.threshold and logit(threshold) == close(ranked[ood])
        assert sum(result.is_ood for result in detector.predict(photos)) == ood
        assert sum(detector.predict(photo).is_ood for photo in photos) == ood, "also one by one"
    detector.set_classes(["horse", "cow"])
    assert detector.threshold is None, "a threshold belongs to its classes"


@pytest.mark.parametrize("method", ["ATD", "CTW", "MSP", "PLP-MSP", "PLP+CTW"])
def test_calibration_separates_probabilities_that_round_to_one(loaded, photos, tmp_path, method):
    """Of logits so far apart that float32 rounds most probabilities to 0 or 1."""
    detector = clipn.Detector(loaded.model, NAMES, method=method, scale=1e5)
    if method.startswith("PLP"):
        detector.fit(photos, settings=ProbeConfig(solver="lbfgs", weight_decay=1e-12))
    detector.calibrate(photos, keep=0.6)
    results = detector.predict(photos)
    assert sum(result.is_ood for result in results) == 2, [result.log_odds for result in results]
    assert len({round(result.score, 6) for result in results}) < 5, "the probabilities alone would tie"
    detector.save(tmp_path / "saved")
    again = clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")
    assert [r.is_ood for r in again.predict(photos)] == [r.is_ood for r in results]


def test_a_method_without_a_decision_requires_calibration(detector, photos):
    detector = detector.with_classes(NAMES, method="MCM")
    result = detector.predict(photos[0])
    assert "MCM" in str(result)
    with pytest.raises(ValueError, match="calibrate.*CTW or ATD"):
        _ = result.is_ood
    detector.calibrate(photos, keep=0.5)
    assert {result.is_ood for result in detector.predict(photos)} == {True, False}


def test_new_classes_are_encoded_once(loaded, photos, monkeypatch):
    detector, encoded, encode = clipn.Detector(loaded.model, NAMES), [], clipn.CLIPN.encode_text
    monkeypatch.setattr(clipn.CLIPN, "encode_text", lambda self, t: encoded.append(len(t)) or encode(self, t))
    first = detector.predict(photos[0])
    detector.set_classes(["cat", "zebra"])
    assert sum(encoded) == 7 and detector.class_names == ["cat", "zebra"], "7 templates of the new name"
    assert {c.label for c in detector.predict(photos[0]).top()} == {"cat", "zebra"}
    detector.set_classes(NAMES)
    assert sum(encoded) == 7 and detector.predict(photos[0]).score == close(first.score)
    detector.set_classes(NAMES, ["{}"])
    assert sum(encoded) == 7 + 3 and detector.templates == ["{}"]
    assert set(first.class_names) == set(NAMES), "a result keeps its classes"


def test_another_detector_on_the_same_weights(detector, photos):
    other = detector.with_classes(["horse", "cow"], method="CTW")
    assert other.model is detector.model and other.method == "CTW" and detector.method == "ATD"
    assert (other.class_names, detector.class_names) == (["horse", "cow"], NAMES)
    other.calibrate(photos)
    assert detector.threshold is None and other.predict(photos[0]).label in ("horse", "cow")
    with pytest.raises(ValueError, match="'ADT'.*ATD"):
        detector.with_classes(NAMES, method="ADT")


def test_threads_may_predict_while_the_classes_change(detector, photos):
    choices = [NAMES, ["horse", "cow"], ["key", "drum", "fish", "bee"]]
    expected = {tuple(names): scores(detector.with_classes(names).predict(photos)) for names in choices}
    done = threading.Event()

    def predict():
        count = 0
        while not done.is_set() or not count:
            results = detector.predict(photos, batch_size=7)
            assert scores(results) == close(expected[tuple(results[0].class_names)])
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        predictions = [pool.submit(predict) for _ in range(4)]
        for n in range(60):
            detector.set_classes(choices[n % 3])
        done.set()
        assert all(prediction.result() for prediction in predictions)


def test_known_names_do_not_wait_for_new_ones(detector, photos, monkeypatch):
    encode, started, release = clipn.CLIPN.encode_text, threading.Event(), threading.Event()

    def slow(self, tokens):
        started.set()
        assert release.wait(30), "a thread waits that need not"
        return encode(self, tokens)

    monkeypatch.setattr(clipn.CLIPN, "encode_text", slow)
    with ThreadPoolExecutor(2) as pool:
        new = pool.submit(detector.with_classes, ["a new name"])
        assert started.wait(30)
        known = pool.submit(detector.with_classes, NAMES[:2])
        assert known.result(timeout=20).predict(photos[0]).label in NAMES
        release.set()
        assert new.result().class_names == ["a new name"]


@pytest.mark.parametrize(
    ("names", "options", "kind", "words"),
    [
        *((names, {}, ValueError, "class_names: expected a list") for names in ([], "cat", ["a", " "], ["a", 3], None)),
        (NAMES, {"method": "XYZ"}, ValueError, "'XYZ'.*CTW"),
        (NAMES, {"templates": "tmpl"}, FileNotFoundError, "templates='tmpl'.*simple"),
        (NAMES, {"device": "gpu"}, ValueError, "device='gpu'.*cuda"),
        *((NAMES, {"scale": scale}, ValueError, "scale=") for scale in (0, -1, float("nan"), float("inf"))),
    ],
)
def test_bad_arguments_are_refused_before_the_weights_are_read(names, options, kind, words):
    with pytest.raises(kind, match=words):
        clipn.Detector.from_pretrained("nowhere.pt", names, **options)


def test_one_class_and_very_many(detector, photos):
    single = detector.with_classes(["cat"]).predict(photos[0])
    assert single.top(3)[0].probability == 1 and single.score == close(single.p_yes)
    assert single.is_ood == (single.p_no > 0.5)
    many = [f"thing number {n}" for n in range(600)]
    result = detector.with_classes(many, templates=["a {}."]).predict(photos[0])
    assert result.label in many and len(result.top(20)) == 20


def test_names_that_classes_share_are_a_warning(checkpoint, caplog):
    names = ["cat", "maillot", "maillot"]
    detector = clipn.Detector.from_pretrained(checkpoint, names, device="cpu")
    assert detector.class_names == names
    assert messages(caplog).count("several classes have the same name") == 1 and "maillot" in messages(caplog)
    detector.set_classes(["cat", "dog"])
    caplog.clear()
    detector.set_classes(["cat", "cat"])
    assert messages(caplog).endswith("cannot be distinguished: cat"), "names that are encoded already count too"


def test_a_name_longer_than_the_context_is_truncated_with_a_warning(detector, photos, caplog):
    detector.set_classes(["cat", "an endless name " * 20])
    assert "1 class names exceed the model's 16 tokens" in messages(caplog) and "an endless" in messages(caplog)
    assert detector.predict(photos[0]).score >= 0
    caplog.clear()
    detector.set_classes(["cat", "a new dog"])
    assert not messages(caplog)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_predicts(checkpoint, detector, photos, dtype):
    model = clipn.create_model_and_transforms(architecture(), checkpoint)[0].to(dtype)
    results = clipn.Detector(model, NAMES).predict(photos)
    assert scores(results) == pytest.approx(scores(detector.predict(photos)), abs=0.2)


def test_a_result_does_not_keep_its_batch(detector, photos):
    result = detector.predict(photos)[0]
    assert result.logits_yes.untyped_storage().nbytes() == 4 * len(NAMES)
    result.logits_yes.add_(1)  # not an inference tensor


def test_a_tensor_that_looks_unprocessed_is_used_with_a_warning(detector, caplog):
    for grey in (0, 150, 255):
        image = Image.new("RGB", (64, 64), (grey, grey, grey))
        assert detector.predict(detector.preprocess(image)).score == close(detector.predict(image).score)
    assert "up to" not in messages(caplog)
    for largest, values in ((1, "in 0..1"), (255, "up to 255")):
        caplog.clear()
        detector.predict(largest * torch.rand(3, 32, 32).round())
        assert f"a float tensor of values {values} is used as already normalised" in messages(caplog)
