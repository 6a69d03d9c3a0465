"""Adversarial OOD images: the objective, the perturbation, and `clipn adversarial` from a config to its table."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import write_evaluation
from helpers import files, messages, run_ranks, write_images
from PIL import Image

import clipn.evaluation.adversarial
from clipn.config.loading import load_config
from clipn.data.image_sets import open_image_set
from clipn.data.images import normalise, open_image, val_transform
from clipn.evaluation.adversarial import evaluate_adversarial
from clipn.evaluation.evaluate import evaluate
from clipn.methods.adversarial import objective, perturb, roughness
from clipn.model.clipn import configured_model
from clipn.pipeline import run_adversarial
from clipn.report.figures import draw_adversarial


@pytest.fixture
def problem():
    """A small smooth encoder in float64, 4 images and their targets."""
    generator = torch.Generator().manual_seed(0)
    weight, mix = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((6, 3, 3, 3), (5, 6)))
    images = torch.rand(4, 3, 8, 6, dtype=torch.float64, generator=generator)
    targets = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    return lambda x: F.conv2d(x, weight.to(x)).tanh().mean(dim=(2, 3)) @ mix.to(x).T, images, targets


def test_the_gradient_is_that_of_finite_differences(problem):
    encode, images, targets = problem
    delta = 0.01 * torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta.requires_grad_()
    for smoothness in (0.0, 50.0):
        (gradient,) = torch.autograd.grad(objective(encode, images, delta, targets, smoothness), delta)
        for place in ((0, 0, 0, 0), (1, 2, 7, 5), (2, 1, 3, 5), (3, 0, 7, 2), (0, 1, 4, 3)):
            step = torch.zeros_like(delta)
            step[place] = 1e-6
            with torch.no_grad():
                high, low = (objective(encode, images, delta + s, targets, smoothness) for s in (step, -step))
            assert float(gradient[place]) == pytest.approx(float(high - low) / 2e-6, rel=1e-5, abs=1e-9)


def test_the_objective_is_that_of_a_slow_loop(problem):
    encode, images, targets = problem
    delta = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vertical, horizontal = [], []
    for b, c, h, w in np.ndindex(*delta.shape):
        vertical.append(float(delta[b, c, h + 1, w] - delta[b, c, h, w]) if h < 7 else 0.0)
        horizontal.append(float(delta[b, c, h, w + 1] - delta[b, c, h, w]) if w < 5 else 0.0)
    rough = np.square(vertical).mean() + np.square(horizontal).mean()
    assert float(roughness(delta)) == pytest.approx(rough)
    cosines = [float(f @ t / f.norm() / t.norm()) for f, t in zip(encode(images + delta), targets, strict=True)]
    expected = 3 * rough - np.mean(cosines)
    assert float(objective(encode, images, delta, targets, 3.0)) == pytest.approx(expected)


def test_perturb_is_a_hand_written_adam(problem):
    encode, images, targets = problem
    delta = 1e-3 * torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mean = square = torch.zeros_like(delta)
    for step in range(1, 8):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(encode, images, delta, targets, 20.0), delta)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        delta = ((images + delta.detach() - 0.05 * update).clamp(0, 1) - images).detach()
    assert bool(((images + delta == 0) | (images + delta == 1)).any()), "the clamp is reached"
    torch.testing.assert_close(perturb(encode, images, targets, 7, 0.05, 20.0, 3), images + delta)


def test_features_move_to_the_targets_and_smoothness_holds_pixels_together(problem):
    encode, images, targets = problem
    images[0, :, :4] = 1.0
    cosine = {}
    moved = {s: perturb(encode, images, targets, 100, 5e-3, s) for s in (0.0, 5000.0)}
    for smoothness, pixels in moved.items():
        assert pixels.shape == images.shape and pixels.min() >= 0 and pixels.max() <= 1
        cosine[smoothness] = F.cosine_similarity(encode(pixels), targets)
        assert (cosine[smoothness] > F.cosine_similarity(encode(images), targets)).all()
    assert cosine[0.0].mean() > cosine[5000.0].mean() + 0.01
    assert roughness(moved[0.0] - images) > 10 * roughness(moved[5000.0] - images)


def test_the_seed_decides_and_nothing_else(problem):
    encode, images, targets = (problem[0], *(values.float() for values in problem[1:]))
    state = torch.get_rng_state()
    first = perturb(encode, images, targets, steps=3)
    torch.rand(5)
    assert torch.equal(perturb(encode, images, targets, steps=3), first)
    assert not torch.equal(perturb(encode, images, targets, steps=3, seed=1), first)
    torch.set_rng_state(state)
    with torch.inference_mode():
        again = perturb(encode, images.clone(), targets.clone(), steps=3)
    assert torch.equal(again, first) and first.dtype == torch.float32 and not first.requires_grad
    assert perturb(encode, images.half(), targets.half(), steps=1).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state), "the global random state is not used"


def test_the_model_stays_as_it_is(problem):
    images, targets = (values.float() for values in problem[1:])
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(144, 5), torch.nn.Linear(5, 5).requires_grad_(False)
    )
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    perturb(model, images, targets, steps=2)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert torch.equal(model[1].weight.grad, torch.ones(5, 144)) and model[1].bias.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(3, 8, 8)}, r"images of shape \[3, 8, 8\]: expected \[B, 3, H, W\]"),
        ({"images": torch.rand(4, 1, 8, 8)}, r"images of shape \[4, 1, 8, 8\]"),
        ({"images": torch.rand(0, 3, 8, 8)}, r"images of shape \[0, 3, 8, 8\]"),
        ({"images": torch.rand(4, 3, 8, 8) + 0.5}, r"all of them in 0\.\.1"),
        ({"images": torch.full((4, 3, 8, 8), torch.nan)}, r"all of them in 0\.\.1"),
        ({"images": torch.ones(4, 3, 8, 8, dtype=torch.uint8)}, "images of torch.uint8: expected floats"),
        ({"targets": torch.rand(3, 5)}, r"targets of shape \[3, 5\]: expected \[4, D\]"),
        ({"targets": torch.rand(4, 7)}, r"encode returns \[4, 5\], and the targets \[4, 7\]"),
        ({"targets": torch.full((4, 5), torch.inf)}, "without NaN and infinity"),
        ({"steps": 0}, "steps=0: expected an integer, 1 or more"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"seed": -1}, "seed=-1: expected an integer, 0 or more"),
        ({"lr": 0.0}, "lr=0.0: expected a positive number"),
        ({"lr": torch.nan}, "lr=nan"),
        ({"smoothness": -1.0}, "smoothness=-1.0: expected 0 or more"),
        ({"encode": lambda x: x.mean(dim=(2, 3))[:, [0, 1, 2, 0, 1]] * torch.nan}, "encode returns NaN"),
    ],
)
def test_bad_input_is_one_line(problem, change, message):
    arguments = dict(zip(("encode", "images", "targets"), problem, strict=True)) | {"steps": 2}
    with pytest.raises(ValueError, match=f"^perturb: .*{message}") as error:
        perturb(**(arguments | change))
    assert "\n" not in str(error.value)


# --- clipn adversarial ---


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny model; 8 ID images, 20 training images and 5 and 3 OOD images of random colours; a config of them."""
    folder = tmp_path_factory.mktemp("material")
    noise = np.random.default_rng(0)
    counts = {"id/cat": 4, "id/dog": 4, "train/cat": 10, "train/dog": 10, "ood/far": 5, "other": 3}
    for name, count in counts.items():
        for number in range(count):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(noise.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            small.resize((40, 36), Image.Resampling.BILINEAR).save(path)
    sections = f"""
adversarial: {{images: 8, steps: 12, lr: 0.02, smoothness: 0, batch_size: 2}}
eval:
  id: {folder}/id
  ood: {{far: {folder}/ood, others: {folder}/other}}
  train: {folder}/train
  templates: simple
  methods: [MCM, ATD, 1NN]
"""
    write_evaluation(folder, sections)
    return folder


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A finished `clipn adversarial`: its config and its folder."""
    run = tmp_path_factory.mktemp("adversarial")
    words = [f"run.dir={run}"]
    run_adversarial(str(material / "config.yaml"), words)
    return load_config(material / "config.yaml", words), run / "adversarial"


def adversarial_files(folder: Path) -> dict[str, bytes]:
    """The images of all versions."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*/0*") if path.is_file()}


def test_the_table_has_every_score_of_every_version(finished):
    config, folder = finished
    results = pd.read_csv(folder / "results.csv")
    rows = results.groupby(["ood_set", "pixels"], sort=False)["method"].apply(list)
    assert list(rows.index) == [(name, pixels) for name in ("far", "others") for pixels in ("clean", "float", "png")]
    assert all(methods == ["MCM", "ATD", "1NN", "1NN without targets"] for methods in rows)
    text = (folder / "results.md").read_text()
    for part in (
        "| far ",
        "clean AUROC | clean FPR95 | float AUROC",
        "1NN without targets",
        "average over the OOD sets",
    ):
        assert part in text
    assert Image.open(folder / "samples.png").width > 500
    of = results.set_index(["ood_set", "pixels", "method"])["AUROC"]
    assert of["far", "float", "1NN"] < of["far", "clean", "1NN"], "the images moved towards training images"
    assert of["far", "float", "1NN"] < of["far", "float", "1NN without targets"]


def test_png_folders_are_image_sets(finished, tmp_path):
    config, folder = finished
    words = [f"run.dir={tmp_path}", f"eval.ood={{far: {folder}/far/png}}", "eval.methods=[MCM,ATD]"]
    again = evaluate(load_config(Path(config.eval.train).parent / "config.yaml", words)).results
    results = pd.read_csv(folder / "results.csv").query("ood_set == 'far' and pixels == 'png'").set_index("method")
    for method, row in again.set_index("method").iterrows():
        assert results["AUROC"][method] == pytest.approx(row["AUROC"])


def test_clean_files_are_the_models_input_and_adversarial_ones_are_near_the_targets(finished):
    config, folder = finished
    model = configured_model(config.model, "cpu")
    originals = open_image_set("far", config.eval.ood["far"])
    written = sorted((folder / "far/clean").iterdir())
    transform = val_transform(model.preprocess)
    own, seen = (
        {transform(open_image(path)).numpy().tobytes() for path in paths} for paths in (originals.paths, written)
    )
    assert len(written) == 5 and seen == own, "not a bit differs"
    _, sets = evaluate_adversarial(config)
    to_input = normalise(model.preprocess)
    for of in sets:
        pixels = torch.stack([torch.from_numpy(np.load(path)) for path in of.versions["float"].paths])
        targets = torch.stack([transform(open_image(path)) for path in of.targets])
        cosine = F.cosine_similarity(model.encode_image(to_input(pixels)), model.encode_image(targets))
        torch.testing.assert_close(of.cosines["float"], cosine, rtol=1e-4, atol=1e-5)
        assert (of.cosines["float"] > of.cosines["clean"]).all()
        rounded = torch.stack([torch.from_numpy(np.array(open_image(p))) for p in of.versions["png"].paths])
        assert torch.equal(rounded.permute(0, 3, 1, 2), (255 * pixels).round().byte())
        assert len(set(of.targets)) == len(of.targets)


def test_a_change_below_half_a_level_is_lost_in_8_bits(material, tmp_path, monkeypatch):
    monkeypatch.setattr(clipn.evaluation.adversarial, "perturb", lambda encode, images, *more: images * 254.6 / 255)
    words = [f"run.dir={tmp_path}", "eval.methods=[MCM,1NN]"]
    results, sets = evaluate_adversarial(load_config(material / "config.yaml", words))
    for of in sets:
        torch.testing.assert_close(of.cosines["png"], of.cosines["clean"], rtol=0, atol=1e-6)
        assert (of.cosines["float"] - of.cosines["clean"]).abs().max() > 1e-5
        assert ((of.change > 0.1) & (of.change < 0.4)).all()
    same = results.pivot(index=["ood_set", "method"], columns="pixels", values="AUROC")
    assert (same["png"] == same["clean"]).all()


def test_a_stopped_run_perturbs_the_rest_alone(finished, material, tmp_path, monkeypatch):
    _, folder = finished
    done = []

    def stopping(encode, images, *arguments):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(len(images))
        return perturb(encode, images, *arguments)

    monkeypatch.setattr(clipn.evaluation.adversarial, "perturb", stopping)
    words = str(material / "config.yaml"), [f"run.dir={tmp_path}"]
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        run_adversarial(*words)
    assert not (tmp_path / "adversarial/results.csv").exists()
    stop = None
    run_adversarial(*words)
    run_adversarial(*words)
    assert done == [2, 2, 1, 2, 1], "each image once"
    made, expected = (adversarial_files(of) for of in (tmp_path / "adversarial", folder))
    assert len(made) == 3 * 8 and made == expected


def test_two_ranks_share_the_work(finished, material, tmp_path):
    run_ranks(2, run_adversarial, str(material / "config.yaml"), [f"run.dir={tmp_path}"])
    made, expected = (adversarial_files(folder) for folder in (tmp_path / "adversarial", finished[1]))
    assert made == expected
    results, expected = (pd.read_csv(folder / "results.csv") for folder in (tmp_path / "adversarial", finished[1]))
    pd.testing.assert_frame_equal(results, expected)


def test_images_of_other_settings_are_refused(finished, material, tmp_path):
    shutil.copytree(finished[1], tmp_path / "adversarial")
    words = [f"run.dir={tmp_path}", "adversarial.smoothness=7"]
    message = "adversarial images of something else: adversarial.smoothness: 0.0 there, 7.0 now. Choose another run.dir"
    with pytest.raises(ValueError, match=message):
        run_adversarial(str(material / "config.yaml"), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.train=null", "eval.methods=[MCM]"], "eval.train: names no ID training images"),
        (
            ["adversarial.images=20"],
            "adversarial.images=20: expected fewer than the 20 images of eval.train: 1NN needs",
        ),
        (["eval.id=null"], "eval.id: names no image set"),
        (["eval.ood={far: FOLDER/empty}"], "image set 'far': no image in"),
        (["eval.ood={far: FOLDER/broken}"], "'far': none of the 1 images in .*broken is readable"),
        (["adversarial.steps=0"], "adversarial.steps=0: expected 1 or more"),
        (["adversarial.lr=0"], "adversarial.lr=0.0: expected a positive number"),
        (["adversarial.smoothness=-1"], "adversarial.smoothness=-1.0: expected 0 or more"),
        (["adversarial.seed=-1"], "adversarial.seed=-1: expected 0 or more"),
        (["eval.methods=[MCX]"], "unknown score 'MCX'"),
    ],
)
def test_bad_settings_are_one_line_before_any_work(material, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(clipn.evaluation.adversarial, "perturb", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_bytes(b"no image")
    words = [f"run.dir={tmp_path}/run", *(word.replace("FOLDER", str(tmp_path)) for word in words)]
    with pytest.raises(ValueError, match=message):
        run_adversarial(str(material / "config.yaml"), words)
    assert not (tmp_path / "run/adversarial/far/clean").exists()


def test_the_number_of_images_is_limited(material, tmp_path, caplog):
    words = [f"run.dir={tmp_path}", "adversarial.images=2", "eval.methods=[MCM,ATD]"]
    results, sets = evaluate_adversarial(load_config(material / "config.yaml", words))
    assert [len(of.versions["png"]) for of in sets] == [2, 2] and len(set(results["method"])) == 2
    assert set(4 * results["AUROC"] % 1) == {0.0}, "2 ID images against 2 OOD images"
    for name in ("id", "far", "others"):
        assert f"{name}: only 2 images: AUROC and FPR95 are rough" in messages(caplog)


def test_an_unreadable_image_is_left_out(material, tmp_path):
    write_images(tmp_path / "ood", "1.png", "2.png", "3.png")
    (tmp_path / "ood/2.png").write_bytes(b"no image")
    words = [f"run.dir={tmp_path}/run", f"eval.ood={{few: {tmp_path}/ood}}", "eval.methods=[MCM]"]
    run_adversarial(str(material / "config.yaml"), words)
    assert len(files(tmp_path / "run/adversarial/few/png")) == 2
    assert set(pd.read_csv(tmp_path / "run/adversarial/results.csv")["method"]) == {"MCM"}


def test_the_figure_shows_the_change_around_grey(finished):
    _, sets = evaluate_adversarial(finished[0])
    figure = draw_adversarial(sets)
    axes = np.array(figure.axes).reshape(8, 8)
    shown = [axis.images[0].get_array() for axis in axes[:4, 0]]
    files = [sets[0].versions[kind].paths[0] for kind in ("clean", "float", "png")]
    clean, after = np.asarray(open_image(files[0])) / 255, np.load(files[1]).transpose(1, 2, 0)
    assert np.allclose(shown[0], clean) and np.allclose(shown[1], (0.5 + 10 * (after - clean)).clip(0, 1), atol=1e-6)
    assert np.array_equal(shown[2], np.asarray(open_image(files[2])))
    assert np.array_equal(shown[3], np.asarray(open_image(sets[0].targets[0])))
    assert [len([a for a in row if a.images]) for row in axes] == [5] * 4 + [3] * 4
    assert [axis.texts[0].get_text() for axis in axes[[0, 4], 0]] == ["far\nclean", "others\nclean"]
