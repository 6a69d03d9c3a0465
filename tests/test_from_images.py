"""Scores of the image itself against slow versions: GL-MCM token by token, ODIN image by image."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import architecture

import clipn
from clipn.methods.from_images import gl_mcm, local_features, odin

NAMES, TEMPLATES = ["cat", "dog", "a red car"], ["a photo of a {}."]
DEEP = {"layers": 3, "patch_size": 8}
TIMM = {"timm_model_name": "test_resnet", "timm_proj": "linear", "image_size": 64, "patch_size": None}


def make(vision):
    torch.manual_seed(0)
    config = architecture(vision)
    model = clipn.create_model_and_transforms(config, num_prompts=2)[0]
    return model, clipn.build_head(model, clipn.get_tokenizer(config), NAMES, TEMPLATES)


@pytest.fixture(scope="module")
def vit():
    return make(DEEP)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def slow_patches(tower, image):
    """One image, one patch at a time: the output of the last block if each token attended to itself alone."""
    tokens = tower._embeds(image[None])
    for block in tower.transformer.resblocks[:-1]:
        tokens = block(tokens)
    outputs = [tower.transformer.resblocks[-1](token[None, None])[0, 0] for token in tokens[0, 1:]]
    return torch.stack([F.normalize(tower.ln_post(output) @ tower.proj, dim=0) for output in outputs])


@pytest.mark.parametrize(
    "vision", [DEEP, {"ls_init_value": 0.3, "layers": 2}, {"pool_type": "avg"}, {"no_ln_pre": True}], ids=str
)
def test_local_features_are_those_of_tokens_that_attend_to_themselves_alone(vision, images):
    model, _ = make(vision)
    with torch.no_grad():
        features, patches = local_features(model, images)
        expected = torch.stack([slow_patches(model.base.visual, image) for image in images])
        torch.testing.assert_close(features, model.encode_image(images))
    assert patches.shape == (4, (32 // model.base.visual.patch_size[0]) ** 2, 32) and patches.dtype == torch.float32
    torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)


def test_local_features_of_clips_resnet(images):
    """The pooling attention with one place as its only key, before its position embedding is added."""
    model, head = make({"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None, "image_size": 64})
    images = F.interpolate(images, 64)
    pool, inputs = model.base.visual.attnpool, []
    hook = pool.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        expected = model.encode_image(images)
        hook.remove()
        features, patches = local_features(model, images)
        places = inputs[0].flatten(2).transpose(1, 2)  # [4, 2 * 2, width]
        places = torch.stack([torch.stack([pool.c_proj(pool.v_proj(x)) for x in row]) for row in places])
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(patches, F.normalize(places, dim=-1))
    assert patches.shape == (4, 4, 32) and gl_mcm(model, head, images).isfinite().all()


def test_local_features_of_a_timm_tower_that_averages(images):
    """One place of the map at a time through the projection; the image feature is that of their mean."""
    model, head = make(TIMM | {"timm_pool": "avg"})
    images, tower, inputs = F.interpolate(images, 64), model.base.visual, []
    hook = tower.trunk.global_pool.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        expected = model.encode_image(images)
        hook.remove()
        features, patches = local_features(model, images)
        places = inputs[0].flatten(2).transpose(1, 2)  # [4, 2 * 2, width]
        places = torch.stack([torch.stack([tower.head(x[None])[0] for x in row]) for row in places])
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(patches, F.normalize(places, dim=-1))
    torch.testing.assert_close(features, F.normalize(places.mean(dim=1), dim=-1))
    assert patches.shape == (4, 4, 32) and gl_mcm(model, head, images).isfinite().all()


@torch.no_grad()
def test_gl_mcm_agrees_with_a_slow_version(vit, images):
    model, head = vit
    scores = gl_mcm(model, head, images, 100.0)
    for image, score in zip(images, scores, strict=True):
        cosines = [head.weight_yes @ patch for patch in slow_patches(model.base.visual, image)]
        local = max(c.softmax(dim=0).max().item() for c in cosines)
        whole = (head.weight_yes @ model.encode_image(image[None])[0]).softmax(dim=0).max().item()
        assert score.item() == pytest.approx(whole + local, rel=1e-5)
    torch.testing.assert_close(scores, gl_mcm(model, head, images, 7.0))


@pytest.mark.parametrize(
    ("vision", "found"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "VisionTransformer of other blocks or pooling"),
        ({"qk_norm": True}, "VisionTransformer of other blocks or pooling"),
        (TIMM | {"timm_pool": "max"}, "TimmModel"),
        (TIMM | {"timm_proj": "mlp"}, "TimmModel"),
    ],
    ids=str,
)
def test_a_base_without_patch_features_is_an_error_for_gl_mcm_alone(vision, found, images):
    model, head = make(vision)
    with pytest.raises(ValueError, match=f"GL-MCM and .* need .*{found}"):
        gl_mcm(model, head, images)
    assert odin(model, head, images).isfinite().all()


def slow_odin(model, head, image, scale, temperature=1000.0, noise=0.0014):
    image = image.clone().requires_grad_()
    logits = scale * model.encode_image(image[None]) @ head.weight_yes.T / temperature
    F.cross_entropy(logits.double(), logits.argmax(dim=1)).backward()
    perturbed = image.detach().clone()
    for channel, std in enumerate(model.preprocess["std"]):
        perturbed[channel] -= noise * image.grad[channel].sign() / std
    logits = scale * model.encode_image(perturbed[None]) @ head.weight_yes.T / temperature
    return logits.softmax(dim=1).max().item()


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_odin_agrees_with_a_slow_version(vit, images, scale):
    model, head = copy.deepcopy(vit)
    model.set_statistics(None, [0.2, 0.3, 0.5])
    before = images.clone()
    scores = odin(model, head, images, scale)
    expected = [slow_odin(model, head, image, scale) for image in images]
    # all scores are near 1 / C: compare by how much they are above it
    torch.testing.assert_close(scores - 1 / 3, torch.tensor(expected) - 1 / 3, rtol=1e-3, atol=2e-7)
    assert torch.equal(images, before) and not scores.requires_grad
    assert all(p.grad is None for p in model.parameters())
    plain = (scale * model.encode_image(images) @ head.weight_yes.T / 1000).softmax(dim=1).amax(dim=1)
    assert (scores > plain).all(), "every image moves towards its class"


@pytest.mark.parametrize(("score", "of_one_class"), [(gl_mcm, 2.0), (odin, 1.0)])
def test_one_image_one_class_and_grad_modes(vit, images, score, of_one_class):
    model, head = copy.deepcopy(vit)
    together = score(model, head, images)
    assert together.shape == (4,)
    torch.testing.assert_close(score(model, head, images[2:3]), together[2:3], rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(score(model, head, images), together)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(score(model, head, images).float(), together, rtol=0.02, atol=0.02)
    one_class = clipn.Head(head.weight_yes[:1], head.weight_no[:1])
    torch.testing.assert_close(score(model, one_class, images), torch.full((4,), of_one_class))
    assert not model.base.visual.transformer.resblocks[-1]._forward_pre_hooks, "no hook is left behind"
