"""The user's door: pictures of every kind in, verdicts out, equal to the evaluation's."""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import architecture, write_clipn
from helpers import image_bytes, messages, png_header
from PIL import Image

import clipn
from clipn.data.image_sets import open_image_set
from clipn.data.prompts import simple_templates
from clipn.evaluation.evaluate import score_features
from clipn.scores import SCORES

NAMES = ["cat", "dog", "a red fire engine"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_clipn(tmp_path_factory.mktemp("detector") / "clipn.pt")


@pytest.fixture
def detector(checkpoint):
    return clipn.Detector.from_pretrained(checkpoint, NAMES, device="cpu")


@pytest.fixture
def photos(tmp_path):
    """Seven pictures of noise, of many sizes."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(7):
        Image.fromarray(generator.integers(0, 256, (30 + 9 * n, 80, 3), np.uint8)).save(folder / f"{n}.png")
    return sorted(folder.iterdir())


def numbers(results):
    return [[r.score, r.p_yes, r.is_ood] for r in results]


@pytest.mark.parametrize("method", SCORES)
def test_scores_are_those_of_the_evaluation(checkpoint, photos, method):
    images = open_image_set("photos", photos[0].parent)
    model, _, preprocess = clipn.create_model_and_transforms(architecture(), checkpoint)
    head = clipn.build_head(model, clipn.get_tokenizer(architecture()), NAMES, simple_templates())
    features = model.encode_image(torch.stack([preprocess(clipn.open_image(path)) for path in images.paths]))
    expected = score_features(head, images, features, list(SCORES))
    detector = clipn.Detector.from_pretrained(checkpoint, NAMES, method=method)
    results = detector.predict(images.paths, batch_size=3)
    assert [r.score for r in results] == pytest.approx(expected.scores[method].tolist(), rel=1e-4, abs=1e-6)
    assert [r.label for r in results] == [NAMES[c] for c in expected.predicted]
    assert [r.p_yes for r in results] == pytest.approx(expected.p_yes.tolist(), rel=1e-5)
    assert [r.p_yes + r.p_no for r in results] == pytest.approx([1.0] * 7)
    for name, values in expected.scores.items():
        assert [r.scores[name] for r in results] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)
    if method in expected.says_ood:
        assert [r.is_ood for r in results] == expected.says_ood[method].tolist()


def test_top_ranks_the_classes(detector, photos):
    result = detector.predict(photos[0])
    top = result.top(5)
    assert [c.label for c in result.top(1)] == [result.label] and len(top) == 3
    assert [c.probability for c in top] == sorted((c.probability for c in top), reverse=True)
    assert sum(c.probability for c in top) == pytest.approx(1) and all(c.p_yes + c.p_no == 1 for c in top)
    assert top[0].p_yes == pytest.approx(result.p_yes)
    assert result.scores["ATD"] == pytest.approx(sum(c.probability * c.p_yes for c in top), rel=1e-5)


def test_every_kind_of_input_is_the_same_picture(detector, photos):
    path, picture = photos[3], Image.open(photos[3])
    array = np.array(picture)
    kinds = [path, str(path), path.read_bytes(), picture, array, array / 255, torch.from_numpy(array).permute(2, 0, 1)]
    kinds.append(detector.preprocess(picture))
    expected = numbers([detector.predict(path)])[0]
    for found in numbers(detector.predict(kinds)) + numbers(detector.predict(one) for one in kinds):
        assert found == pytest.approx(expected, rel=1e-5)


def test_one_a_list_and_an_iterator(detector, photos):
    listed = detector.predict(photos, batch_size=2)
    assert isinstance(listed, list) and len(listed) == 7
    lazily = detector.predict(iter(photos), batch_size=2)
    assert next(lazily).score == pytest.approx(listed[0].score, rel=1e-5)
    assert [r.score for r in lazily] == pytest.approx([r.score for r in listed[1:]], rel=1e-5)
    same = np.stack([np.asarray(Image.open(photos[0]))] * 3)
    assert len(detector.predict(same)) == len(detector.predict(torch.from_numpy(same).permute(0, 3, 1, 2))) == 3
    assert detector.predict([]) == [] and list(detector.predict(iter([]))) == []


def test_an_iterator_is_read_no_more_than_two_batches_ahead(detector, photos):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield photos[0]

    results = detector.predict(endless(), batch_size=4)
    for _ in range(9):
        next(results)
    assert len(taken) <= 9 + 2 * 4
    results.close()
    one_at_a_time = detector.predict(endless(), batch_size=1)
    taken.clear()
    next(one_at_a_time)
    assert len(taken) == 1


def test_a_grey_picture_is_the_same_in_every_mode(detector):
    grey = np.full((20, 30), 99, np.uint8)
    as_colour = np.repeat(grey[..., None], 3, axis=2)
    kinds = [grey, grey[..., None], as_colour, torch.from_numpy(grey)[None], Image.fromarray(grey)]
    kinds.append(Image.fromarray(as_colour).convert("RGBA"))
    scores = [r.score for r in detector.predict(kinds)]
    assert scores == pytest.approx([scores[0]] * 6, rel=1e-5)


@pytest.mark.parametrize(
    "image, words",
    [
        ("https://example.org/cat.jpg", ["https://example.org/cat.jpg", "not fetched"]),
        ("nowhere.jpg", ["nowhere.jpg", "no such file"]),
        (b"no image", ["image 0", "unknown format"]),
        (image_bytes()[:300], ["image 0", "no readable image"]),
        (png_header(20_000, 10_000), ["image 0", "200000000 pixels"]),
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
def test_what_is_no_image_gets_one_line(detector, image, words):
    with pytest.raises((ValueError, OSError)) as error:
        detector.predict([image])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    [returned] = detector.predict([image], on_error="return")
    assert isinstance(returned, (ValueError, OSError)) and str(returned) == str(error.value)


def test_a_broken_picture_takes_the_place_of_its_result(detector, photos, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("these are words")
    mixed = [photos[0], text, photos[1], b"", photos[2]]
    alone = detector.predict(photos[:3])
    for size in (1, 2, 5):
        found = detector.predict(mixed, batch_size=size, on_error="return")
        assert isinstance(found[1], ValueError) and "text.jpg" in str(found[1]) and isinstance(found[3], ValueError)
        assert [found[n].score for n in (0, 2, 4)] == pytest.approx([r.score for r in alone], rel=1e-5)
    assert isinstance(detector.predict(text, on_error="return"), ValueError)
    before = detector.predict(iter(mixed), batch_size=2)
    assert next(before).score == pytest.approx(alone[0].score, rel=1e-5), "what comes before it is not lost"
    with pytest.raises(ValueError, match="text.jpg"):
        next(before)


@pytest.mark.parametrize("choice", [{"on_error": "ignore"}, {"batch_size": 0}])
def test_impossible_choices_are_refused(detector, choice):
    with pytest.raises(ValueError, match=next(iter(choice))):
        detector.predict([], **choice)


def test_calibration_keeps_the_asked_share(detector, photos):
    scores = sorted(r.score for r in detector.predict(photos))
    assert detector.threshold is None
    for keep, out in ((1.0, 0), (0.95, 0), (0.8, 1), (0.5, 3)):
        threshold = detector.calibrate(iter(photos), keep=keep)
        assert threshold == detector.threshold == pytest.approx(scores[out], rel=2e-4)
        assert sum(r.is_ood for r in detector.predict(photos)) == out
        assert sum(detector.predict(photo).is_ood for photo in photos) == out, "one by one as in a batch"
    detector.set_classes(["horse", "cow"])
    assert detector.threshold is None, "a threshold of other classes says nothing"


@pytest.mark.parametrize("images, keep, words", [([], 0.95, "at least one"), (["x.png"], 0.0, "keep=0.0")])
def test_impossible_calibrations_are_refused(detector, images, keep, words):
    with pytest.raises(ValueError, match=words):
        detector.calibrate(images, keep=keep)


def test_a_score_without_a_decision_says_so(checkpoint, photos):
    detector = clipn.Detector.from_pretrained(checkpoint, NAMES, method="MCM")
    result = detector.predict(photos[0])
    assert result.score == result.scores["MCM"] and "MCM" in str(result)
    with pytest.raises(ValueError, match="calibrate.*CTW or ATD"):
        _ = result.is_ood
    detector.calibrate(photos, keep=0.5)
    assert {r.is_ood for r in detector.predict(photos)} == {True, False}


def test_classes_change_without_reloading_and_are_encoded_once(detector, photos, monkeypatch):
    encoded = []
    encode = clipn.CLIPN.encode_text
    monkeypatch.setattr(clipn.CLIPN, "encode_text", lambda self, t: encoded.append(len(t)) or encode(self, t))
    first = detector.predict(photos[0])
    detector.set_classes(["cat", "zebra"])
    assert sum(encoded) == 7 and detector.class_names == ["cat", "zebra"], "7 templates of the one new name"
    assert {c.label for c in detector.predict(photos[0]).top()} == {"cat", "zebra"}
    detector.set_classes(NAMES)
    assert sum(encoded) == 7 and detector.predict(photos[0]).score == pytest.approx(first.score, rel=1e-6)
    detector.set_classes(NAMES, ["{}"])
    assert sum(encoded) == 7 + 3 and detector.templates == ["{}"]
    assert set(first.class_names) == set(NAMES), "a result keeps the classes that it was judged by"


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
    expected = {}
    for names in choices:
        expected[tuple(names)] = [r.score for r in detector.with_classes(names).predict(photos)]
    done = threading.Event()

    def predict():
        count = 0
        while not done.is_set() or not count:
            results = detector.predict(photos, batch_size=7)
            assert [r.score for r in results] == pytest.approx(expected[tuple(results[0].class_names)], rel=1e-4)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        predictions = [pool.submit(predict) for _ in range(4)]
        for n in range(60):
            detector.set_classes(choices[n % 3])
        done.set()
        assert all(one.result() for one in predictions)


@pytest.mark.parametrize("names", [[], "cat", ["cat", " "], ["cat", 3], None])
def test_no_class_names_are_refused_before_the_weights_are_read(names):
    with pytest.raises(ValueError, match="class_names: expected a list"):
        clipn.Detector.from_pretrained("nowhere.pt", names)


def test_unknown_choices_are_refused_before_the_weights_are_read():
    with pytest.raises(ValueError, match="'XYZ'.*CTW"):
        clipn.Detector.from_pretrained("nowhere.pt", NAMES, method="XYZ")
    with pytest.raises(FileNotFoundError, match="templates='tmpl'.*simple"):
        clipn.Detector.from_pretrained("nowhere.pt", NAMES, templates="tmpl")
    with pytest.raises(ValueError, match="device='gpu'.*cuda"):
        clipn.Detector.from_pretrained("nowhere.pt", NAMES, device="gpu")


def test_one_class_and_very_many(checkpoint, photos):
    alone = clipn.Detector.from_pretrained(checkpoint, ["cat"]).predict(photos[0])
    assert alone.top(3)[0].probability == 1 and alone.score == pytest.approx(alone.p_yes)
    assert alone.is_ood == (alone.p_no > 0.5)
    many = [f"thing number {n}" for n in range(10_000)]
    result = clipn.Detector.from_pretrained(checkpoint, many, templates=["a {}."]).predict(photos[0])
    assert result.label in many and len(result.top(20)) == 20


def test_a_name_longer_than_the_context_is_cut_with_a_word(detector, photos, caplog):
    detector.set_classes(["cat", "an endless name " * 20])
    assert "1 class names are longer than the 16 tokens" in messages(caplog) and "an endless" in messages(caplog)
    assert detector.predict(photos[0]).score >= 0
    caplog.clear()
    detector.set_classes(["cat", "dog"])
    assert not messages(caplog)


@pytest.mark.parametrize("size", [(1, 3_000_000), (2000, 1)])
def test_a_hair_of_a_picture_does_not_fill_the_memory(detector, photos, tmp_path, size):
    Image.new("1", size).save(tmp_path / "hair.png")
    hair, good = detector.predict([tmp_path / "hair.png", photos[0]], on_error="return")
    assert isinstance(hair, ValueError) and "1000 times" in str(hair) and isinstance(good, clipn.Result)


def test_pictures_without_pixels_pipes_and_folders_are_no_images(detector, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    odd = [Image.new("RGB", (0, 5)), tmp_path / "pipe.jpg", tmp_path]
    found = detector.predict([*odd, photos[0]], on_error="return")
    assert [type(one) for one in found] == [ValueError] * 3 + [clipn.Result]
    assert "0 x 5" in str(found[0]) and "pipe.jpg: not a file" in str(found[1])


def test_open_files_and_buffers_are_images(detector, photos):
    content = photos[0].read_bytes()
    expected = detector.predict(photos[0]).score
    with open(photos[0], "rb") as file:
        assert detector.predict(file).score == pytest.approx(expected, rel=1e-6)
    for one in (io.BytesIO(content), bytearray(content), memoryview(content)):
        assert detector.predict(one).score == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("images", [None, 3])
def test_what_is_neither_an_image_nor_many_is_refused(detector, images):
    with pytest.raises(ValueError, match="expected an image, or a list"):
        detector.predict(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_predicts(checkpoint, photos, dtype):
    expected = [r.score for r in clipn.Detector.from_pretrained(checkpoint, NAMES).predict(photos)]
    model = clipn.create_model_and_transforms(architecture(), checkpoint)[0].to(dtype)
    found = clipn.Detector(model, NAMES).predict(photos)
    assert [r.score for r in found] == pytest.approx(expected, abs=0.2)


def test_a_result_does_not_keep_its_batch(detector, photos):
    result = detector.predict(photos)[0]
    assert result.logits_yes.untyped_storage().nbytes() == 4 * len(NAMES)
    result.logits_yes.add_(1)  # an ordinary tensor
    with pytest.raises(ValueError, match="top"):
        result.top(0)


def test_known_names_do_not_wait_for_new_ones(detector, photos, monkeypatch):
    encode, under_way, go_on = clipn.CLIPN.encode_text, threading.Event(), threading.Event()

    def slow(self, tokens):
        under_way.set()
        assert go_on.wait(30), "somebody waits who should not"
        return encode(self, tokens)

    monkeypatch.setattr(clipn.CLIPN, "encode_text", slow)
    with ThreadPoolExecutor(2) as pool:
        new = pool.submit(detector.with_classes, ["a new name"])
        assert under_way.wait(30)
        known = pool.submit(detector.with_classes, NAMES[:2])
        assert known.result(timeout=20).predict(photos[0]).label in NAMES
        go_on.set()
        assert new.result().class_names == ["a new name"]


def test_what_came_before_an_error_of_the_iterator_is_not_lost(detector, photos):
    def failing():
        yield from photos[:3]
        raise OSError("the camera is gone")

    for size in (1, 2, 32):
        results = detector.predict(failing(), batch_size=size)
        assert [next(results).label in NAMES for _ in range(3)] == [True] * 3
        with pytest.raises(OSError, match="the camera is gone"):
            next(results)


def test_a_pil_image_that_fails_late_and_an_open_text_file(detector, photos, tmp_path):
    (tmp_path / "list.txt").write_text(str(photos[0]))
    with open(tmp_path / "list.txt") as text:
        found = detector.predict([Image.open(photos[0]), text, photos[0]], on_error="return")
    assert isinstance(found[1], ValueError) and "binary mode" in str(found[1])
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[content.rindex(b"IDAT")] = 0
    late = Image.open(io.BytesIO(content))
    broken, good = detector.predict([late, photos[0]], on_error="return")
    assert isinstance(broken, ValueError) and good.score == pytest.approx(found[0].score, rel=1e-5)


def test_its_own_preprocessing_is_always_taken(detector, caplog):
    for grey in (0, 150, 255):
        picture = Image.new("RGB", (64, 64), (grey, grey, grey))
        expected = detector.predict(picture).score
        assert detector.predict(detector.preprocess(picture)).score == pytest.approx(expected, rel=1e-5)
    caplog.clear()
    detector.predict(torch.rand(3, 32, 32))
    assert "taken as normalised already" in messages(caplog)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(checkpoint, scale):
    with pytest.raises(ValueError, match="scale"):
        clipn.Detector.from_pretrained(checkpoint, NAMES, scale=scale)
