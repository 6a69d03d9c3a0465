"""CLIPN: a frozen open_clip model plus a "no" text tower with learnable prompts."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from clipn.config.schema import ModelConfig
from clipn.data.images import Transform, train_transform, val_transform
from clipn.model.base import Architecture, build_base, build_unloaded, context_length, find_architecture
from clipn.model.checkpoint import PROMPTS, base_weights, load_weights, no_weights, published_state, read_checkpoint
from clipn.model.hashing import base_hash
from clipn.model.packed_text import compile_text, is_standard, text_features, token_embedding


class NoTextTower(nn.Module):
    """The "no" text tower: a full copy of a text tower, and P prompts that are added to its input embeddings.

    prompts: [P, context_length, width], zero at the start (CLIPN, section 3.2), or None for P = 0.
    """

    def __init__(self, text: nn.Module, num_prompts: int, context_length: int) -> None:
        super().__init__()
        self.tower = copy.deepcopy(text).requires_grad_(True)
        width = token_embedding(self.tower).embedding_dim
        prompts = nn.Parameter(torch.zeros(num_prompts, context_length, width)) if num_prompts else None
        self.register_parameter("prompts", prompts)

    def forward(self, tokens: Tensor, choice: Tensor | None = None) -> Tensor:
        """Token ids [B, L] -> features [B, D], float32, L2-normalised.

        choice: [B] integers in 0..P, each caption's prompt; P is the mean prompt, and None is P for all.
        """
        prompts = self.prompts
        if prompts is not None:
            mean = prompts.mean(dim=0, keepdim=True)
            prompts = mean if choice is None else torch.cat([prompts, mean])
        return text_features(self.tower, tokens, prompts, choice)

    def recompute_activations(self) -> None:
        """Trade time for memory: keep only each block's input. Raises ValueError for a tower that cannot."""
        if isinstance(self.tower, TextTransformer) and not is_standard(self.tower):
            raise ValueError("train.grad_checkpointing: open_clip cannot recompute this text tower's blocks")
        self.tower.set_grad_checkpointing(True)


class CLIPN(nn.Module):
    """The frozen base CLIP (image tower, "yes" text tower, temperature) and the "no" text tower.

    All features are [B, D], float32, L2-normalised. num_prompts: P; 0 for the hand-crafted variant.
    """

    def __init__(self, base: nn.Module, num_prompts: int, architecture: Architecture) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.architecture, self.num_prompts = architecture, num_prompts
        self.no_text = NoTextTower(base.text, num_prompts, context_length(architecture))

    @property
    def logit_scale(self) -> nn.Parameter:
        """The log of the temperature s."""
        return self.base.logit_scale

    @property
    def preprocess(self) -> dict[str, Any]:
        """open_clip's description of the image preprocessing: size, mean, std, interpolation, resize_mode, ..."""
        return self.base.visual.preprocess_cfg

    def set_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Normalise images with this mean and standard deviation (3 channels each); None keeps the current one."""
        statistics = (("mean", mean), ("std", std))
        self.preprocess.update({key: tuple(value) for key, value in statistics if value is not None})

    def train(self, mode: bool = True) -> "CLIPN":
        """Set the mode of the no tower. The base stays in evaluation mode: fixed batch statistics, no dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> [B, D]."""
        images = images.to(next(self.base.visual.parameters()).dtype)  # a model in half precision
        return F.normalize(self.base.encode_image(images, normalize=False).float(), dim=-1)

    def encode_image_with_tower(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, W] -> the features of `encode_image`, and the image tower's output [B, W].

        The output is float32, not normalised, and that before the projection. A tower without `.proj` (ResNet, timm)
        gives its output as it is.
        """
        visual, images = self.base.visual, images.to(next(self.base.visual.parameters()).dtype)
        projection = getattr(visual, "proj", None)
        tower = (self.base if projection is None else self._unprojected()).encode_image(images, normalize=False)
        features = tower if projection is None else tower @ projection
        return F.normalize(features.float(), dim=-1), tower.float()

    def _unprojected(self) -> nn.Module:
        """The base on the same weights, without the projection: open_clip then gives its pooled output.

        It is a shallow copy, because another thread may use the base at the same time.
        """
        base, visual = copy.copy(self.base), copy.copy(self.base.visual)
        visual._parameters = visual._parameters | {"proj": None}
        visual._compiled_call_impl = None  # of the tower with its projection
        base._modules = base._modules | {"visual": visual}
        return base

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> [B, D] by the "yes" tower."""
        return text_features(self.base.text, tokens)

    def encode_no_text(self, tokens: Tensor, choice: Tensor | None = None) -> Tensor:
        """Token ids [B, L] -> [B, D] by the "no" tower; choice: as in `NoTextTower.forward`, the mean by default."""
        return self.no_text(tokens, choice)

    def compile_towers(self) -> None:
        """Apply torch.compile to the image tower and to the parts of the text towers that become faster."""
        self.base.visual.compile()
        compile_text(self.base.text)
        compile_text(self.no_text.tower)

    def published_state(self) -> dict[str, Tensor]:
        """The weights by their names in the published layout."""
        return published_state(self)


def create_model_and_transforms(
    model_name: str | Architecture,
    pretrained: str | Path | None = None,
    num_prompts: int = 16,
    device: str | torch.device = "cpu",
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    base: str | Path | None = None,
) -> tuple[CLIPN, Transform, Transform]:
    """Build a CLIPN in evaluation mode and its image transforms (training, validation).

    model_name: an open_clip name, a path to a JSON model config, or such a config as a dict.
    pretrained: an open_clip tag, or a path to a CLIPN or plain CLIP checkpoint. A CLIPN checkpoint has the no tower and
        decides the number of prompts; for a plain CLIP the no tower is a copy of the text tower. None leaves the base
        random, as open_clip does.
    image_mean, image_std: for a checkpoint without statistics of its own.
    base: for a shared file, which holds the no tower alone: its base CLIP, as in `load_model`.

    Raises ValueError or FileNotFoundError for unknown names and for files that do not fit.
    """
    if pretrained is not None and Path(pretrained).is_file():
        model = load_model(read_checkpoint(pretrained), str(pretrained), model_name, num_prompts, base)
    else:
        clip, architecture = build_base(model_name, pretrained)
        model = CLIPN(clip, num_prompts, architecture)
    model.set_statistics(image_mean, image_std)
    model.to(device).eval()
    return model, train_transform(model.preprocess), val_transform(model.preprocess)


def configured_model(settings: ModelConfig, device: str | torch.device) -> CLIPN:
    """The model that a config describes, as `create_model_and_transforms` builds it."""
    statistics = (settings.image_mean, settings.image_std)
    return create_model_and_transforms(settings.name, settings.pretrained, settings.num_prompts, device, *statistics)[0]


def load_model(
    content: dict[str, Any],
    source: str,
    model_name: str | Architecture,
    num_prompts: int = 16,
    base: str | Path | None = None,
) -> CLIPN:
    """Build a CLIPN from the content of a checkpoint; source: the file's name in messages.

    num_prompts: for a plain CLIP, whose no tower is a copy of its text tower; a CLIPN checkpoint has its own number.
    base: for a shared file, an open_clip tag or a checkpoint of the base CLIP; by default the tag that the file names.
    Raises ValueError for weights that do not fit the model and for the wrong base, FileNotFoundError for no base.
    """
    clipn = no_weights(content["state_dict"])
    if clipn and not base_weights(content["state_dict"]):
        content = _add_base(content, source, model_name, base)
    state = content["state_dict"]
    saved_prompts = ((content.get("config") or {}).get("model") or {}).get("num_prompts", 0)
    if clipn and (state[PROMPTS].ndim != 3 if PROMPTS in state else saved_prompts):
        raise ValueError(f"{source}: {PROMPTS} is missing or not of the shape [prompts, context, width]")
    architecture = find_architecture(model_name)
    model = build_unloaded(architecture, content, source)
    if clipn:
        model = CLIPN(model, len(state.get(PROMPTS, ())), architecture)
    load_weights(model, state, source)
    return model if clipn else CLIPN(model, num_prompts, architecture)  # copies the loaded text tower


def _add_base(
    content: dict[str, Any], source: str, model_name: str | Architecture, base: str | Path | None
) -> dict[str, Any]:
    """Add the weights of its base to the content of a shared file. Raises ValueError for the wrong base."""
    name, tag, sha256 = content.get("model_name") or model_name, content.get("pretrained"), content.get("base_sha256")
    own = f"{name} {tag}" if tag else f"the CLIP of SHA-256 {str(sha256)[:12]}"
    base = str(base or tag or "")
    if Path(base).is_file():
        base_content = read_checkpoint(base)
    elif base and isinstance(name, str):
        clip, _ = build_base(base) if base.startswith("hf-hub:") else build_base(name, base)
        base_content = {"state_dict": published_state(clip), "preprocess": dict(clip.visual.preprocess_cfg)}
    else:
        why = f"base={base!r} is no such file" if base else "it holds the no tower alone"
        raise FileNotFoundError(f"{source}: {why}; give a checkpoint of {own} as base")
    weights = base_weights(base_content["state_dict"])
    if sha256 and base_hash(weights) != sha256:
        raise ValueError(f"{source}: belongs to {own}; base={base!r} holds other weights")
    preprocess = content.get("preprocess") or base_content.get("preprocess")
    return content | {"state_dict": weights | content["state_dict"], "preprocess": preprocess}
