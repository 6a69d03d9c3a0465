"""The model: freezing, prompts, every kind of tower, and loading."""

import copy
import json
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import architecture

import clipn
from clipn.model.base import build_base, context_length
from clipn.model.checkpoint import write_checkpoint

TEXTS = ["a photo of a red apple", "dog", "a long caption of a city at night with many many lights and cars in it all"]

FAMILIES = {
    "vit": architecture(),
    "vit of another width, context and activation": architecture(
        {"width": 96, "pool_type": "avg"}, {"context_length": 24, "width": 48, "heads": 3}, quick_gelu=True
    ),
    "modified resnet": architecture({"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}),
    "end token by id": architecture(text={"pool_type": "eos", "eos_id": 49407}),
    "last token, no causal mask": architecture(text={"no_causal_mask": True, "pool_type": "last", "proj_bias": True}),
    "no text projection": architecture(text={"proj_type": "none"}),
    "custom blocks": architecture(text={"qk_norm": True, "scale_attn": True, "ls_init_value": 0.1}),
    "siglip's logit bias": architecture(init_logit_bias=-10.0, custom_text=True),
    "nonscalar logit scale": architecture(nonscalar_logit_scale=True),
    "coca": architecture(
        {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        {"embed_cls": True, "output_tokens": True},
        multimodal_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        custom_text=True,
    ),
}


def create(*arguments, **options):
    return clipn.create_model_and_transforms(*arguments, **options)[0]


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def untouched(request):
    torch.manual_seed(0)
    return create(request.param, num_prompts=3)


@pytest.fixture
def family(untouched):
    return copy.deepcopy(untouched)


def tokens_of(model):
    return clipn.get_tokenizer(model.architecture)(TEXTS)


def test_features_are_unit_length_float32_and_open_clips(family):
    tokens = tokens_of(family)
    assert tokens.shape == (3, context_length(family.architecture))
    image, yes, no = family.encode_image(torch.randn(3, 3, 32, 32)), family.encode_text(tokens), family.no_text(tokens)
    for features in (image, yes, no, family.encode_no_text(tokens, torch.tensor([0, 2, 3]))):
        assert features.dtype == torch.float32 and features.shape == (3, 32)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    expected = family.base.encode_text(tokens, normalize=True)
    torch.testing.assert_close(yes, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(no, expected, rtol=1e-4, atol=1e-5)  # a copy, prompts zero


def test_only_the_no_tower_learns_and_all_of_it(family):
    before = copy.deepcopy(family.state_dict())
    family.train()
    assert family.no_text.training and not family.base.training
    tokens = tokens_of(family)
    image = family.encode_image(torch.randn(3, 3, 32, 32))
    yes, no = family.encode_text(tokens), family.encode_no_text(tokens, torch.tensor([0, 1, 3]))
    terms = clipn.losses.itbo_loss(image, yes, no, family.logit_scale.exp())
    (sum(terms) + clipn.losses.tso_loss(yes, no)).sum().backward()
    assert {name.split(".")[0] for name, p in family.named_parameters() if p.requires_grad} == {"no_text"}
    assert all(p.grad is None for p in family.base.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in family.no_text.parameters())
    torch.optim.AdamW(family.no_text.parameters(), lr=1e-2).step()
    after = family.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("base."))
    assert not torch.equal(before["no_text.prompts"], after["no_text.prompts"])


def test_checkpoint_round_trip(family, tmp_path):
    with torch.no_grad():
        for parameter in family.no_text.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    write_checkpoint({"epoch": 1, "name": "x", "state_dict": family.published_state()}, tmp_path / "epoch_1.pt")
    loaded = create(family.architecture, tmp_path / "epoch_1.pt")
    assert loaded.num_prompts == 3
    for name, value in family.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_each_caption_gets_its_chosen_prompt():
    model = create(architecture(), num_prompts=2)
    torch.nn.init.normal_(model.no_text.prompts)
    tokens = tokens_of(model)[[0, 0, 0]]
    chosen = model.encode_no_text(tokens, torch.tensor([0, 1, 2]))
    tower, position = model.no_text.tower, model.no_text.tower.positional_embedding
    for row, prompt in zip(chosen, [*model.no_text.prompts, model.no_text.prompts.mean(0)], strict=True):
        shifted = {"positional_embedding": position + prompt}
        expected = F.normalize(torch.func.functional_call(tower, shifted, (tokens[:1],)), dim=-1)[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_no_text(tokens[:1])[0], chosen[2])


def test_no_prompts_is_the_hand_crafted_variant():
    model, tokenizer = create(architecture(), num_prompts=0), clipn.get_tokenizer(architecture())
    assert model.num_prompts == 0 and "prompt_no" not in model.published_state()
    head = clipn.build_head(model, tokenizer, ["cat", "dog"], ["a photo of a {}.", "art of the {}"])
    texts = ["a photo of no cat.", "art of no cat", "a photo of no dog.", "art of no dog"]
    expected = model.encode_no_text(tokenizer(texts)).unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(head.weight_no, F.normalize(expected, dim=-1))


def test_a_plain_clip_gives_both_towers(tmp_path):
    base, _ = build_base(architecture())
    write_checkpoint({"state_dict": {f"module.{k}": v for k, v in base.state_dict().items()}}, tmp_path / "clip.pt")
    model = create(architecture(), tmp_path / "clip.pt", num_prompts=4)
    assert model.num_prompts == 4 and not model.no_text.prompts.any()
    for name, value in base.text.state_dict().items():
        assert torch.equal(model.no_text.tower.state_dict()[name], value)
        assert torch.equal(model.base.text.state_dict()[name], value)


def test_statistics_come_from_the_checkpoint_or_the_caller(tmp_path, small_config):
    model, path = create(small_config), tmp_path / "epoch_1.pt"
    preprocess = {**model.preprocess, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)}
    write_checkpoint({"state_dict": model.published_state(), "preprocess": preprocess}, path)
    loaded, *transforms = clipn.create_model_and_transforms(small_config, path)
    assert loaded.preprocess["std"] == (0.25, 0.5, 1.0)
    assert [tuple(transform.transforms[-1].std) for transform in transforms] == [(0.25, 0.5, 1.0)] * 2
    override = create(small_config, path, image_mean=[0, 0, 0])
    assert override.preprocess["mean"] == (0, 0, 0) and override.preprocess["std"] == (0.25, 0.5, 1.0)


def test_a_json_config_does_not_change_open_clips_names(tmp_path):
    (tmp_path / "ViT-B-16.json").write_text(json.dumps(architecture()))
    create(str(tmp_path / "ViT-B-16.json"))
    assert open_clip.get_model_config("ViT-B-16")["embed_dim"] == 512


@pytest.mark.parametrize(
    ("name", "pretrained", "error", "message"),
    [
        ("ViT-Z", None, ValueError, "'ViT-Z'.*ViT-B-16"),
        ("ViT-B-16", "no_such_tag", ValueError, "no such file, and no open_clip tag.*laion2b_s34b_b88k"),
        (architecture(), "missing.pt", ValueError, "no such file"),
        ("missing.json", None, FileNotFoundError, r"missing\.json"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_choices(name, pretrained, error, message):
    with pytest.raises(error, match=message):
        create(name, pretrained)
    if not pretrained:
        with pytest.raises(error, match=message):
            clipn.get_tokenizer(name)


@pytest.mark.parametrize("text, message", [('{"embed_dim": 3}', "vision_cfg, text_cfg is"), ("{", "not valid JSON")])
def test_a_file_that_is_not_a_model_config_is_an_error(tmp_path, text, message):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=rf"other\.json: .*{message}"):
        clipn.get_tokenizer(str(tmp_path / "other.json"))


def test_the_weights_decide_the_activation(tmp_path, small_config):
    base, made = build_base(architecture(quick_gelu=True))
    write_checkpoint({"state_dict": base.state_dict(), "architecture": made}, tmp_path / "clip.pt")
    images = torch.randn(1, 3, 32, 32)
    loaded, loaded_architecture = build_base(small_config, tmp_path / "clip.pt")
    assert loaded_architecture["quick_gelu"]
    expected = base.eval().encode_image(images, normalize=True)
    torch.testing.assert_close(loaded.eval().encode_image(images, normalize=True), expected)
    torch.testing.assert_close(create(small_config, tmp_path / "clip.pt").encode_image(images), expected)


def test_the_detector_loads_no_code_of_training_or_evaluation():
    code = "import sys, clipn; clipn.Detector; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"pandas", "omegaconf", "sklearn", "matplotlib", "tensorboard", "gradio", "jinja2"}
    assert "clipn.deploy.detector" in loaded and not heavy & set(loaded)
    assert not [name for name in loaded if name.startswith(("clipn.train", "clipn.report", "clipn.deploy.model_card"))]


def test_hugging_face_text_towers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=40)
    config.save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    made = architecture() | {"text_cfg": {**text, "context_length": 12}}
    model, tokens = create(made, num_prompts=2), torch.randint(1, 100, (3, 12))
    assert model.no_text.prompts.shape == (2, 12, 32)
    torch.testing.assert_close(model.encode_no_text(tokens), model.encode_text(tokens))
    torch.nn.init.normal_(model.no_text.prompts)
    assert not torch.allclose(model.encode_no_text(tokens), model.encode_text(tokens))
    write_checkpoint({"state_dict": model.published_state()}, tmp_path / "epoch_1.pt")
    loaded = create(made, tmp_path / "epoch_1.pt")
    torch.testing.assert_close(loaded.encode_no_text(tokens), model.encode_no_text(tokens))
