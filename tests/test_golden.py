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


@pytest.fixture(scope="module")
def head(golden, model):
    return clipn.build_head(model, clipn.get_tokenizer(golden["config"]), golden["classes"], golden["prompts"])


def assert_close(actual, expected):
    scale = float(torch.as_tensor(expected).abs().max())
    torch.testing.assert_close(torch.as_tensor(actual).detach(), expected, rtol=1e-4, atol=1e-4 * scale)


def features(golden, model):
    arrays = golden["arrays"]
    tokens = arrays["tokens"].long()
    image = model.encode_image(arrays["images"].float())
    return image, model.encode_text(tokens), model.encode_no_text(tokens)


def test_tokens(golden):
    assert torch.equal(clipn.get_tokenizer(golden["config"])(golden["texts"]), golden["arrays"]["tokens"].long())


def test_features(golden, model):
    names = ("image_features", "yes_features", "no_features")
    for name, actual in zip(names, features(golden, model), strict=True):
        assert_close(actual, golden["arrays"][name])


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


def test_head_scores_and_metrics(golden, model, head):
    arrays = golden["arrays"]
    assert_close(head.weight_yes, arrays["weight_yes"])
    assert_close(head.weight_no, arrays["weight_no"])
    with torch.no_grad():
        id_logits = head(model.encode_image(arrays["id_images"].float()), scale=100.0)
        ood_logits = head(model.encode_image(arrays["ood_images"].float()), scale=100.0)
    for method, expected in golden["metrics"].items():
        id_scores, ood_scores = SCORES[method](*id_logits), SCORES[method](*ood_logits)
        assert_close(id_scores, arrays[f"id:{method}"])
        assert_close(ood_scores, arrays[f"ood:{method}"])
        metrics = ood_metrics(id_scores, ood_scores)
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4)
