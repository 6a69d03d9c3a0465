"""Encoding texts without their padding gives the features and gradients of the whole tower."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import architecture
from hypothesis import given, settings
from hypothesis import strategies as st

from clipn.model.base import build_base, get_tokenizer
from clipn.model.packed_text import ignores_padding, is_packable, pack, text_features

START, END = 49406, 49407
LONG = "a long caption of a city at night with many many lights and cars in it all"
TEXTS = ["dog", "a red apple", "", LONG, "two cats"]

PACKED = [
    {},
    {"pool_type": "eos", "eos_id": END},
    {"pool_type": "eos", "eos_id": 7},  # which no text has
    {"context_length": 77},
    {"ls_init_value": 0.1, "proj_bias": True},
    {"proj_type": "none"},
    {"layers": 2},
]
TRUNCATED = [{"qk_norm": True, "scale_attn": True}]  # custom blocks
WHOLE = [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}]


def tower_of(text):
    torch.manual_seed(0)
    return build_base(architecture(text=text))[0].text


long_tower = functools.cache(lambda: tower_of({"context_length": 40}))


def features_and_gradients(tower, features):
    tower.zero_grad()
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", PACKED + TRUNCATED + WHOLE, ids=str)
def test_padding_changes_nothing(text):
    tower, tokens = tower_of(text), get_tokenizer(architecture(text=text))(TEXTS)
    assert is_packable(tower) == (text in PACKED)
    assert ignores_padding(tower) == (text not in WHOLE)
    whole = features_and_gradients(tower, F.normalize(tower(tokens), dim=-1))
    short = features_and_gradients(tower, text_features(tower, tokens))
    assert whole[1].keys() == short[1].keys()
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=5e-5)


def test_tokens_behind_the_end_token_are_not_read():
    tower, tokens = tower_of({}), get_tokenizer(architecture())(TEXTS)
    replaced = torch.where(tokens == 0, torch.randint(1, 400, tokens.shape), tokens)
    assert torch.equal(text_features(tower, tokens), text_features(tower, replaced))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12))
def test_captions_of_any_lengths(lengths):
    tokens = torch.zeros(len(lengths), 40, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.arange(5, 5 + length)
        row[0], row[length - 1] = START, END
    captions = pack(tokens, torch.tensor(lengths))
    assert len(captions.ids) == sum(lengths) == sum(len(group.places) for group in captions.groups)
    assert all(2 * len(group.places) >= group.captions * group.width for group in captions.groups if group.width > 8)
    assert captions.ids[captions.ends].tolist() == [END] * len(lengths)
    with torch.no_grad():
        packed, whole = text_features(long_tower(), tokens), F.normalize(long_tower()(tokens), dim=-1)
    torch.testing.assert_close(packed, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [{}, *WHOLE], ids=str)
def test_recomputed_activations_give_the_same_gradients(text):
    tower, tokens = tower_of(text | {"layers": 2}), get_tokenizer(architecture(text=text))(TEXTS)
    kept = features_and_gradients(tower, text_features(tower, tokens))
    tower.set_grad_checkpointing(True)
    torch.testing.assert_close(features_and_gradients(tower, text_features(tower, tokens)), kept, rtol=0, atol=0)
