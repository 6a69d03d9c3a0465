"""Encode texts without their padding, where that gives the same features as the tower itself.

A tower with a causal mask that is pooled at the end token cannot see the tokens behind it. The captions of a batch are
then packed end to end, and only attention, a few percent of the work, arranges them side by side. If such a tower has
non-standard blocks, the batch is truncated to its longest caption. Other towers read the whole batch.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Group(NamedTuple):
    """Captions of similar length, the longest of `width` tokens, one behind the other among the T tokens."""

    captions: int
    width: int
    places: Tensor  # each token's index in the flattened [captions, width]


class Captions(NamedTuple):
    """A batch of B captions packed end to end, shortest first: T tokens."""

    ids: Tensor  # [T]
    positions: Tensor  # [T], in the caption
    rows: Tensor  # [T], each token's caption
    ends: Tensor  # [B], the index among the T of each caption's end token
    groups: list[Group]


def text_features(
    tower: nn.Module, tokens: Tensor, prompts: Tensor | None = None, choice: Tensor | None = None
) -> Tensor:
    """Token ids [B, L], on any device -> features [B, D], float32, L2-normalised, on the device of the text tower.

    prompts: [K, context, width]; prompts[choice[b]] is added to caption b's token and position embeddings at every
    position. choice: [B] integers in 0..K-1; None is prompt 0 for all.
    """
    if is_packable(tower):
        output = _encode_packed(tower, tokens, prompts, choice)
    else:
        with _added_prompts(tower, prompts, choice):
            output = _encode_truncated(tower, tokens.to(next(tower.parameters()).device))
    pooled = output[0] if isinstance(output, tuple) else output  # CoCa's tower also returns its tokens
    return F.normalize(pooled.float(), dim=-1)


def token_embedding(tower: nn.Module) -> nn.Embedding:
    """The module that embeds token ids."""
    if isinstance(tower, HFTextEncoder):
        return tower.transformer.get_input_embeddings()
    return tower.token_embedding


def ignores_padding(tower: nn.Module) -> bool:
    """Whether the tokens behind the end token have no effect: causal mask, and pooling at the end token."""
    causal = isinstance(tower, TextTransformer) and tower.attn_mask is not None
    return causal and tower.cls_emb is None and tower.pool_type in ("argmax", "eos")


def is_packable(tower: nn.Module) -> bool:
    """Whether captions can be packed end to end: padding has no effect, and every block is a standard one."""
    return ignores_padding(tower) and is_standard(tower)


def is_standard(tower: TextTransformer) -> bool:
    """Whether every block is open_clip's default one, without attention dropout."""
    return all(
        type(block) is ResidualAttentionBlock and type(block.attn) is nn.MultiheadAttention and not block.attn.dropout
        for block in tower.transformer.resblocks
    )


def compile_text(tower: nn.Module) -> None:
    """Apply torch.compile to a text tower; if it is packable, only to the MLPs, whose input has a dynamic length."""
    if is_packable(tower):
        for block in tower.transformer.resblocks:
            block.mlp.compile(dynamic=True)
    else:
        tower.compile()


def caption_lengths(tower: TextTransformer, tokens: Tensor) -> Tensor:
    """Token ids [B, L] -> [B], the number of tokens up to the one that the tower is pooled at."""
    ends = tokens if tower.pool_type == "argmax" else (tokens == tower.eos_id).int()
    return ends.argmax(dim=1) + 1


def pack(tokens: Tensor, lengths: Tensor) -> Captions:
    """Pack captions end to end. tokens: [B, L] and lengths: [B], both on the CPU."""
    order = lengths.argsort(stable=True)
    lengths = lengths[order]
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    rows, positions = real.nonzero(as_tuple=True)
    ends = torch.empty_like(lengths)
    ends[order] = lengths.cumsum(0) - 1
    return Captions(tokens[order][real], positions, order[rows], ends, _group(lengths, rows, positions))


def _group(lengths: Tensor, rows: Tensor, positions: Tensor) -> list[Group]:
    """Groups of lengths 1-8, 9-16, 17-32, ...: from 9 on, at most half of a group side by side is padding."""
    exponents = (lengths - 1).clamp(min=4).log2().floor()
    groups, caption, start = [], 0, 0
    for count in torch.unique_consecutive(exponents, return_counts=True)[1].tolist():
        width = int(lengths[caption + count - 1])
        stop = start + int(lengths[caption : caption + count].sum())
        groups.append(Group(count, width, (rows[start:stop] - caption) * width + positions[start:stop]))
        caption, start = caption + count, stop
    return groups


def _encode_truncated(tower: nn.Module, tokens: Tensor) -> Tensor | tuple[Tensor, ...]:
    if not ignores_padding(tower):
        return tower(tokens)
    length = int(caption_lengths(tower, tokens).max())
    mask = tower.attn_mask[:length, :length]
    return torch.func.functional_call(tower, {"attn_mask": mask}, (tokens[:, :length],))


def _encode_packed(tower: TextTransformer, tokens: Tensor, prompts: Tensor | None, choice: Tensor | None) -> Tensor:
    device = tower.positional_embedding.device
    tokens = tokens.cpu()
    captions = _to(pack(tokens, caption_lengths(tower, tokens)), device)
    hidden = tower.token_embedding(captions.ids) + F.embedding(captions.positions, tower.positional_embedding)
    if prompts is not None:
        index = captions.positions
        if choice is not None:
            index = index + choice.to(device)[captions.rows] * prompts.shape[1]
        hidden = hidden + F.embedding(index, prompts.flatten(0, 1))
    hidden = hidden.to(tower.transformer.get_cast_dtype())
    for block in tower.transformer.resblocks:
        if tower.transformer.grad_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(_block, block, hidden, captions.groups, use_reentrant=False)
        else:
            hidden = _block(block, hidden, captions.groups)
    pooled = tower.ln_final(hidden[captions.ends])
    projection = tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _block(block: ResidualAttentionBlock, hidden: Tensor, groups: list[Group]) -> Tensor:
    """[T, width] -> [T, width]: one residual attention block."""
    attention = block.attn
    projected = F.linear(block.ln_1(hidden), attention.in_proj_weight, attention.in_proj_bias)
    parts = projected.split([len(group.places) for group in groups])
    attended = torch.cat([_attend(part, attention.num_heads, g) for part, g in zip(parts, groups, strict=True)])
    hidden = hidden + block.ls_1(attention.out_proj(attended))
    return hidden + block.ls_2(block.mlp(block.ln_2(hidden)))


def _attend(projected: Tensor, heads: int, group: Group) -> Tensor:
    """[tokens of a group, 3 width] queries, keys and values -> [tokens, width]: attention within each caption."""
    size = group.captions * group.width
    side_by_side = projected.new_zeros(size, projected.shape[1]).index_copy(0, group.places, projected)
    query, key, value = side_by_side.view(group.captions, group.width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended.transpose(1, 2).reshape(size, -1)[group.places]


def _to(captions: Captions, device: torch.device) -> Captions:
    groups = [group._replace(places=group.places.to(device, non_blocking=True)) for group in captions.groups]
    return Captions(*(part.to(device, non_blocking=True) for part in captions[:4]), groups)


def _added_prompts(tower: nn.Module, prompts: Tensor | None, choice: Tensor | None) -> AbstractContextManager:
    """Add prompts to the output of the token embedding, as every tower then adds the position embeddings."""
    if prompts is None:
        return nullcontext()
    chosen = prompts[:1] if choice is None else F.embedding(choice, prompts.flatten(1)).unflatten(1, prompts.shape[1:])
    return token_embedding(tower).register_forward_hook(
        lambda module, arguments, embedded: embedded + chosen[:, : embedded.shape[1]].to(embedded.dtype)
    )
