"""CLIPN: a frozen open_clip model, and what says no: a text tower with learnable prompts, or an adapter."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipn.config.schema import ModelConfig
from clipn.data.images import Transform, train_transform, val_transform
from clipn.model.base import Architecture, build_base, build_unloaded, context_length, find_architecture
from clipn.model.checkpoint import (
    ADAPTER,
    BIAS,
    PROMPTS,
    base_weights,
    load_weights,
    no_weights,
    published_state,
    read_checkpoint,
)
from clipn.model.hashing import base_hash
from clipn.model.no_text import NoAdapter, NoTextTower
from clipn.model.packed_text import compile_text, text_features

log = logging.getLogger(__name__)


class CLIPN(nn.Module):
    """The frozen base CLIP (image tower, "yes" text tower, temperature) and the "no" text tower, or an adapter.

    All features are [B, D], float32, L2-normalised. num_prompts: P; 0 for the hand-crafted variant and the adapter.
    no_tower: "tower", or "adapter" with a hidden layer of adapter_width units. bias: whether d has a learned bias b.
    """

    def __init__(
        self,
        base: nn.Module,
        num_prompts: int,
        architecture: Architecture,
        no_tower: str = "tower",
        bias: bool = False,
        adapter_width: int = 512,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.architecture, self.no_tower = architecture, no_tower
        self.num_prompts = num_prompts if no_tower == "tower" else 0
        if no_tower == "tower":
            self.no_text = NoTextTower(base.text, num_prompts, context_length(architecture), bias)
        else:
            self.no_text = NoAdapter(architecture["embed_dim"], adapter_width, bias)

    @property
    def logit_scale(self) -> nn.Parameter:
        """The log of the temperature s."""
        return self.base.logit_scale

    @property
    def cosine_bias(self) -> float:
        """b / s, the bias in units of a cosine; 0 without a bias.

        Training learns b in d = s (f . n - f . g) + b, at s = exp(logit_scale). Inference at a scale S uses
        d = S (f . n - f . g + b / s): b is scaled along, so that d is 0 at the same images and texts as in training.
        """
        bias = self.no_text.bias
        return 0.0 if bias is None else float(bias.detach().float() / self.logit_scale.detach().float().exp())

    @property
    def reads_negated(self) -> bool:
        """Whether the no tower reads negated captions: the hand-crafted variant."""
        return self.no_tower == "tower" and not self.num_prompts

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
        """Token ids [B, L] -> [B, D] by the "no" tower, or by the "yes" tower and the adapter.

        choice: of the tower, as in `NoTextTower.forward`, the mean by default.
        """
        return self.no_text(tokens, choice) if self.no_tower == "tower" else self.no_text(self.encode_text(tokens))

    def compile_towers(self) -> None:
        """Apply torch.compile to the image tower and to the parts of the text towers that become faster."""
        self.base.visual.compile()
        compile_text(self.base.text)
        self.no_text.compile_parts()

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
    no_tower: str = "tower",
    bias: bool = False,
    adapter_width: int = 512,
) -> tuple[CLIPN, Transform, Transform]:
    """Build a CLIPN in evaluation mode and its image transforms (training, validation).

    model_name: an open_clip name, a path to a JSON model config, or such a config as a dict.
    pretrained: an open_clip tag, or a path to a CLIPN or plain CLIP checkpoint. A CLIPN checkpoint has its no tower or
        adapter, its number of prompts and its bias; for a plain CLIP the no features equal the yes features. None
        leaves the base random, as open_clip does.
    image_mean, image_std: for a checkpoint without statistics of its own.
    base: for a shared file, which holds the no tower alone: its base CLIP, as in `load_model`.
    no_tower, bias, adapter_width: for a plain CLIP, as in `CLIPN`. A CLIPN checkpoint without a bias gets one, 0, if
        `bias` asks for it.

    Raises ValueError or FileNotFoundError for unknown names and for files that do not fit.
    """
    settings = ModelConfig(num_prompts=num_prompts, no_tower=no_tower, bias=bias, adapter_width=adapter_width)
    if pretrained is not None and Path(pretrained).is_file():
        model = load_model(read_checkpoint(pretrained), str(pretrained), model_name, settings, base)
    else:
        model = _untrained(*build_base(model_name, pretrained), settings)
    model.set_statistics(image_mean, image_std)
    model.to(device).eval()
    return model, train_transform(model.preprocess), val_transform(model.preprocess)


def configured_model(settings: ModelConfig, device: str | torch.device) -> CLIPN:
    """The model that a config describes, as `create_model_and_transforms` builds it.

    Raises ValueError also for a checkpoint whose no tower is not as the config says.
    """
    statistics, more = (settings.image_mean, settings.image_std), ("no_tower", "bias", "adapter_width")
    arguments = settings.name, settings.pretrained, settings.num_prompts, device, *statistics
    model = create_model_and_transforms(*arguments, **{name: getattr(settings, name) for name in more})[0]
    check_no_tower(model, settings, f"model.pretrained={settings.pretrained}")
    return model


def check_no_tower(model: CLIPN, settings: ModelConfig, source: str) -> None:
    """Raise ValueError if the no tower of a checkpoint, `source` in the message, is not what the config describes."""
    own = {"no_tower": model.no_tower, "bias": model.no_text.bias is not None}
    if own["no_tower"] == "adapter":
        own["adapter_width"] = model.no_text.adapter[0].out_features
    for name, value in own.items():
        if value != getattr(settings, name):
            says = f"the config says model.{name}={_text(getattr(settings, name))}"
            raise ValueError(f"{source}: is of model.{name}={_text(value)}, but {says}")


def _text(value: Any) -> str:
    return str(value).lower()  # as in YAML


def _untrained(base: nn.Module, architecture: Architecture, settings: ModelConfig) -> CLIPN:
    """A CLIPN of this base whose no features are its yes features."""
    return CLIPN(base, settings.num_prompts, architecture, settings.no_tower, settings.bias, settings.adapter_width)


def load_model(
    content: dict[str, Any],
    source: str,
    model_name: str | Architecture,
    settings: ModelConfig | None = None,
    base: str | Path | None = None,
) -> CLIPN:
    """Build a CLIPN from the content of a checkpoint; source: the file's name in messages.

    settings: what says no beside a plain CLIP, by default a copy of its text tower with 16 prompts. A CLIPN checkpoint
        has its own; a bias that it lacks but the settings ask for is 0, which is logged.
    base: for a shared file, an open_clip tag or a checkpoint of the base CLIP; by default the tag that the file names.
    Raises ValueError for weights that do not fit the model and for the wrong base, FileNotFoundError for no base.
    """
    clipn = no_weights(content["state_dict"])
    if clipn and not base_weights(content["state_dict"]):
        content = _add_base(content, source, model_name, base)
    state = content["state_dict"]
    settings, adapter = settings or ModelConfig(), any(name.startswith(ADAPTER) for name in state)
    saved_prompts = ((content.get("config") or {}).get("model") or {}).get("num_prompts", 0)
    if clipn and not adapter and (state[PROMPTS].ndim != 3 if PROMPTS in state else saved_prompts):
        raise ValueError(f"{source}: {PROMPTS} is missing or not of the shape [prompts, context, width]")
    architecture = find_architecture(model_name)
    model = build_unloaded(architecture, content, source)
    if clipn:
        if settings.bias and BIAS not in state:
            log.warning("%s has no bias, as model.bias=true asks for: it is 0", source)
            state = state | {BIAS: torch.zeros(())}
        hidden = state.get(f"{ADAPTER}0.bias", torch.zeros(1)).numel()
        kind = "adapter" if adapter else "tower"
        model = CLIPN(model, len(state.get(PROMPTS, ())), architecture, kind, BIAS in state, hidden)
    load_weights(model, state, source)
    return model if clipn else _untrained(model, architecture, settings)  # copies the loaded text tower


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
