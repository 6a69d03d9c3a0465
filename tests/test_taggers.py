"""Taggers against slow versions, RAM through a stand-in of its package, the choice of tokens, and bad input."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import architecture

import clipn
from clipn.config.evaluation import TagoodConfig
from clipn.data.images import val_transform
from clipn.methods.from_images import local_features
from clipn.methods.taggers import Tags, check_tagger, kept_places, make_tagger, select_tokens, tag

NAMES = ["cat", "dog", "a red car"]
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None, "image_size": 64}


def make(vision):
    torch.manual_seed(0)
    config = architecture(vision)
    model = clipn.create_model_and_transforms(config, num_prompts=2)[0]
    weights = F.normalize(torch.randn(2, len(NAMES), 32), dim=-1)  # an untrained text tower tells no class from another
    return model, clipn.Head(*weights)


@pytest.fixture(scope="module")
def vit():
    return make({"layers": 2, "patch_size": 8})


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tagger_of(model, head, scale=5.0, **settings):
    return make_tagger(TagoodConfig(**settings), model, head, NAMES, scale)


# The CLIP tagger


def slow_tags(model, head, image, scale, threshold=0.5, veto=False):
    """Image by image and tag by tag: attention of each place, confidence, whether there is a tag."""
    feature, patches = (part[0] for part in local_features(model, image[None]))
    probability = (scale * head.weight_yes @ feature).softmax(dim=0)
    p_yes = [torch.sigmoid(scale * (yes - no) @ feature).item() for yes, no in zip(*head.buffers(), strict=True)]
    confidence = [p.item() * (y if veto else 1) for p, y in zip(probability, p_yes, strict=True)]
    tags = [c for c, p in enumerate(probability) if p >= threshold * max(probability)]
    tags = [c for c in tags if p_yes[c] > 0.5] if veto else tags
    tagged = bool(tags)
    tags = tags or [int(np.argmax(confidence))]
    attention = [1.0] + [0.0] * len(patches)
    for c in tags:
        cosines = [(head.weight_yes[c] @ patch).item() for patch in patches]
        for place, cosine in enumerate(cosines, start=1):
            scaled = (cosine - min(cosines)) / (max(cosines) - min(cosines))
            attention[place] = max(attention[place], scaled)
    return attention, max(confidence[c] for c in tags), tagged


@pytest.mark.parametrize(
    ("vision", "size"), [({"layers": 2, "patch_size": 8}, 32), (RESNET, 64)], ids=["ViT", "ResNet"]
)
@pytest.mark.parametrize("tags", ["classes", "clipn"])
def test_the_clip_tagger_against_a_loop(images, vision, size, tags):
    model, head = make(vision)
    images = F.interpolate(images, size)
    tagger = tagger_of(model, head, tags=tags)
    made = tag(tagger, images)
    expected = [slow_tags(model, head, image, 5.0, veto=tags == "clipn") for image in images]
    torch.testing.assert_close(made.attention, torch.tensor([e[0] for e in expected]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.confidence, torch.tensor([e[1] for e in expected]))
    assert made.tagged.tolist() == [e[2] for e in expected]
    features, patches = local_features(model, images)
    torch.testing.assert_close(made.tokens, torch.cat([features[:, None], patches], dim=1))
    assert tagger.dim == 32 and not made.tokens.requires_grad


def test_several_tags_and_the_veto_of_the_no_tower(vit, images):
    model, head = vit
    every, one = (tag(tagger_of(model, head, tag_threshold=threshold), images) for threshold in (0.0, 0.999))
    assert (every.attention >= one.attention).all() and (every.attention > one.attention).any()
    torch.testing.assert_close(every.confidence, one.confidence)
    says_no = clipn.Head(head.weight_yes, head.weight_yes + 0.01 * model.encode_image(images).mean(dim=0))
    vetoed = tag(tagger_of(model, says_no, tags="clipn"), images)
    alike = tag(tagger_of(model, says_no), images)
    assert not vetoed.tagged.any() and alike.tagged.all()
    assert (vetoed.attention[:, 1:].amax(dim=1) == 1).all(), "the best tag of an image without one"
    assert (vetoed.confidence < alike.confidence).all()


def test_constant_attention_counts_as_all_ones(images):
    model, head = make({"layers": 1, "patch_size": 32})
    assert tag(tagger_of(model, head), images).attention.tolist() == [[1.0, 1.0]] * 5
    model, head = make({"layers": 1, "patch_size": 8})
    with torch.no_grad():
        model.base.visual.positional_embedding.zero_()
    grey = torch.zeros(1, 3, 32, 32)
    assert tag(tagger_of(model, head), grey).attention.tolist() == [[1.0] * 17]


@pytest.mark.parametrize("vision", [{"layers": 2, "patch_size": 8}, RESNET])
def test_gradient_attention_against_finite_differences(vision):
    """The best class's cosine, when the pixels of one patch move along their gradient."""
    model, head = make(vision)
    size = vision.get("image_size", 32)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    model, weights = model.double(), head.weight_yes.double()
    side = {32: 4, 64: 2}[size]
    patch = size // side
    slow = torch.zeros(side, side, dtype=torch.float64)

    def best(pixels):
        return (F.normalize(model.base.encode_image(pixels), dim=-1) @ weights.T).amax(dim=1)

    with torch.enable_grad():
        pixels = image.double().requires_grad_()
        (gradient,) = torch.autograd.grad(best(pixels).sum(), pixels)
    for row in range(side):
        for column in range(side):
            here = (..., slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch))
            length = gradient[here].norm()
            step = torch.zeros_like(gradient)
            step[here] = 1e-5 * gradient[here] / length
            difference = best(image.double() + step) - best(image.double() - step)
            slow[row, column] = difference.item() / 2e-5
    slow = (slow - slow.min()) / (slow.max() - slow.min())
    tagger = tagger_of(model.float(), head, attention="gradient")
    with torch.inference_mode():
        tags = tag(tagger, image)
    np.testing.assert_allclose(tags.attention[0, 1:].numpy(), slow.flatten().numpy(), atol=1e-3)
    assert float(tags.attention[0, 0]) == 1 and all(p.grad is None for p in model.parameters())


def test_gradient_attention_of_an_image_does_not_depend_on_the_others(vit, images, monkeypatch):
    monkeypatch.setattr("clipn.methods.taggers._GRADIENT_IMAGES", 2)
    tagger = tagger_of(*vit, attention="gradient")
    together = tag(tagger, images)
    for number, image in enumerate(images):
        torch.testing.assert_close(
            tag(tagger, image[None]).attention[0], together.attention[number], rtol=1e-3, atol=1e-3
        )
    cosine = tag(tagger_of(*vit), images)
    assert torch.equal(cosine.tokens, together.tokens) and torch.equal(cosine.confidence, together.confidence)


def test_the_identity_holds_all_that_tags_depend_on(vit):
    model, head = vit
    changed = clipn.Head(head.weight_yes, -head.weight_no)
    names = [
        tagger_of(model, head).identity,
        tagger_of(model, head, scale=6.0).identity,
        tagger_of(model, head, tag_threshold=0.4).identity,
        tagger_of(model, head, tags="clipn").identity,
        tagger_of(model, head, attention="gradient").identity,
        tagger_of(model, changed, tags="clipn").identity,
        tagger_of(model, clipn.Head(head.weight_yes, head.weight_no, 0.1), tags="clipn").identity,
        tagger_of(model, clipn.Head(-head.weight_yes, head.weight_no)).identity,
        tagger_of(*make({"layers": 3, "patch_size": 8})).identity,
    ]
    assert len(set(names)) == len(names)
    assert tagger_of(model, changed).identity == names[0], "without the veto, the no tower plays no part"
    assert tagger_of(model, head, attention_threshold=0.1, seed=4).identity == names[0]


def test_a_base_without_patch_features_is_an_error(images):
    model, head = make({"attentional_pool": True, "attn_pooler_heads": 2})
    with pytest.raises(ValueError, match="tagood.tagger=clip need a base with patch features.*this base has"):
        tagger_of(model, head)(images)


# RAM, with a package of the same interface

STAND_IN = '''
"""A stand-in of recognize-anything: the parts of its interface that a tagger uses."""
import types
import numpy as np
import torch
from torch import nn

class Encoder(nn.Module):
    def forward(self, image):  # [B, 3, 384, 384] -> the mean and 144 places
        places = torch.nn.functional.avg_pool2d(image, 32).flatten(2).transpose(1, 2)
        return torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(output_attentions=False)
    def forward(self, encoder_embeds, encoder_hidden_states, encoder_attention_mask, return_dict, mode):
        assert mode == "tagging" and return_dict is False
        layers, hidden = [], encoder_embeds
        for sharpness in (0.1, 1.0):
            similar = sharpness * hidden[..., :64] @ encoder_hidden_states[..., :64].transpose(1, 2)
            layers.append(torch.stack([similar.softmax(-1), (2 * similar).softmax(-1)], dim=1))
            hidden = nn.functional.layer_norm(hidden, (512,)) + 9 * layers[-1].mean(dim=1) @ encoder_hidden_states
        return (hidden, None, tuple(layers), ()) if self.config.output_attentions else (hidden, None, ())

class Model(nn.Module):
    def __init__(self, plus):
        super().__init__()
        torch.manual_seed(int(plus))
        self.tag_list = np.array(["bus", "cat", "red car", "dog"])
        self.visual_encoder, self.tagging_head = Encoder(), Head()
        self.image_proj, self.fc = nn.Linear(3, 512), nn.Linear(512, 1)
        self.label_embed = nn.Parameter(torch.randn(4, 512))
        nn.init.normal_(self.fc.weight, std=0.1), nn.init.zeros_(self.fc.bias)
        self.batches = []
    def generate_tag(self, image):
        self.batches.append(len(image))
        embeds = self.image_proj(self.visual_encoder(image))
        labels = torch.relu(self.label_embed)[None].repeat(len(image), 1, 1)
        tagging = self.tagging_head(encoder_embeds=labels, encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:2]), return_dict=False, mode="tagging")
        logits = self.fc(tagging[0]).squeeze(-1)
        return [" | ".join(self.tag_list[row.numpy() > 0]) for row in logits], None

def ram(pretrained="", **options):
    assert options == {"image_size": 384, "vit": "swin_l"} and pretrained.endswith(".pth")
    return Model(plus=False)

def ram_plus(pretrained="", **options):
    assert options == {"image_size": 384, "vit": "swin_l"} and pretrained.endswith(".pth")
    return Model(plus=True)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The settings of a RAM that is installed, in a module of this test alone."""
    (tmp_path / "ram/models").mkdir(parents=True)
    (tmp_path / "ram/__init__.py").touch()
    (tmp_path / "ram/models/__init__.py").write_text(STAND_IN)
    (tmp_path / "ram.pth").touch()
    (tmp_path / "tags.txt").write_text("cat\ndog\nred car\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield {"weights": f"{tmp_path}/ram.pth", "tags": f"{tmp_path}/tags.txt"}
    for name in ("ram", "ram.models"):
        sys.modules.pop(name, None)


def slow_ram(model, image, threshold):
    """RAM's pass for one image, and tag by tag what it attends to in its last layer."""
    embeds = model.image_proj(model.visual_encoder(image[None]))
    labels = torch.relu(model.label_embed)[None]
    hidden, _, layers, _ = model.tagging_head(labels, embeds, None, False, "tagging")
    confidence = {name: p for name, p in zip(model.tag_list, model.fc(hidden)[0, :, 0].sigmoid().tolist(), strict=True)}
    confidence = [confidence[name] for name in ("cat", "dog", "red car")]
    tags = [c for c in range(3) if confidence[c] > threshold]
    tagged, tags = bool(tags), tags or [int(np.argmax(confidence))]
    attention = torch.zeros(145)
    for c in tags:
        heads = layers[-1][0, :, [1, 3, 2][c]].sum(dim=0)
        attention = torch.maximum(attention, (heads - heads.min()) / (heads.max() - heads.min()))
    return embeds[0], attention, max(confidence[c] for c in tags), tagged


@pytest.mark.parametrize("name", ["ram", "ram++"])
def test_ram_gives_its_tokens_and_the_attention_of_its_last_layer(vit, package, name):
    shades = torch.linspace(1, 9, 18).view(-1, 1, 1, 1)
    images = shades * torch.randn(18, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    middle = tagger_of(*vit, tagger=name, **package)(images).confidence.median().item()
    tagger = tagger_of(*vit, tagger=name, tag_threshold=middle, **package)
    made = tag(tagger, images)
    assert tagger.model.batches == [16, 2] and made.tokens.shape == (18, 145, 512)
    with torch.no_grad():
        expected = [slow_ram(tagger.model, image, middle) for image in images]
    for place, part in enumerate(made):
        of_each = [e[place] for e in expected]
        of_each = torch.stack(of_each) if place < 2 else torch.tensor(of_each)
        torch.testing.assert_close(part, of_each, rtol=1e-3, atol=1e-4)
    assert not tagger.model.tagging_head._forward_hooks and not tagger.model.training
    assert 7 < made.tagged.sum() < 11
    assert tagger.identity != tagger_of(*vit, tagger=name, **package).identity


def test_ram_has_its_own_preprocessing(vit, package):
    from PIL import Image

    transform = val_transform(tagger_of(*vit, tagger="ram", **package).preprocess)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(wide.resize((384, 384), Image.BILINEAR))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.testing.assert_close(transform(wide), (pixels - mean) / std)


def test_tags_are_read_as_class_names_are_and_in_any_case(vit, package, tmp_path):
    (tmp_path / "other.txt").write_text("Cat\n\nDOG \nred car\n\n", encoding="utf-8-sig")
    tagger = tagger_of(*vit, tagger="ram", **package | {"tags": f"{tmp_path}/other.txt"})
    assert torch.equal(tagger.tags, tagger_of(*vit, tagger="ram", **package).tags)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tags": "classes"}, r"tags=classes: 1 of 3 are no tag of ram: a red car \(near: red car.*a \.txt file"),
        ({"tags": "short.txt"}, "short.txt': 2 lines; expected one for each of 3 classes"),
        ({"tags": "none.txt"}, "none.txt': no such file"),
        ({"weights": None}, "tagood.weights=None is no such file; fetch ram_swin_large_14m.pth from huggingface"),
        ({"weights": "x.pth", "tagger": "ram++"}, "weights='x.pth' is no such file; fetch ram_plus_swin_large_14m.pth"),
    ],
)
def test_what_ram_lacks_is_reported(vit, package, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("cat\ndog")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tagger_of(*vit, **{"tagger": "ram", **package, **settings})


@pytest.mark.parametrize("name", ["ram", "ram++"])
def test_a_missing_package_is_reported_with_what_to_install_and_fetch(vit, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "ram", None)
    message = r"tagood.tagger=ram(\+\+)?: the package recognize-anything is missing.*pip install git\+.*fetch ram_.*pth"
    for check in (check_tagger, lambda settings: make_tagger(settings, *vit, NAMES, 5.0)):
        with pytest.raises(ValueError, match=message) as error:
            check(TagoodConfig(tagger=name, weights="ram.pth"))
        assert len(str(error.value).splitlines()) == 1


# One's own


class Own:
    """A tagger whose one tag is the left half of an image of 2 places."""

    identity, dim = "left half", 3
    preprocess = {"size": 8}

    def __init__(self, **changes):
        self.changes = changes

    def __call__(self, pixels):
        halves = torch.stack([half.mean(dim=(2, 3)) for half in pixels.chunk(2, dim=3)], dim=1)
        attention = torch.tensor([1.0, 0.0]).expand(len(pixels), 2)
        made = Tags(halves, attention, torch.full((len(pixels),), 0.9), torch.ones(len(pixels), dtype=torch.bool))
        return made._replace(**self.changes)


def make_own(settings, model, head, class_names, scale):
    assert settings.seed == 7 and class_names == NAMES and scale == 5.0
    return Own()


def make_without_arguments():
    return None


def make_without_identity(settings, model, head, class_names, scale):
    tagger = Own()
    tagger.identity = None
    return tagger


def make_nothing(settings, model, head, class_names, scale):
    return "a text"


def test_a_tagger_of_ones_own(vit, images):
    tagger = tagger_of(*vit, tagger=f"{__name__}:make_own", seed=7)
    assert tag(tagger, images).tokens.shape == (5, 2, 3)
    check_tagger(TagoodConfig(tagger=f"{__name__}:make_own"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "tagood.tagger=no_such_module:f: No module named.*on PYTHONPATH"),
        (f"{__name__}:absent", "absent.*on PYTHONPATH"),
        (f"{__name__}:make_nothing", "the str it makes has no identity"),
        (f"{__name__}:make_without_arguments", "too many positional arguments; expected a function"),
        (f"{__name__}:make_without_identity", "has no identity, or one of another type"),
        ("..:f", "expected a function"),
    ],
)
def test_what_is_no_tagger_is_reported(vit, name, message):
    with pytest.raises(ValueError, match=message):
        tagger_of(*vit, tagger=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.ones(5, 3, 3)}, r"left half: expected tokens \[5, P, 3\].*got tokens \[5, 3, 3\]"),
        ({"tagged": torch.ones(5)}, "a bool; got"),
        ({"confidence": torch.ones(5, 1)}, r"confidence \[5, 1\]"),
        ({"attention": torch.full((5, 2), 1.5)}, r"attention or confidence outside 0\.\.1"),
        ({"attention": torch.full((5, 2), float("nan"))}, r"attention or confidence outside 0\.\.1"),
        ({"attention": torch.ones(5)}, r"attention \[5\]"),
        ({"confidence": torch.full((5,), float("nan"))}, r"confidence outside 0\.\.1"),
        ({"tokens": torch.full((5, 2, 3), float("inf"))}, "tokens not finite"),
    ],
)
def test_tags_of_another_form_are_reported(images, changes, message):
    with pytest.raises(ValueError, match=message):
        tag(Own(**changes), images)


# The choice of tokens


def slow_selection(tokens, attention, threshold, limit):
    ranked = sorted(range(len(tokens)), key=lambda place: (-attention[place], place))[:limit]
    kept = [place for place in sorted(ranked) if attention[place] > threshold] or ranked[:1]
    return tokens[kept]


@pytest.mark.parametrize(("threshold", "limit"), [(0.5, 4), (0.0, 20), (0.9, 3), (1.0, 3), (0.5, 1)])
def test_selection_against_a_loop(threshold, limit):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 9, 4, generator=generator)
    attention = torch.randint(0, 5, (6, 9), generator=generator) / 4  # with equal ones
    kept, mask = select_tokens(tokens, attention, threshold, limit)
    assert kept.shape == (6, min(limit, 9), 4)
    for row in range(6):
        assert torch.equal(kept[row][mask[row]], slow_selection(tokens[row], attention[row], threshold, limit))
        places = kept_places(attention, threshold, limit)[row]
        assert torch.equal(tokens[row][places], kept[row][mask[row]])
