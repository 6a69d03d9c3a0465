"""The golden model: every value agrees with the published code to 1e-4 relative."""

import pytest
import torch

import clipn
from clipn.metrics import ood_metrics
from clipn.model.checkpoint import published_name
from clipn.scores import SCORES


@pytest.fixture(scope="module")
def model(golden):
    return clipn.create_model_and_transforms(golden["config"], golden["checkpoint"])[0]


def assert_close(actual, expected):
    scale = float(torch.as_tensor(expected).abs().max())
    torch.testing.assert_close(torch.as_tensor(actual).detach(), expected, rtol=1e-4, atol=1e-4 * scale)


def features(golden, model):
    arrays = golden["arrays"]
    tokens = arrays["tokens"].long()
    image = model.encode_image(arrays["images"].float())
    return image, model.encode_text(tokens), model.encode_no_text(tokens)


def test_tokens_and_features(golden, model):
    arrays = golden["arrays"]
    assert torch.equal(clipn.get_tokenizer(golden["config"])(golden["texts"]), arrays["tokens"].long())
    for name, actual in zip(("image", "yes", "no"), features(golden, model), strict=True):
        assert_close(actual, arrays[f"{name}_features"])


def test_losses_and_gradients(golden, model):
    image, yes, no = features(golden, model)
    scale = model.logit_scale.exp()
    itbo_yes, itbo_no = clipn.losses.itbo_loss(image, yes, no, scale)
    tso = clipn.losses.tso_loss(yes, no)
    total = 0.5 * (itbo_yes + itbo_no + tso)
    assert float(scale) == pytest.approx(golden["logit_scale"], rel=1e-4)
    losses = {"itbo_yes": itbo_yes, "itbo_no": itbo_no, "tso": tso, "total": total}
    assert {name: float(value.detach()) for name, value in losses.items()} == pytest.approx(golden["losses"], rel=1e-4)
    model.zero_grad()
    total.backward()
    gradients = {published_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {key[5:]: value for key, value in golden["arrays"].items() if key.startswith("grad:")}
    assert gradients.keys() == expected.keys() | {"token_embedding_no.weight"}
    for name, value in expected.items():
        assert_close(gradients[name], value)


@torch.no_grad()
def test_head_scores_and_metrics(golden, model):
    arrays, tokenizer = golden["arrays"], clipn.get_tokenizer(golden["config"])
    head = clipn.build_head(model, tokenizer, golden["classes"], golden["prompts"])
    assert_close(head.weight_yes, arrays["weight_yes"])
    assert_close(head.weight_no, arrays["weight_no"])
    logits = {kind: head(model.encode_image(arrays[f"{kind}_images"].float()), scale=100.0) for kind in ("id", "ood")}
    for method, expected in golden["metrics"].items():
        scores = {kind: SCORES[method](*pair) for kind, pair in logits.items()}
        for kind, values in scores.items():
            assert_close(values, arrays[f"{kind}:{method}"])
        metrics = ood_metrics(scores["id"], scores["ood"])
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4)
