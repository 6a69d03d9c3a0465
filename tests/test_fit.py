"""Detector.fit: methods that learn from ID images give the scores of the evaluation, also after saving."""

import json
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_clipn
from helpers import as_scores, write_images
from PIL import Image
from sklearn.metrics import pairwise_distances

import clipn
from clipn.cli import main
from clipn.config.evaluation import ProbeConfig, TagoodConfig
from clipn.config.loading import load_config
from clipn.deploy.state import DETECTOR_METHODS
from clipn.evaluation.evaluate import evaluate
from clipn.methods.registry import METHODS
from clipn.methods.taggers import make_tagger
from clipn.methods.tokens import REJECTED
from clipn.scores import DECISIONS

NAMES = ["apple", "bus", "cat"]
RED = 0.0  # normalised
TAGOOD = {"epochs": 2, "width": 16, "heads": 2, "tags": "clipn"}
LEARNING = [name for name in DETECTOR_METHODS if name in METHODS and METHODS[name].needs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and class folders of training, ID and OOD images."""
    folder = tmp_path_factory.mktemp("fit")
    write_clipn(folder / "clipn.pt")
    generator = np.random.default_rng(0)
    colours = {name: generator.integers(0, 256, 3) for name in NAMES}
    for kind, count in (("train", 30), ("id", 4), ("ood", 4)):
        for name in NAMES:
            for n in range(count):
                noise = generator.integers(-60, 60, (32, 32, 3)) + (colours[name] if kind != "ood" else 128)
                path = folder / kind / name / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return clipn.Detector.from_pretrained(folder / "clipn.pt", NAMES, device="cpu")


@pytest.fixture(scope="module")
def images(folder):
    return {kind: sorted((folder / kind).rglob("*.png")) for kind in ("train", "id", "ood")}


@pytest.fixture(scope="module")
def labels(images):
    return [path.parent.name for path in images["train"]]


@pytest.fixture(scope="module")
def fitted(loaded, images, labels):
    detector = loaded.with_classes(NAMES, method="kNN")
    return detector.fit(images["train"], labels, settings=ProbeConfig(epochs=3, batch_size=16))


@pytest.fixture(scope="module")
def with_tokens(loaded, images, labels):
    return loaded.with_classes(NAMES, method="TagOOD").fit(images["train"], labels, settings=TagoodConfig(**TAGOOD))


def scores(results):
    return [result.score for result in results]


def test_scores_and_labels_are_those_of_the_evaluation(folder, images, labels, loaded, tmp_path):
    """Also of features that are too wide for some methods, which both refuse with the same words."""
    words = [f"run.dir={tmp_path}/run", "run.device=cpu", f"eval.checkpoints={folder}/clipn.pt", f"eval.id={folder}/id"]
    words += [f"eval.ood={folder}/ood", f"eval.train={folder}/train", "eval.templates=simple", "data.workers=0"]
    words += ["features.dtype=float32"] + [f"tagood.{key}={value}" for key, value in TAGOOD.items()]
    detector = loaded.with_classes(NAMES, method="TagOOD")
    detector.fit(images["train"], labels, settings=TagoodConfig(**TAGOOD))
    scored = []
    for method in [*LEARNING, "MCM-5", "GL-MCM", "ODIN", "TagOOD-tag"]:
        try:
            evaluation = evaluate(load_config("configs/eval_own.yaml", [*words, f"eval.methods=[{method}]"]))
        except ValueError as error:
            with pytest.raises(ValueError, match=method) as refused:
                detector.with_classes(NAMES, method=method)
            assert str(refused.value) == str(error)
            continue
        of_id = evaluation.set_scores["id"]
        results = detector.with_classes(NAMES, method=method).predict(images["id"], batch_size=5)
        assert scores(results) == pytest.approx(as_scores(of_id.scores)[method].tolist(), rel=1e-3, abs=1e-5)
        predicted = of_id.predictions.get(method, of_id.predicted)
        assert [result.label for result in results] == [NAMES[number] for number in predicted]
        assert all(result.scores[method] == result.score and "MCM" in result.scores for result in results)
        scored.append(method)
    assert {
        "kNN",
        "RMD",
        "ViM",
        "ReAct",
        "1NN",
        "PLP-Energy",
        "LP-RMD",
        "PLP+ATD",
        "GL-MCM",
        "TagOOD",
        "TagOOD-PL-CE",
    } <= set(scored)


def test_knn_against_scikit_learn(loaded, images):
    detector = loaded.with_classes(NAMES, method="kNN").fit(iter(images["train"]))
    model, preprocess = detector.model, detector.preprocess

    def encode(paths):
        return model.encode_image(torch.stack([preprocess(clipn.open_image(path)) for path in paths])).detach()

    nearest = pairwise_distances(encode(images["ood"]), encode(images["train"])).min(axis=1)
    assert scores(detector.predict(images["ood"])) == pytest.approx((-nearest).tolist(), rel=1e-3)


def test_the_label_is_that_of_the_probe(fitted, images):
    probe = fitted.with_classes(NAMES, method="LP-Energy")
    result = probe.predict(images["id"][0])
    assert torch.equal(result.logits, result.probe_logits) and result.label == NAMES[int(result.logits.argmax())]
    best = result.top(1)[0]
    assert (best.label, best.p_yes) == (result.label, pytest.approx(result.p_yes))
    assert best.probability == pytest.approx(float(result.logits.softmax(dim=0).max()))
    zero_shot = fitted.with_classes(NAMES, method="ATD").predict(images["id"][0])
    assert zero_shot.probe_logits is None and torch.equal(zero_shot.logits, zero_shot.logits_yes)


def test_a_method_that_has_not_learned_says_how(loaded, images):
    detector = loaded.with_classes(NAMES, method="PLP-Energy")
    for call in (detector.predict, detector.calibrate):
        with pytest.raises(ValueError, match=r"PLP-Energy learns from in-distribution images: .*fit\(id_images\)"):
            call(iter(images["id"]))
    detector.fit(images["train"])
    assert detector.predict(images["id"][0]).says_ood is None
    with pytest.raises(ValueError, match=r"LP-MSP .* with labels: .*fit\(id_images, labels\)"):
        detector.with_classes(NAMES, method="LP-MSP").predict(images["id"][0])
    with pytest.raises(ValueError, match="NegLabel works in `clipn eval` alone"):
        loaded.with_classes(NAMES, method="NegLabel")


def test_labels_are_names_or_numbers(fitted, loaded, images, labels):
    numbers = np.array([NAMES.index(name) for name in labels])
    detector = loaded.with_classes(NAMES, method="RMD").fit(images["train"], numbers)
    by_name = fitted.with_classes(NAMES, method="RMD")
    assert scores(detector.predict(images["ood"])) == scores(by_name.predict(images["ood"]))


@pytest.mark.parametrize(
    ("method", "count", "labels", "words"),
    [
        ("kNN", 0, None, "expected in-distribution images, got 0"),
        ("PLP-MSP", 1, None, "two training images or more"),
        ("PLP-MSP", 2, None, "2 training images are too few for 3 classes"),
        ("RMD", 6, [0] * 5, "5 labels for 6 images"),
        ("RMD", 6, [0, 1, 2, 0, 1, 3], "label 3 is no class: expected 0 to 2"),
        ("RMD", 6, ["apple"] * 5 + ["car"], "label 'car' is no class: .*apple, bus, cat"),
        *(("RMD", 6, [0, 1, 2, 0, 1, label], "is no class") for label in (1.7, True, None, [1], float("nan"), b"cat")),
        ("RMD", 6, 3, "labels=3: expected a name or a number for each image"),
        ("RMD", 6, None, "with labels"),
        ("RMD", 6, [0, 1, 2] * 2, "too few"),
        ("RMD", 6, [0, 1] * 3, "RMD: 1 of 3 classes have no training image: cat"),
    ],
)
def test_images_and_labels_that_do_not_fit(loaded, images, method, count, labels, words):
    detector = loaded.with_classes(NAMES, method=method)
    before = detector._state
    with pytest.raises(ValueError, match=words):
        detector.fit(images["train"][:count], labels)
    assert detector._state is before


def test_unreadable_images_are_named_or_skipped_with_their_labels(loaded, images, labels, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    detector = loaded.with_classes(NAMES, method="RMD")
    mixed, mixed_labels = [*images["train"][:40], broken, *images["train"][40:]], [*labels[:40], "cat", *labels[40:]]
    with pytest.raises(ValueError, match="broken.png"):
        detector.fit(mixed, mixed_labels)
    with pytest.raises(ValueError, match="on_error='ignore': expected raise or skip"):
        detector.fit(mixed, mixed_labels, on_error="ignore")
    detector.fit(mixed, mixed_labels, 1, "skip")  # one by one: a batch of another size may round otherwise
    assert "left out" in caplog.text and "broken.png" in caplog.text
    plain = loaded.with_classes(NAMES, method="RMD").fit(images["train"], labels, 1)
    assert scores(detector.predict(images["id"])) == scores(plain.predict(images["id"]))


def test_held_out_images_that_clipn_calls_ood_do_not_set_the_threshold(
    folder, loaded, images, tmp_path, monkeypatch, encoded
):
    """The decision depends on the image; each image is encoded once."""
    held_out = images["train"][::10]
    cut = float(np.median([result.logits_yes[0] for result in loaded.predict(held_out)]))
    monkeypatch.setitem(DECISIONS, "CTW", lambda yes, no: yes[:, 0] > cut)
    says_ood = [result.is_ood for result in loaded.with_classes(NAMES, method="CTW").predict(held_out)]
    encoded.clear()
    words = [folder / "id", "--classes", ",".join(NAMES), "--checkpoint", folder / "clipn.pt", "--method", "kNN"]
    saved = tmp_path / "saved"
    assert predict(*words, "--fit", folder / "train", "--train-filter", "CTW", "--save", saved) == 0
    assert sum(encoded) == len(images["train"]) + len(images["id"])
    detector = clipn.Detector.from_pretrained(saved, device="cpu")
    threshold = detector.threshold
    kept = [path for path, is_ood in zip(held_out, says_ood, strict=True) if not is_ood]
    assert 0 < len(kept) < len(held_out) and threshold == pytest.approx(detector.calibrate(kept), rel=1e-3)
    assert threshold != pytest.approx(detector.calibrate(held_out), rel=1e-3)
    monkeypatch.setitem(DECISIONS, "CTW", lambda yes, no: torch.ones(len(yes), dtype=torch.bool))
    with pytest.raises(ValueError, match="calibrate: train_filter=CTW calls each of the 9 images OOD"):
        detector.calibrate(held_out, train_filter="CTW")


def test_images_that_clipn_calls_ood_are_not_learned(loaded, images, labels, monkeypatch):
    detector = loaded.with_classes(NAMES, method="RMD")
    monkeypatch.setitem(DECISIONS, "CTW", lambda yes, no: torch.arange(len(yes)) % 9 == 0)
    detector.fit(images["train"], labels, 1, train_filter="CTW")  # one by one, as another batch may round otherwise
    kept = [number for number in range(len(labels)) if number % 9]
    expected = loaded.with_classes(NAMES, method="RMD")
    expected.fit([images["train"][number] for number in kept], [labels[number] for number in kept], 1)
    assert scores(detector.predict(images["ood"])) == pytest.approx(scores(expected.predict(images["ood"])), rel=1e-5)
    with pytest.raises(ValueError, match="train_filter='MCM': expected None or CTW, ATD"):
        detector.fit(images["train"], labels, train_filter="MCM")


def test_tokens_need_a_fit_of_their_own(fitted, images, tmp_path):
    with pytest.raises(ValueError, match=r"TagOOD-PL learns from in-distribution images: .*fit\(id_images\)"):
        fitted.with_classes(NAMES, method="TagOOD-PL").predict(images["id"][0])
    with pytest.raises(ValueError, match=r"TagOOD learns .* with labels: .*fit\(id_images, labels\)"):
        fitted.with_classes(["dog", "cat"], method="TagOOD").predict(images["id"][0])
    with pytest.raises(ValueError, match="settings={}: expected ProbeConfig or TagoodConfig"):
        fitted.with_classes(NAMES, method="TagOOD-PL").fit(images["train"], settings={})


def make_red_tagger(settings, model, head, class_names, scale):
    """The base's tagger, for which an image has a tag if its red is above a limit."""
    base = make_tagger(replace(settings, tagger="clip"), model, head, class_names, scale)

    class Red:
        identity, dim, preprocess = "red", base.dim, base.preprocess

        def __call__(self, pixels):
            return base(pixels)._replace(tagged=pixels[:, 0].mean(dim=(1, 2)) > RED)

    return Red()


def test_images_without_a_tag_are_ood_at_any_threshold(loaded, images, caplog):
    settings = TagoodConfig(**TAGOOD | {"tags": "classes", "tagger": f"{__name__}:make_red_tagger"}, untagged="reject")
    detector = loaded.with_classes(NAMES, method="TagOOD-PL").fit(images["train"], settings=settings)
    detector.calibrate(images["id"])
    rejected = [result.score == REJECTED for result in detector.predict(images["id"])]
    assert 0 < sum(rejected) < len(rejected)
    assert [result.is_ood for result in detector.predict(images["id"])] == rejected
    assert f"calibrate: {100 * np.mean(rejected):.1f} % of the images have no tag" in caplog.text


@pytest.mark.parametrize("method", ["TagOOD", "LP-MSP", "kNN"])
def test_the_callers_own_modes_do_not_change_a_fit(loaded, images, labels, method):
    settings = None if method == "kNN" else TagoodConfig(**TAGOOD) if method == "TagOOD" else ProbeConfig(epochs=2)
    expected = loaded.with_classes(NAMES, method=method).fit(images["train"], labels, settings=settings)
    expected = scores(expected.predict(images["ood"]))
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        detector = loaded.with_classes(NAMES, method=method)
        with mode:
            detector.fit(images["train"], labels, settings=settings)
        assert scores(detector.predict(images["ood"])) == pytest.approx(expected, abs=1e-5)


def test_a_detector_that_is_made_in_inference_mode_learns_with_gradients(folder, images):
    settings = TagoodConfig(**TAGOOD, attention="gradient")
    with torch.inference_mode():
        made = clipn.Detector.from_pretrained(folder / "clipn.pt", NAMES, method="TagOOD-PL", device="cpu")
        made.fit(images["train"], settings=settings)
        results = made.predict(images["ood"])
    other = clipn.Detector.from_pretrained(folder / "clipn.pt", NAMES, method="TagOOD-PL", device="cpu")
    other.fit(images["train"], settings=settings)
    assert scores(results) == pytest.approx(scores(other.predict(images["ood"])), abs=1e-5)


def test_scores_that_are_not_finite_set_no_threshold(with_tokens, images, monkeypatch):
    detector = with_tokens.with_classes(NAMES)
    monkeypatch.setattr(type(detector._state.scorer), "__call__", lambda *_: (torch.full((1,), float("nan")), None))
    with pytest.raises(ValueError, match="calibrate: TagOOD gives scores that are not finite"):
        detector.calibrate(images["id"], batch_size=1)


def test_a_saved_detector_of_another_tagger_is_refused(loaded, images, tmp_path):
    """With tags=clipn, the no tower chooses the tokens."""
    detector = loaded.with_classes(NAMES, method="TagOOD-PL")
    detector.fit(images["train"], settings=TagoodConfig(**TAGOOD)).save(tmp_path / "saved")
    other = write_clipn(tmp_path / "other.pt", no_seed=9)
    clipn.Detector.from_pretrained(other, NAMES, device="cpu").save(tmp_path / "other")
    again = clipn.Detector.from_pretrained(tmp_path / "saved", ["dog", "cat"], device="cpu")
    with pytest.raises(ValueError, match="TagOOD-PL learns"):  # the tokens show the saved classes
        again.predict(images["id"][0])
    (tmp_path / "other" / "clipn.safetensors").replace(tmp_path / "saved" / "clipn.safetensors")
    with pytest.raises(ValueError, match="saved: its tokens were chosen by another tagger"):
        clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")


def test_other_classes_learn_again_and_drop_labels(fitted, images, caplog):
    detector = fitted.with_classes(NAMES, method="PLP-MSP")
    detector.calibrate(images["id"])
    detector.set_classes(["dog", "cat"])
    assert detector.threshold is None and len(detector.predict(images["id"][0]).logits) == 2
    with pytest.raises(ValueError, match="LP-MSP"):
        detector.with_classes(["dog", "cat"], method="LP-MSP").predict(images["id"][0])


def test_a_probe_is_fitted_once_for_all_methods(fitted, images, monkeypatch):
    detector = fitted.with_classes(NAMES, method="PLP-MSP")
    monkeypatch.setattr("clipn.methods.registry.fit_probe", None)
    assert detector.with_classes(NAMES, method="PLP-RMD").predict(images["id"][0]).label in NAMES


@pytest.mark.parametrize("method", ["ATD", "kNN", "LP-RMD", "PLP-Energy", "TagOOD", "TagOOD-PL-CE"])
def test_a_saved_detector_is_the_same(fitted, with_tokens, images, tmp_path, monkeypatch, method):
    detector = (with_tokens if "TagOOD" in method else fitted).with_classes(NAMES, method=method)
    threshold = detector.calibrate(images["id"], keep=0.8)
    detector.save(tmp_path / "saved")
    monkeypatch.setattr("clipn.methods.tagood_fit.fit_tagood", None)
    monkeypatch.setattr("clipn.methods.probe.fit_probe", None)  # a probe is read, not fitted again
    again = clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")
    assert (again.method, again.class_names, again.templates) == (method, NAMES, detector.templates)
    assert again.threshold == threshold
    results, expected = again.predict(images["ood"]), detector.predict(images["ood"])
    assert scores(results) == pytest.approx(scores(expected), rel=1e-6)
    assert [r.is_ood for r in results] == [r.is_ood for r in expected]
    assert [r.label for r in results] == [r.label for r in expected]


def test_a_saved_detector_takes_other_classes_and_methods(fitted, images, tmp_path):
    fitted.with_classes(NAMES, method="LP-MSP").save(tmp_path / "saved")
    same = clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu", method="RMD")
    other = clipn.Detector.from_pretrained(tmp_path / "saved", ["dog", "cat"], device="cpu")
    assert same.threshold is None and same.predict(images["id"][0]).label in NAMES
    with pytest.raises(ValueError, match="LP-MSP .* with labels"):  # they number the saved classes
        other.predict(images["id"][0])
    other.with_classes(["dog", "cat"], method="PLP-MSP").predict(images["id"][0])


def test_a_detector_that_was_not_fitted_is_saved_too(loaded, images, tmp_path):
    loaded.save(tmp_path / "saved")
    again = clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu", method="kNN")
    with pytest.raises(ValueError, match="kNN learns"):
        again.predict(images["id"][0])
    assert scores(again.with_classes(NAMES, method="ATD").predict(images["id"])) == scores(loaded.predict(images["id"]))


def test_saving_replaces_a_saved_detector_and_nothing_else(fitted, loaded, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match="mine: holds something else"):
        fitted.save(tmp_path / "mine")
    with pytest.raises(ValueError, match="notes.txt: holds something else"):
        fitted.save(tmp_path / "mine" / "notes.txt")
    fitted.save(tmp_path / "saved")
    loaded.save(tmp_path / "saved")
    assert clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu").method == "ATD"


def test_a_folder_of_another_base_is_refused(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    other = write_clipn(tmp_path / "other.pt", base_seed=5)
    clipn.Detector.from_pretrained(other, NAMES, device="cpu").save(tmp_path / "other")
    (tmp_path / "other" / "clipn.safetensors").replace(tmp_path / "saved" / "clipn.safetensors")
    with pytest.raises(ValueError, match="saved: its training images were encoded by another image tower"):
        clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")


def test_a_no_tower_trained_further_on_the_same_base_is_accepted(fitted, images, tmp_path):
    """The probe does not depend on it."""
    fitted.with_classes(NAMES, method="PLP+CTW").save(tmp_path / "saved")
    further = write_clipn(tmp_path / "further.pt", no_seed=9)
    clipn.Detector.from_pretrained(further, NAMES, device="cpu").save(tmp_path / "further")
    (tmp_path / "further" / "clipn.safetensors").replace(tmp_path / "saved" / "clipn.safetensors")
    again = clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")
    expected = fitted.with_classes(NAMES, method="PLP+CTW").predict(images["id"][0])
    assert torch.equal(again.predict(images["id"][0]).logits, expected.logits)


def test_one_class_and_wrong_batch_sizes_are_errors(loaded, images):
    with pytest.raises(ValueError, match="a probe tells classes apart"):
        loaded.with_classes(["cat"], method="PLP-MSP").fit(images["train"])
    for size in (0, -1, 1.5, "8", None):
        for call in (loaded.fit, loaded.calibrate, loaded.predict):
            with pytest.raises(ValueError, match="batch_size="):
                call(images["id"], batch_size=size)
    with pytest.raises(ValueError, match="a folder; give a list of its images"):
        loaded.fit(images["id"][0].parent)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("detector.json", b"{", "detector.json: not the settings"),
        ("detector.json", b'{"format": 7}', "format 7: this version of clipn reads 2"),
        ("detector.json", b'{"format": 2}', "detector.json: not the settings of a saved detector: 'class_names'"),
        ("detector.json", {"threshold": "0.5"}, "detector.json: .*threshold='0.5'"),
        ("detector.json", {"threshold": float("nan")}, "detector.json: .*threshold=nan"),
        ("detector.json", {"threshold": True}, "detector.json: .*threshold=True"),
        ("detector.json", {"probe": {"epoch": 3}}, "detector.json: .*'epoch'"),
        ("training.safetensors", b"short", "training.safetensors: not whole"),
        ("training.safetensors", None, "training.safetensors: not whole"),
    ],
)
def test_a_damaged_folder_is_refused(fitted, tmp_path, file, change, words):
    fitted.save(tmp_path / "saved")
    path = tmp_path / "saved" / file
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change).encode()
    path.unlink() if change is None else path.write_bytes(change)
    with pytest.raises(ValueError, match=words):
        clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")


def test_an_interrupted_save_leaves_the_old_detector(fitted, loaded, images, tmp_path, monkeypatch):
    fitted.save(tmp_path / "saved")
    monkeypatch.setattr("clipn.deploy.saved.write_safetensors", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        loaded.save(tmp_path / "saved")
    again = clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")
    assert scores(again.predict(images["id"])) == pytest.approx(scores(fitted.predict(images["id"])), rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_other_weights_drop_the_threshold(fitted, loaded, images, tmp_path, caplog):
    for name, detector in (("PLP+ATD", fitted), ("MCM", loaded)):
        calibrated = detector.with_classes(NAMES, method=name)
        calibrated.calibrate(images["id"])
        calibrated.save(tmp_path / name)
        other = write_clipn(tmp_path / f"{name}.pt", no_seed=9)
        clipn.Detector.from_pretrained(other, NAMES, device="cpu").save(tmp_path / "other")
        (tmp_path / "other" / "clipn.safetensors").replace(tmp_path / name / "clipn.safetensors")
        assert clipn.Detector.from_pretrained(tmp_path / name, device="cpu").threshold is None
    assert caplog.text.count("the saved threshold is dropped") == 2


@pytest.mark.parametrize("method", ["1NN", "GL-MCM"])
def test_another_thread_may_encode_in_the_middle_of_a_prediction(fitted, images, method):
    """Neither the tower without its projection nor the features of patches change what other threads see."""
    detector, zero_shot = (fitted.with_classes(NAMES, method=name) for name in (method, "ATD"))
    expected, expected_others = scores(detector.predict(images["id"])), scores(zero_shot.predict(images["ood"]))
    others = []

    def predict_others(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(scores(zero_shot.predict(images["ood"]))))
            thread.start()
            thread.join()

    hook = fitted.model.base.visual.conv1.register_forward_hook(predict_others)
    try:
        assert scores(detector.predict(images["id"])) == expected
    finally:
        hook.remove()
    assert others and all(values == expected_others for values in others)


# clipn predict --fit


def predict(*words):
    try:
        main(["predict", *map(str, words), "--device", "cpu"])
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_predict_fits_calibrates_saves_and_reads_the_folder(folder, tmp_path, capsys):
    words = [folder / "id", "--classes", ",".join(NAMES), "--checkpoint", folder / "clipn.pt", "--method", "RMD"]
    assert predict(*words, "--fit", folder / "train", "--save", tmp_path / "saved", "--csv", tmp_path / "a.csv") == 0
    assert f"saved: {tmp_path}/saved" in capsys.readouterr().err
    assert predict(folder / "id", "--checkpoint", tmp_path / "saved", "--csv", tmp_path / "b.csv") == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    settings = json.loads((tmp_path / "saved" / "detector.json").read_text())
    assert settings["method"] == "RMD" and settings["threshold"] is not None


def test_the_images_that_set_the_threshold_are_held_out(folder, monkeypatch):
    used = {}
    for name in ("fit", "calibrate"):
        call = getattr(clipn.Detector, name)

        def spy(self, images, *arguments, name=name, call=call, **options):
            used[name] = [str(image) for image in images]
            return call(self, images, *arguments, **options)

        monkeypatch.setattr(clipn.Detector, name, spy)
    words = [folder / "id", "--classes", ",".join(NAMES), "--checkpoint", folder / "clipn.pt", "--method", "kNN"]
    assert predict(*words, "--fit", folder / "train") == 0
    assert len(used["fit"]) == 81 and len(used["calibrate"]) == 9 and not set(used["fit"]) & set(used["calibrate"])
    assert predict(*words, "--fit", folder / "train", "--calibrate", folder / "ood") == 0
    assert len(used["fit"]) == 90 and len(used["calibrate"]) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit", "train", "--method", "MCM"], "method MCM does not learn; methods that do: .*kNN"),
        (["--fit", "train"], "method ATD does not learn"),
        (["--fit", "nowhere", "--method", "kNN"], "no such folder: .*nowhere"),
        (["--method", "kNN"], "kNN learns from images of the classes: name their folder with --fit"),
        (
            ["--fit", "flat", "--method", "RMD"],
            "RMD needs folders .* and it has no class folders",
        ),
        (
            ["--fit", "train", "--method", "RMD", "--classes", "apple,bus"],
            "its class folder 'cat' is none of the classes",
        ),
        (["--fit", "train", "--method", "kNN", "--calibrate", "empty"], "calibrate .*empty: no image there"),
        (["--train-filter", "CTW"], "--train-filter=CTW: filters the images of --fit, which is missing"),
        (["--fit", "one", "--method", "kNN"], "one image, which would set the threshold; name others with --calibrate"),
        (["--fit", "train", "--method", "kNN", "--keep", "1.5"], "keep=1.5"),
        (["--fit", "train", "--method", "kNN", "--save", "train"], "train: holds something else than a saved detector"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, words, message):
    write_images(folder / "flat", *(f"{n}.png" for n in range(20)))
    write_images(folder / "one", "0.png")
    (folder / "empty").mkdir(exist_ok=True)
    words = [str(folder / word) if word in ("train", "nowhere", "flat", "one", "empty") else word for word in words]
    common = [folder / "id", "--classes", ",".join(NAMES), "--checkpoint", folder / "clipn.pt"]
    assert predict(*common, *words) == 1
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
