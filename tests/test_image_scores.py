"""Scores of the image itself against slow versions: GL-MCM token by token, ODIN image by image."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import architecture

import clipn
from clipn.methods.from_images import IMAGE_SCORES, local_features
from clipn.scores import SCORES

NAMES, TEMPLATES = ["cat", "dog", "a red car"], ["a photo of a {}."]
DEEP = {"layers": 3, "patch_size": 8}


def made(vision=None, **more):
    torch.manual_seed(0)
    config = architecture(vision, **more)
    model = clipn.create_model_and_transforms(config, num_prompts=2)[0]
    return model, clipn.build_head(model, clipn.get_tokenizer(config), NAMES, TEMPLATES)


@pytest.fixture(scope="module")
def vit():
    return made(DEEP)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plain_patches(tower, image, whole_block=True):
    """One image, one patch at a time: what the last block would say if each token saw itself alone."""
    tokens = tower._embeds(image[None])
    for block in tower.transformer.resblocks[:-1]:
        tokens = block(tokens)
    block, found = tower.transformer.resblocks[-1], []
    for token in tokens[0, 1:]:
        alone, normed = token[None, None], block.ln_1(token)[None, None]  # with one key, attention is its value
        out = block(alone)[0, 0] if whole_block else block.attn(normed, normed, normed)[0][0, 0]
        found.append(F.normalize(tower.ln_post(out) @ tower.proj, dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("whole_block", [True, False])
@pytest.mark.parametrize(
    "vision", [DEEP, {"ls_init_value": 0.3, "layers": 2}, {"pool_type": "avg"}, {"no_ln_pre": True}], ids=str
)
def test_local_features_are_those_of_tokens_that_see_themselves_alone(vision, whole_block, images):
    model, _ = made(vision)
    with torch.no_grad():
        image, patches = local_features(model, images, whole_block)
        expected = torch.stack([plain_patches(model.base.visual, one, whole_block) for one in images])
        torch.testing.assert_close(image, model.encode_image(images))
    assert patches.shape == (4, (32 // model.base.visual.patch_size[0]) ** 2, 32) and patches.dtype == torch.float32
    torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)


def test_local_features_of_clips_resnet(images):
    """The attention that pools, asked with one place as its only key, before its position embedding is added."""
    model, head = made({"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None, "image_size": 64})
    images = F.interpolate(images, 64)
    pool, seen = model.base.visual.attnpool, []
    assert model.base.visual.training is False
    hook = pool.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        expected = model.encode_image(images)
        hook.remove()
        image, patches = local_features(model, images)
        places = seen[0].flatten(2).transpose(1, 2)  # [4, 2 * 2, width]
        places = torch.stack([torch.stack([pool.c_proj(pool.v_proj(x)) for x in row]) for row in places])
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(patches, F.normalize(places, dim=-1))
    assert patches.shape == (4, 4, 32) and IMAGE_SCORES["GL-MCM"](model, head, images).isfinite().all()


@torch.no_grad()
def test_gl_mcm_is_that_of_a_plain_loop(vit, images):
    model, head = vit
    got = IMAGE_SCORES["GL-MCM"](model, head, images, 100.0)
    for image, score in zip(images, got, strict=True):
        cosines = [head.weight_yes @ patch for patch in plain_patches(model.base.visual, image)]
        local = max(c.softmax(dim=0).max().item() for c in cosines)
        whole = (head.weight_yes @ model.encode_image(image[None])[0]).softmax(dim=0).max().item()
        assert score.item() == pytest.approx(whole + local, rel=1e-5)
    torch.testing.assert_close(got, IMAGE_SCORES["GL-MCM"](model, head, images, 7.0))


@torch.no_grad()
def test_a_class_in_one_corner_raises_gl_mcm(vit, images):
    """The local part is the best of all patches: a class that is one patch's own feature is found."""
    model, head = vit
    _, patches = local_features(model, images)
    found = clipn.Head(torch.stack([patches[0, 3], *head.weight_yes[1:]]), head.weight_no)
    mcm = SCORES["MCM"](found(model.encode_image(images))[0])
    local = IMAGE_SCORES["GL-MCM"](model, found, images) - mcm
    own = (found.weight_yes @ patches[0, 3]).softmax(dim=0)
    assert local[0].item() >= own.max().item() - 1e-6


@pytest.mark.parametrize(
    "vision, said",
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "VisionTransformer of other blocks or pooling"),
        ({"qk_norm": True}, "VisionTransformer of other blocks or pooling"),
    ],
)
def test_a_base_without_patch_features_is_told(vision, said, images):
    model, head = made(vision)
    with pytest.raises(ValueError, match=f"GL-MCM needs.*{said}"):
        IMAGE_SCORES["GL-MCM"](model, head, images)
    assert IMAGE_SCORES["ODIN"](model, head, images).isfinite().all()


def plain_odin(model, head, image, scale, temperature=1000.0, noise=0.0014):
    image = image.clone().requires_grad_()
    logits = scale * model.encode_image(image[None]) @ head.weight_yes.T / temperature
    loss = F.cross_entropy(logits.double(), logits.argmax(dim=1))
    loss.backward()
    moved = image.detach().clone()
    for channel, std in enumerate(model.preprocess["std"]):
        moved[channel] -= noise * image.grad[channel].sign() / std
    logits = scale * model.encode_image(moved[None]) @ head.weight_yes.T / temperature
    return logits.softmax(dim=1).max().item()


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_odin_is_that_of_a_plain_loop(vit, images, scale):
    model, head = copy.deepcopy(vit)
    model.set_statistics(None, [0.2, 0.3, 0.5])
    before = images.clone()
    with torch.no_grad():
        got = IMAGE_SCORES["ODIN"](model, head, images, scale)
    expected = [plain_odin(model, head, image, scale) for image in images]
    # all scores are near 1 / C: what counts is by how much they are above it
    torch.testing.assert_close(got - 1 / 3, torch.tensor(expected) - 1 / 3, rtol=1e-3, atol=2e-7)
    assert torch.equal(images, before) and not got.requires_grad
    assert all(p.grad is None for p in model.parameters())
    plain = (scale * model.encode_image(images) @ head.weight_yes.T / 1000).softmax(dim=1).amax(dim=1)
    assert (got > plain).all(), "every image moves towards its class"


@pytest.mark.parametrize("name", IMAGE_SCORES)
def test_one_image_one_class_and_how_it_is_called(vit, images, name):
    model, head = copy.deepcopy(vit)
    score = IMAGE_SCORES[name]
    together = score(model, head, images)
    assert together.shape == (4,)
    torch.testing.assert_close(score(model, head, images[2:3]), together[2:3], rtol=1e-4, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(score(model, head, images), together)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(score(model, head, images).float(), together, rtol=0.02, atol=0.02)
    one = clipn.Head(head.weight_yes[:1], head.weight_no[:1])
    expected = {"GL-MCM": 2.0, "ODIN": 1.0}[name]
    torch.testing.assert_close(score(model, one, images), torch.full((4,), expected))
    assert not model.base.visual.transformer.resblocks[-1]._forward_pre_hooks, "no hook is left behind"
