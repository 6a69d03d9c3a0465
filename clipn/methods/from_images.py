"""OOD scores that need the image itself. A higher score means in-distribution.

Each takes a model, a head, normalised images [B, 3, H, W] on the model's device and the head's scale, and returns [B].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor

from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.model.packed_text import is_standard
from clipn.scores import mcm

LOCAL_WEIGHT = 1.0  # of GL-MCM's local part; the released code's default
ODIN_TEMPERATURE = 1000.0
ODIN_NOISE = 0.0014  # of pixels in 0 .. 1


@torch.no_grad()
def gl_mcm(model: CLIPN, head: Head, images: Tensor, scale: float = 100.0) -> Tensor:
    """Global MCM plus the largest softmax over patches and classes (GL-MCM, Miyai et al., IJCV 2025).

    Both are of cosines at temperature 1, whatever the scale. Raises ValueError for a base without patch features.
    """
    image, patches = local_features(model, images)
    with torch.autocast(images.device.type, enabled=False):  # half precision would round many scores to one
        local = (patches.float() @ head.weight_yes.T).softmax(dim=2).amax(dim=(1, 2))
    return mcm(_logits(head, image, scale), None, scale) + LOCAL_WEIGHT * local


def odin(model: CLIPN, head: Head, images: Tensor, scale: float = 100.0) -> Tensor:
    """Largest softmax at a high temperature of an image moved to make it larger (ODIN, Liang et al., ICLR 2018).

    Every pixel moves by ODIN_NOISE towards a larger softmax of the most likely class, and the logits, scale * cosine,
    are divided by ODIN_TEMPERATURE: both the paper's, and OpenOOD's defaults, not tuned to CLIP. Costs about
    three encodings, and the memory of a training step of the image tower.
    """
    std = torch.tensor(model.preprocess["std"], dtype=images.dtype, device=images.device).view(3, 1, 1)
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        tempered = _logits(head, model.encode_image(images), scale) / ODIN_TEMPERATURE
        # times the temperature: only the sign is used, and in half precision a gradient this small would be zero
        wanted = ODIN_TEMPERATURE * tempered.log_softmax(dim=1).max(dim=1).values.sum()
        (gradient,) = torch.autograd.grad(wanted, images)
    with torch.no_grad():
        moved = images + ODIN_NOISE * gradient.sign() / std
        return (_logits(head, model.encode_image(moved), scale) / ODIN_TEMPERATURE).softmax(dim=1).amax(dim=1)


def _logits(head: Head, features: Tensor, scale: float) -> Tensor:
    """[B, C] logits_yes, in float32 also within autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return head(features.float(), scale)[0]


IMAGE_SCORES: dict[str, Callable[..., Tensor]] = {"GL-MCM": gl_mcm, "ODIN": odin}


def local_features(model: CLIPN, images: Tensor, whole_block: bool = True) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] -> image features [B, D] and those of each of P patches [B, P, D], both L2-normalised, in one pass.

    A patch's feature is what the last attention says where each patch sees itself alone: its value projection, then
    the output projection. In a ViT the final norm and projection follow. The released code of GL-MCM keeps the rest of
    the ViT's last block too, the residual and the MLP, and so does this; `whole_block=False` leaves them out, as the
    words "value projection" have it. In CLIP's ResNet that attention is the pooling, without position embeddings.

    Raises ValueError for a base with neither.
    """
    tower = model.base.visual
    if isinstance(tower, VisionTransformer) and tower.attn_pool is None and is_standard(tower):
        last, project = tower.transformer.resblocks[-1], partial(_vit_patches, tower, whole_block)
    elif isinstance(tower, ModifiedResNet):
        last, project = tower.attnpool, partial(_resnet_patches, tower)
    else:
        raise ValueError(
            "GL-MCM needs a base with patches' features, open_clip's ordinary ViT or CLIP's ResNet; this base "
            f"has {type(tower).__name__}" + (" of other blocks or pooling" if hasattr(tower, "transformer") else "")
        )
    seen = []
    hook = last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        image = model.encode_image(images)
    finally:
        hook.remove()
    return image, F.normalize(project(seen[0]).float(), dim=-1)


def _vit_patches(tower: VisionTransformer, whole_block: bool, hidden: Tensor) -> Tensor:
    """What enters the last block, [B, 1 + P, width] -> [B, P, D]."""
    block = tower.transformer.resblocks[-1]
    attention, width = block.attn, block.attn.embed_dim
    hidden = hidden if tower.transformer.batch_first else hidden.transpose(0, 1)
    hidden = hidden[:, 1:]  # the first is the class token
    value = F.linear(block.ln_1(hidden), attention.in_proj_weight[-width:], attention.in_proj_bias[-width:])
    value = attention.out_proj(value)
    if whole_block:
        value = hidden + block.ls_1(value)
        value = value + block.ls_2(block.mlp(block.ln_2(value)))
    patches = tower.ln_post(value)
    return patches if tower.proj is None else patches @ tower.proj


def _resnet_patches(tower: ModifiedResNet, hidden: Tensor) -> Tensor:
    """What enters the pooling, [B, width, h, w] -> [B, h * w, D]."""
    return tower.attnpool.c_proj(tower.attnpool.v_proj(hidden.flatten(2).transpose(1, 2)))
