"""OOD scores that need the image itself. A higher score means in-distribution.

Each takes a model, a head, normalised images [B, 3, H, W] on the model's device and the scale of the logits, and
returns [B].
"""

import threading

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.model.packed_text import is_standard
from clipn.scores import mcm

LOCAL_WEIGHT = 1.0  # of GL-MCM's local part; the released code's default
ODIN_TEMPERATURE = 1000.0
ODIN_NOISE = 0.0014  # of pixels in 0 .. 1


def constants() -> str:
    """The constants that the scores depend on, for the key of kept scores."""
    return f"LOCAL_WEIGHT={LOCAL_WEIGHT} ODIN_TEMPERATURE={ODIN_TEMPERATURE} ODIN_NOISE={ODIN_NOISE}"


@torch.no_grad()
def gl_mcm(model: CLIPN, head: Head, images: Tensor, scale: float = 100.0) -> Tensor:
    """Global MCM plus the largest softmax over patches and classes (GL-MCM, Miyai et al., IJCV 2025).

    Both are of cosines at temperature 1, for any scale. Raises ValueError for a base without patch features.
    """
    features, patches = local_features(model, images)
    with torch.autocast(images.device.type, enabled=False):  # half precision would round many scores to one value
        local = (patches.float() @ head.weight_yes.T).softmax(dim=2).amax(dim=(1, 2))
    return mcm(_logits(head, features, scale), None, scale) + LOCAL_WEIGHT * local


def odin(model: CLIPN, head: Head, images: Tensor, scale: float = 100.0) -> Tensor:
    """Largest softmax, at a high temperature, of the perturbed image (ODIN, Liang et al., ICLR 2018).

    Every pixel moves by ODIN_NOISE towards a larger softmax of the most likely class. The logits, scale * cosine, are
    divided by ODIN_TEMPERATURE. Both constants are those of the paper and of OpenOOD, not tuned to CLIP. The cost is
    about three encodings, and the memory of a training step of the image tower.
    """
    std = torch.tensor(model.preprocess["std"], dtype=images.dtype, device=images.device).view(3, 1, 1)
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        tempered = _logits(head, model.encode_image(images), scale) / ODIN_TEMPERATURE
        # times the temperature: only the sign counts, and in half precision a gradient this small would be zero
        objective = ODIN_TEMPERATURE * tempered.log_softmax(dim=1).max(dim=1).values.sum()
        (gradient,) = torch.autograd.grad(objective, images)
    with torch.no_grad():
        perturbed = images + ODIN_NOISE * gradient.sign() / std
        return (_logits(head, model.encode_image(perturbed), scale) / ODIN_TEMPERATURE).softmax(dim=1).amax(dim=1)


def _logits(head: Head, features: Tensor, scale: float) -> Tensor:
    """[B, C] logits_yes, in float32 also within autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return head(features.float(), scale)[0]


def local_features(model: CLIPN, images: Tensor) -> tuple[Tensor, Tensor]:
    """Image features [B, D] and features of P patches [B, P, D], both L2-normalised, from images [B, 3, H, W].

    A patch feature is the last attention's output for a patch that attends to itself alone: value projection, output
    projection. A ViT adds the rest of its last block (residual and MLP, as the released code of GL-MCM does), the final
    norm and the projection. In CLIP's ResNet that attention is the pooling, without position embeddings. In a
    convolutional tower of timm that averages over positions, a patch feature is the projection of one position.

    Raises ValueError for any other base.
    """
    tower, inputs = model.base.visual, []
    if isinstance(tower, VisionTransformer) and tower.attn_pool is None and is_standard(tower):
        last, project = tower.transformer.resblocks[-1], _vit_patches
    elif isinstance(tower, ModifiedResNet):
        last, project = tower.attnpool, _resnet_patches
    elif isinstance(tower, TimmModel) and _averages(tower):
        last, project = tower.trunk.global_pool, _timm_patches
    else:
        found = f"{type(tower).__name__}{' of other blocks or pooling' * hasattr(tower, 'transformer')}"
        needed = "a base with patch features, open_clip's standard ViT, CLIP's ResNet or timm's"
        raise ValueError(f"GL-MCM and tagood.tagger=clip need {needed}; this base has {found}")
    own = threading.get_ident()  # other threads may use the model at the same time

    def keep_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == own:
            inputs.append(arguments[0])

    hook = last.register_forward_pre_hook(keep_input)
    try:
        features = model.encode_image(images)
    finally:
        hook.remove()
    return features, F.normalize(project(tower, inputs[0]).float(), dim=-1)


def _vit_patches(tower: VisionTransformer, hidden: Tensor) -> Tensor:
    """The last block's input [B, 1 + P, width] -> [B, P, D]."""
    block = tower.transformer.resblocks[-1]
    attention, width = block.attn, block.attn.embed_dim
    hidden = (hidden if tower.transformer.batch_first else hidden.transpose(0, 1))[:, 1:]  # without the class token
    value = F.linear(block.ln_1(hidden), attention.in_proj_weight[-width:], attention.in_proj_bias[-width:])
    hidden = hidden + block.ls_1(attention.out_proj(value))
    patches = tower.ln_post(hidden + block.ls_2(block.mlp(block.ln_2(hidden))))
    return patches if tower.proj is None else patches @ tower.proj


def _resnet_patches(tower: ModifiedResNet, hidden: Tensor) -> Tensor:
    """The pooling's input [B, width, h, w] -> [B, h * w, D]."""
    return tower.attnpool.c_proj(tower.attnpool.v_proj(hidden.flatten(2).transpose(1, 2)))


def _averages(tower: TimmModel) -> bool:
    """Whether a timm tower is an average over positions, with a linear projection at most behind it."""
    trunk, head = tower.trunk, [layer for layer in tower.head if not isinstance(layer, nn.Dropout)]
    pool = getattr(trunk, "global_pool", None)
    averages = isinstance(pool, SelectAdaptivePool2d) and pool.pool_type == "avg"
    linear = all(isinstance(layer, nn.Linear) for layer in head)
    return averages and linear and isinstance(getattr(trunk, "fc", None), nn.Identity)


def _timm_patches(tower: TimmModel, hidden: Tensor) -> Tensor:
    """The pooling's input [B, width, h, w] -> [B, h * w, D]."""
    return tower.head(hidden.flatten(2).transpose(1, 2))
