"""The adapter in the no tower's place, and the bias of d: formulas, gradients, training, checkpoints, deployment."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import architecture
from helpers import as_scores, messages, run_ranks, write_images
from safetensors.torch import load_file
from test_features import FROM_FEATURES, NEAR, features_of, inputs_of, logged, make_settings, train_and_record
from test_losses import slow_itbo, unit
from test_sharing import card_of
from test_train import assert_same, weights

import clipn
from clipn import scores
from clipn.config.loading import load_config
from clipn.config.schema import ModelConfig, TrainConfig
from clipn.data.image_sets import open_image_set
from clipn.data.prompts import simple_templates
from clipn.deploy.sharing import ShareOptions, merge_weights, share_weights
from clipn.evaluation.evaluate import evaluate, score_features
from clipn.features.pairs import pair_features
from clipn.losses import itbo_loss, tso_loss
from clipn.model.base import build_base
from clipn.model.checkpoint import write_checkpoint
from clipn.model.clipn import CLIPN, configured_model, load_model
from clipn.model.weights import open_model
from clipn.runtime.signals import Interrupted
from clipn.training.loop import train
from clipn.training.objectives import ClipnObjective
from clipn.training.optimizer import build_optimizer

ADAPTER = ["model.no_tower=adapter", "model.adapter_width=8", "model.bias=true"]
KINDS = [("tower", True), ("adapter", False), ("adapter", True)]
NAMES = ["cat", "dog", "a red fire engine"]


def made(no_tower="adapter", bias=True, width=8) -> CLIPN:
    """A model whose no tower or adapter, and bias, are not at their start."""
    torch.manual_seed(0)
    model = CLIPN(*with_architecture(2), no_tower, bias, width).eval()
    with torch.no_grad():
        for parameter in model.no_text.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if bias:
            model.no_text.bias += 0.2
    return model


def with_architecture(num_prompts):
    base, described = build_base(architecture())
    return base, num_prompts, described


def write(path: Path, model: CLIPN) -> Path:
    content = {"state_dict": model.published_state(), "architecture": model.architecture}
    write_checkpoint(content | {"preprocess": dict(model.preprocess)}, path)
    return path


@pytest.fixture
def tokens():
    return torch.randint(1, 100, (5, 16), generator=torch.Generator().manual_seed(1))


# Formulas


def test_an_adapter_starts_at_the_yes_feature_and_a_bias_at_zero(tokens):
    arguments = {"no_tower": "adapter", "bias": True, "adapter_width": 8}
    model = clipn.create_model_and_transforms(architecture(), **arguments)[0]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_no_text(tokens), model.encode_text(tokens))
    assert not model.no_text.bias.any() and model.cosine_bias == 0
    learned = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    assert learned == {
        "no_text.bias": (),
        "no_text.adapter.0.weight": (8, 32),
        "no_text.adapter.0.bias": (8,),
        "no_text.adapter.2.weight": (32, 8),
        "no_text.adapter.2.bias": (32,),
    }


@torch.no_grad()
def test_an_adapter_is_a_residual_mlp_on_the_yes_feature(tokens):
    model = made()
    state, yes = model.published_state(), model.encode_text(tokens).double()
    first, second = ([state[f"adapter_no.{n}.{part}"].double() for part in ("weight", "bias")] for n in (0, 2))
    hidden = yes @ first[0].T + first[1]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    expected = yes + hidden @ second[0].T + second[1]
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.encode_no_text(tokens).double(), expected, rtol=1e-5, atol=1e-6)
    half = model.half().encode_no_text(tokens)
    torch.testing.assert_close(half, expected.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("block", [2**22, 10])
@pytest.mark.parametrize("bias", [-3.0, 0.7])
def test_itbo_with_a_bias_is_its_formula_and_so_are_its_gradients(bias, block):
    image, yes, no = (unit(6, seed=k).double().requires_grad_() for k in range(3))
    s, b = (torch.tensor(value, dtype=torch.double, requires_grad=True) for value in (5.0, bias))
    f, g, n = (value.float() for value in (image, yes, no))
    terms = itbo_loss(f, g, n, s.float(), block=block, bias=b.float())
    d = s * (image @ no.T - image @ yes.T) + b
    own = torch.eye(6, dtype=torch.bool)
    expected = torch.log1p(d.exp())[own].mean(), torch.log1p((-d).exp())[~own].mean()
    for term, formula in zip(terms, expected, strict=True):
        assert term.item() == pytest.approx(formula.item(), rel=1e-5)
        inputs = [image, yes, no, s, b]
        actual, slow = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (term, formula))
        torch.testing.assert_close(actual, slow, rtol=1e-4, atol=1e-6)
    step = 1e-2
    slow = slow_itbo(image.float(), yes.float(), no.float(), 5.0, 0)
    assert [float(t.detach()) for t in itbo_loss(f, g, n, 5.0)] == pytest.approx(slow, rel=1e-4)
    for k in (0, 1):
        above, below = (itbo_loss(f, g, n, 5.0, bias=bias + sign * step)[k].item() for sign in (1, -1))
        slope = torch.autograd.grad(terms[k], b, retain_graph=True)[0].item()
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-2)


def test_the_loss_of_an_adapter_has_the_gradients_of_its_formula(tmp_path):
    write(tmp_path / "a.pt", made())
    (tmp_path / "model.json").write_text(json.dumps(architecture()))
    words = [f"model.name={tmp_path}/model.json", f"model.pretrained={tmp_path}/a.pt", *ADAPTER, "train.precision=fp32"]
    (tmp_path / "empty.yaml").write_text("")
    objective = ClipnObjective(load_config(tmp_path / "empty.yaml", words), torch.device("cpu"))
    f, g = unit(6, 32, seed=1), unit(6, 32, seed=2)
    batch = objective.prepare({"image_features": f, "yes_features": g}, 0)
    objective.loss(objective.trained, batch, slice(0, 6))[0].backward()
    model, s = objective.model.no_text, float(objective.model.logit_scale.exp())
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}

    slow = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    f, g = f.double(), g.double()
    hidden = F.gelu(g @ slow["adapter.0.weight"].T + slow["adapter.0.bias"])
    n = g + hidden @ slow["adapter.2.weight"].T + slow["adapter.2.bias"]
    n = n / n.norm(dim=1, keepdim=True)
    d = s * (f @ n.T - f @ g.T) + slow["bias"]
    own = torch.eye(6, dtype=torch.bool)
    loss = F.softplus(d[own]).mean() + F.softplus(-d[~own]).mean() + tso_loss(g, n).double()
    (0.5 * loss).backward()
    for name, value in slow.items():
        torch.testing.assert_close(actual[name].double(), value.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [0.0, -2.0, 1.5])
def test_scores_and_decisions_add_the_bias_to_logits_no(bias):
    generator = torch.Generator().manual_seed(0)
    yes, no = (3 * torch.randn(50, 4, generator=generator) for _ in range(2))
    chance, p_no = yes.double().softmax(dim=1), 1 / (1 + (-(no.double() - yes.double() + bias)).exp())
    top = yes.argmax(dim=1, keepdim=True)
    of_top, kept = p_no.gather(1, top).squeeze(1), (1 - p_no) * chance
    unknown = 1 - kept.sum(dim=1)
    assert torch.allclose(scores.p_yes(yes, no, bias).double(), 1 - p_no, atol=1e-6)
    assert torch.allclose(scores.SCORES["CTW"](yes, no, bias=bias).double(), 1 - of_top, atol=1e-6)
    assert torch.allclose(scores.SCORES["ATD"](yes, no, 100.0, bias).double(), 1 - unknown, atol=1e-6)
    assert torch.equal(scores.DECISIONS["CTW"](yes, no, bias), of_top > 0.5)
    assert torch.equal(scores.DECISIONS["ATD"](yes, no, bias), unknown > kept.amax(dim=1))
    for name in scores.SCORES:  # the others ignore it; all agree with the bias added beforehand
        assert torch.allclose(scores.SCORES[name](yes, no, bias=bias), scores.SCORES[name](yes, no + bias), atol=1e-6)


@torch.no_grad()
def test_at_any_scale_d_is_zero_where_training_has_it_zero(tokens):
    model = made()
    head = clipn.build_head(model, clipn.get_tokenizer(architecture()), NAMES, ["a {}"])
    features, s = unit(4, 32), float(model.logit_scale.exp())
    yes, no = head(features, s)
    d = s * features @ (head.weight_no - head.weight_yes).T + model.no_text.bias
    torch.testing.assert_close(no - yes, d, rtol=1e-4, atol=1e-4)
    yes, no = head(features)
    torch.testing.assert_close(no - yes, 100 / s * d, rtol=1e-4, atol=1e-4)


def test_a_head_of_an_adapter_reads_the_templates_as_they_are():
    model, texts = made(), []
    tokenizer = clipn.get_tokenizer(architecture())
    clipn.build_head(model, lambda batch: texts.extend(batch) or tokenizer(batch), ["cat"], ["a photo of a {}"])
    assert texts == 2 * ["a photo of a cat"] and not model.reads_negated
    assert not ModelConfig(no_tower="adapter", num_prompts=0).negated and ModelConfig(num_prompts=0).negated


# Training


@pytest.fixture
def settings(tmp_path):
    """The config of test_features, on a plain CLIP and with an adapter."""
    load = make_settings(tmp_path)
    write_checkpoint(
        {"state_dict": build_base(architecture())[0].state_dict(), "architecture": architecture()}, tmp_path / "clip.pt"
    )
    return lambda *words: load(f"model.pretrained={tmp_path}/clip.pt", *ADAPTER, *words)


def test_training_from_features_runs_no_tower_and_is_training_from_pairs(settings, tmp_path, monkeypatch):
    seeds = ["run.seed=5", "features.seed=5"]
    online = settings(*seeds, f"run.dir={tmp_path}/online")
    train(online)
    stored = settings(*seeds, *FROM_FEATURES, "features.views=2")
    features_of(stored)

    def no_tower(*arguments, **options):
        raise AssertionError("a tower runs in training")

    with monkeypatch.context() as patch:
        for name in ("encode_image", "encode_text", "encode_no_text"):
            patch.setattr(CLIPN, name, no_tower)
        patch.setattr("clipn.model.no_text.text_features", no_tower)
        patch.setattr("clipn.model.clipn.text_features", no_tower)
        train(stored)
    ends = [weights(Path(config.run.dir) / "checkpoints/last.pt") for config in (online, stored)]
    assert_same(*ends, **NEAR)
    names = ("loss", "itbo_yes", "itbo_no", "tso", "grad_norm", "bias", "logit_no_matched")
    assert logged(stored, *names) == pytest.approx(logged(online, *names), rel=1e-3, abs=1e-4)
    assert ends[1]["bias_no"] != 0 and ends[1]["adapter_no.2.weight"].any()
    before = weights(tmp_path / "clip.pt")
    assert all(torch.equal(value, ends[1][name.removeprefix("text.")]) for name, value in before.items())


def test_captions_are_neither_read_nor_kept_in_memory(settings, tmp_path):
    config = settings(*FROM_FEATURES)
    features = pair_features(config, *inputs_of(config))
    assert set(features.batch([(0, 3)])) == {"image_features", "yes_features", "number", "skipped"}
    tower = settings(*FROM_FEATURES, "model.no_tower=tower", "model.bias=false")
    assert "tokens" in features_of(tower).batch([(0, 3)]), "both read the same folder"


@pytest.mark.parametrize("kind", ["adapter", "tower"])
def test_a_stopped_run_resumes_to_the_same_bits(settings, tmp_path, monkeypatch, kind):
    words = [*FROM_FEATURES, f"model.no_tower={kind}"]
    straight = weights(train(settings(*words, f"run.dir={tmp_path}/straight")))
    after_step = ClipnObjective.after_step

    def stop(self, calls=[]):  # noqa: B006 (it counts)
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted("stop")
        after_step(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ClipnObjective, "after_step", stop)
        train(settings(*words, "train.checkpoint_every_steps=2"))
    assert_same(weights(train(settings(*words, "train.checkpoint_every_steps=2"))), straight)
    with pytest.raises(ValueError, match=r"model\.bias: True -> False"):
        train(settings(*words, "model.bias=false"))
    other = {"adapter": "tower", "tower": "adapter"}[kind]
    with pytest.raises(ValueError, match=f"model.no_tower: '{kind}' -> '{other}'"):
        train(settings(*words, f"model.no_tower={other}"))


@pytest.mark.parametrize("kind", ["adapter", "tower"])
def test_two_ranks_are_one_process(settings, tmp_path, kind):
    start = write(tmp_path / "start.pt", made(kind))
    words = [f"model.pretrained={start}", *ADAPTER, f"model.no_tower={kind}", *FROM_FEATURES]
    single = settings(*words, f"run.dir={tmp_path}/single", f"features.dir={tmp_path}/single/features")
    train(single)
    run_ranks(2, train_and_record, tmp_path / "config.yaml", *words, "train.micro_batch_size=2")
    first, second = (weights(f"{tmp_path}/{run}/checkpoints/last.pt") for run in ("single", "run"))
    assert_same(first, second, **NEAR)
    assert first["bias_no"] != weights(start)["bias_no"]
    assert logged(settings(), "loss", "bias") == pytest.approx(logged(single, "loss", "bias"), rel=1e-4)


def test_weight_decay_spares_the_bias():
    for kind, decayed in (("adapter", {(8, 32), (32, 8)}), ("tower", None)):
        model = made(kind)
        groups = {
            group["weight_decay"]: group["params"]
            for group in build_optimizer(model.no_text, TrainConfig()).param_groups
        }
        assert any(p is model.no_text.bias for p in groups[0.0])
        assert all(p.ndim >= 2 for p in groups[0.2]) and decayed in (None, {tuple(p.shape) for p in groups[0.2]})


# Checkpoints


@pytest.mark.parametrize("no_tower, bias", KINDS)
def test_a_checkpoint_round_trip_keeps_every_bit(tmp_path, no_tower, bias):
    model = made(no_tower, bias)
    path = write(tmp_path / "a.pt", model)
    for loaded in (open_model(path), clipn.create_model_and_transforms(architecture(), path)[0]):
        assert (loaded.no_tower, loaded.cosine_bias) == (no_tower, model.cosine_bias)
        assert_same(loaded.published_state(), model.published_state())
    names = {name.split(".")[0] for name in weights(path) if name.split(".")[0].endswith("_no")}
    expected = {"adapter_no"} if no_tower == "adapter" else {"prompt_no", "transformer_no", "ln_final_no"}
    assert expected <= names and ("bias_no" in names) == bias
    assert (names <= {"adapter_no", "bias_no"}) == (no_tower == "adapter")


def test_a_published_checkpoint_has_no_bias_and_gets_0_if_asked(golden, tmp_path, caplog):
    model, _, _ = clipn.create_model_and_transforms(golden["config"], golden["checkpoint"])
    assert model.cosine_bias == 0 and "bias_no" not in model.published_state() and not caplog.text
    settings = ModelConfig(name=golden["config"], pretrained=golden["checkpoint"], bias=True)
    biased = configured_model(settings, "cpu")
    assert "epoch_1.pt has no bias, as model.bias=true asks for: it is 0" in messages(caplog)
    assert biased.published_state()["bias_no"] == 0
    assert_same({**biased.published_state()} | {"bias_no": 0}, model.published_state() | {"bias_no": 0})


@pytest.mark.parametrize(
    "own, words, message",
    [
        (("adapter", False), [], "model.no_tower=adapter, but the config says model.no_tower=tower"),
        (("tower", False), ["no_tower=adapter"], "model.no_tower=tower, but the config says model.no_tower=adapter"),
        (("tower", True), [], "model.bias=true, but the config says model.bias=false"),
        (("adapter", True), ["no_tower=adapter"], "model.bias=true, but the config says model.bias=false"),
        (("adapter", False), ["no_tower=adapter", "adapter_width=9"], "model.adapter_width=8, but .*adapter_width=9"),
    ],
)
def test_a_checkpoint_of_another_kind_than_the_configs_is_refused(settings, tmp_path, own, words, message):
    path = write(tmp_path / "own.pt", made(*own))
    plain = ["model.no_tower=tower", "model.bias=false", "model.adapter_width=8", f"model.pretrained={path}"]
    config = settings(*plain, *(f"model.{word}" for word in words))
    images = write_images(tmp_path / "id", "cat/1.png", "dog/1.png")
    config.eval.id, config.eval.ood, config.eval.templates = str(images), str(images / "cat"), "simple"
    for use in (train, evaluate):
        with pytest.raises(ValueError, match=rf"own\.pt: is of {message}$") as error:
            use(config)
        assert "\n" not in str(error.value)
    config.eval.checkpoints = str(path)
    assert len(evaluate(config).results), "eval.checkpoints may be of any kind"


@pytest.mark.parametrize("no_tower, bias", KINDS)
def test_a_reader_that_does_not_know_them_refuses_the_names(tmp_path, no_tower, bias):
    state = weights(write(tmp_path / "a.pt", made(no_tower, bias)))
    tower = made("tower", False)
    from clipn.model.checkpoint import load_weights

    with pytest.raises(ValueError, match="unexpected: " + ("adapter_no" if no_tower == "adapter" else "bias_no")):
        load_weights(tower, state, "a.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("adapter_no.2.weight"), "missing: adapter_no.2.weight"),
        (lambda state: state.pop("adapter_no.0.bias"), "missing: adapter_no.0.bias"),
        (lambda state: state.update({"prompt_no": torch.zeros(2, 16, 32)}), "unexpected: prompt_no"),
        (lambda state: state.update({"adapter_no.0.weight": torch.zeros(8, 31)}), r"adapter_no.0.weight \(8, 31\)"),
        (lambda state: state.update({"bias_no": torch.tensor(torch.nan)}), "NaN or infinite weights in: bias_no"),
        (lambda state: state.update({"bias_no": torch.zeros(3)}), r"bias_no \(3,\) instead of \(\)"),
    ],
)
def test_a_damaged_adapter_is_named(change, message):
    state = dict(made().published_state())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_model({"state_dict": state}, "a.pt", architecture())


# Deployment


@pytest.mark.parametrize("no_tower, bias", KINDS)
def test_shared_saved_and_merged_models_give_the_scores_of_the_evaluation(tmp_path, no_tower, bias):
    model = made(no_tower, bias)
    path = write(tmp_path / "a.pt", model)
    photos = write_images(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    images = open_image_set("photos", photos)
    head = clipn.build_head(model, clipn.get_tokenizer(architecture()), NAMES, simple_templates())
    preprocess = clipn.create_model_and_transforms(architecture(), path)[2]
    features = model.encode_image(torch.stack([preprocess(clipn.open_image(file)) for file in images.paths]))
    expected = score_features(head, images, features.detach(), list(scores.SCORES))
    plain = score_features(clipn.Head(head.weight_yes, head.weight_no), images, features.detach(), ["ATD"])
    assert (abs(plain.scores["ATD"] - expected.scores["ATD"]).min() > 1e-3) == bias, "the bias matters"

    share_weights(path, tmp_path / "shared")
    stored = load_file(tmp_path / "shared/clipn.safetensors")
    assert stored.keys() == {name for name in model.published_state() if name.split(".")[0].endswith("_no")}
    merge_weights(tmp_path / "shared", tmp_path / "whole.pt", path)
    assert_same(weights(tmp_path / "whole.pt"), weights(path))
    first = clipn.Detector.from_pretrained(path, NAMES, device="cpu")
    first.save(tmp_path / "saved")
    shared = clipn.Detector.from_pretrained(tmp_path / "shared", NAMES, base=path, device="cpu")
    for detector in (first, shared, clipn.Detector.from_pretrained(tmp_path / "saved", device="cpu")):
        again = detector.with_classes([*NAMES, "boat"]).with_classes(NAMES)  # from the cache
        for used in (detector, again):
            results = used.predict(images.paths)
            for name, values in as_scores(expected.scores).items():
                assert [r.scores[name] for r in results] == pytest.approx(values.tolist(), rel=1e-3)
            assert [r.is_ood for r in results] == expected.says_ood["ATD"].tolist()
            assert [r.p_yes for r in results] == pytest.approx(expected.p_yes.tolist(), rel=1e-3)
            by_name = {c.label: c.p_yes for c in results[0].top(3)}
            assert by_name[results[0].label] == results[0].p_yes


def test_the_card_says_what_the_file_holds(tmp_path):
    for kind, bias, title, holds in (
        ("adapter", True, 'a "no" adapter for', "holds the adapter and a bias alone: 553 numbers"),
        ("tower", True, 'a "no" text tower for', "holds the no tower and its 2 prompts, and a bias alone"),
        ("tower", False, 'a "no" text tower for', "holds the no tower and its 2 prompts alone"),
    ):
        folder = tmp_path / f"{kind}{bias}"
        path = write(tmp_path / "a.pt", made(kind, bias))
        facts = share_weights(path, folder, ShareOptions(dtype="float16"))
        text = card_of(folder)[1]
        assert title in text and holds in text and facts["no_tower"] == kind
        assert (facts["bias"] is not None) == bias
    size = (tmp_path / "adapterTrue/clipn.safetensors").stat().st_size
    assert 2 * 553 < size < 2 * 553 + 8000, "float16, and the header"


def test_an_onnx_file_holds_the_bias(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from clipn.deploy.onnx import OUTPUTS, export_onnx

    detector = clipn.Detector.from_pretrained(write(tmp_path / "a.pt", made()), NAMES, device="cpu")
    assert max(export_onnx(detector, tmp_path / "a.onnx").values()) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    outputs = dict(zip(OUTPUTS, session.run(None, {"images": images.numpy()}), strict=True))
    for n, result in enumerate(detector.predict(torch.unbind(images))):
        for name in ("CTW", "ATD"):
            assert outputs[f"score_{name}"][n] == pytest.approx(result.scores[name], rel=1e-3, abs=1e-5)
            assert (
                bool(outputs[f"is_ood_{name}"][n])
                == detector.with_classes(NAMES, method=name).predict(images[n]).is_ood
            )
