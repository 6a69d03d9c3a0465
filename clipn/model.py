"""CLIPN: a frozen open_clip model plus a "no" text tower with learnable prompts."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from .checkpoint import PROMPTS, is_clipn, load_weights, published_name, read_checkpoint
from .images import Transform, train_transform, val_transform
from .text import compile_text, is_standard, text_features, token_embedding

Architecture = dict[str, Any]  # an open_clip JSON model config: embed_dim, vision_cfg, text_cfg, ...


class NoTextTower(nn.Module):
    """The "no" text tower: a full copy of a text tower, and P prompts that are added to its input embeddings.

    prompts: [P, context_length, width], zero at the start (CLIPN, section 3.2), or None for P = 0.
    """

    def __init__(self, text: nn.Module, num_prompts: int, context_length: int) -> None:
        super().__init__()
        self.tower = copy.deepcopy(text).requires_grad_(True)
        self.num_prompts = num_prompts
        width = token_embedding(self.tower).embedding_dim
        prompts = nn.Parameter(torch.zeros(num_prompts, context_length, width)) if num_prompts else None
        self.register_parameter("prompts", prompts)

    def forward(self, tokens: Tensor, choice: Tensor | None = None) -> Tensor:
        """tokens [B, L] -> features [B, D], float32, L2-normalised.

        choice: [B] integers in 0..P, the prompt that each caption gets; P, and None for all, is the mean prompt.
        """
        if self.prompts is None:
            return text_features(self.tower, tokens)
        mean = self.prompts.mean(dim=0, keepdim=True)
        if choice is None:
            return text_features(self.tower, tokens, mean)
        return text_features(self.tower, tokens, torch.cat([self.prompts, mean]), choice)

    def recompute_activations(self) -> None:
        """Trade time for memory: keep each block's input only. Raises ValueError for a tower that cannot."""
        if isinstance(self.tower, TextTransformer) and not is_standard(self.tower):
            raise ValueError("train.grad_checkpointing: open_clip cannot recompute this text tower's blocks")
        self.tower.set_grad_checkpointing(True)


class CLIPN(nn.Module):
    """Image tower, text tower and temperature of a frozen base CLIP, and the no tower beside them.

    All features are [B, D], float32, L2-normalised.
    """

    def __init__(self, base: nn.Module, num_prompts: int, architecture: Architecture) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.architecture = architecture
        self.no_text = NoTextTower(base.text, num_prompts, context_length(architecture))

    @property
    def logit_scale(self) -> nn.Parameter:
        """The log of the temperature s."""
        return self.base.logit_scale

    @property
    def num_prompts(self) -> int:
        return self.no_text.num_prompts

    @property
    def preprocess(self) -> dict:
        """open_clip's description of the image preprocessing: size, mean, std, interpolation, resize_mode, ..."""
        return self.base.visual.preprocess_cfg

    def set_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Normalise images with these three means and deviations; None keeps what the checkpoint said."""
        given = {"mean": mean, "std": std}
        self.preprocess.update({key: tuple(value) for key, value in given.items() if value is not None})

    def train(self, mode: bool = True) -> CLIPN:
        """Only the no tower ever trains: the base keeps its batch statistics and drops nothing."""
        super().train(mode)
        self.base.eval()
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised images -> [B, D]."""
        return F.normalize(self.base.encode_image(images, normalize=False).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, L] token ids -> [B, D] by the "yes" tower."""
        return text_features(self.base.text, tokens)

    def encode_no_text(self, tokens: Tensor, choice: Tensor | None = None) -> Tensor:
        """[B, L] token ids -> [B, D] by the "no" tower, with the mean prompt unless `choice` says otherwise."""
        return self.no_text(tokens, choice)

    def compile_towers(self) -> None:
        """torch.compile what a training step runs: the image tower, and the parts of the text towers that gain."""
        self.base.visual.compile()
        for tower in (self.base.text, self.no_text.tower):
            compile_text(tower)

    def published_names(self) -> dict[str, str]:
        """Each key of this module's state_dict -> its name in the published layout."""
        return {name: published_name(name) for name in self.state_dict()}

    def published_state(self) -> dict[str, Tensor]:
        """The weights under the published layout's names."""
        names = self.published_names()
        return {names[name]: value for name, value in self.state_dict().items()}


def create_model_and_transforms(
    model_name: str | Architecture,
    pretrained: str | Path | None = None,
    num_prompts: int = 16,
    device: str | torch.device = "cpu",
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> tuple[CLIPN, Transform, Transform]:
    """Build a CLIPN and its image transforms (training, validation).

    model_name: an open_clip name, a path to a JSON model config, or such a config as a dict.
    pretrained: an open_clip tag, or a path to a CLIPN or plain CLIP checkpoint. From a CLIPN checkpoint come the no
        tower and the number of prompts; from a plain CLIP the no tower is a copy of the text tower. None leaves the
        base random, as open_clip does.
    image_mean, image_std: for a checkpoint that does not carry its own statistics.

    Raises ValueError or FileNotFoundError for unknown names and for files that do not fit.
    """
    if pretrained is not None and Path(pretrained).is_file():
        model = load_model(read_checkpoint(pretrained), str(pretrained), model_name, num_prompts)
    else:
        base, architecture = build_base(model_name, pretrained)
        model = CLIPN(base, num_prompts, architecture)
    model.set_statistics(image_mean, image_std)
    model.to(device).eval()
    return model, train_transform(model.preprocess), val_transform(model.preprocess)


def load_model(content: dict[str, Any], source: str, model_name: str | Architecture, num_prompts: int = 16) -> CLIPN:
    """A CLIPN from a checkpoint that has been read, and `source`, its name for messages.

    A CLIPN checkpoint decides the number of prompts; a plain CLIP gets `num_prompts` of them, and a no tower that is a
    copy of its text tower. Raises ValueError for weights that do not fit the model.
    """
    architecture = find_architecture(model_name)
    state = content["state_dict"]
    clipn = is_clipn(state)
    saved = ((content.get("config") or {}).get("model") or {}).get("num_prompts", 0)
    if clipn and (state[PROMPTS].ndim != 3 if PROMPTS in state else saved):
        raise ValueError(f"{source}: {PROMPTS} is missing or not of the shape [prompts, context, width]")
    base = _build_from_config(architecture, fetch_text=False)
    base.visual.preprocess_cfg.update(content.get("preprocess") or {})
    if not clipn:
        load_base(base, state, source)
    model = CLIPN(base, len(state.get(PROMPTS, ())) if clipn else num_prompts, architecture)
    if clipn:
        load_weights(model, state, model.published_names(), source)
    return model


def build_base(model_name: str | Architecture, pretrained: str | Path | None = None) -> tuple[nn.Module, Architecture]:
    """An open_clip model with its text tower at `.text`, and the JSON config that describes it.

    pretrained: an open_clip tag, a path to a plain CLIP checkpoint, or None for random weights.
    """
    architecture = find_architecture(model_name)
    if pretrained is not None and Path(pretrained).is_file():
        content = read_checkpoint(pretrained)
        base = _build_from_config(architecture, fetch_text=False)
        base.visual.preprocess_cfg.update(content.get("preprocess") or {})
        load_base(base, content["state_dict"], str(pretrained))
    elif pretrained is not None:
        base = _build_from_tag(model_name, str(pretrained), architecture)
    elif isinstance(model_name, str) and model_name.startswith(("hf-hub:", "local-dir:")):
        base = open_clip.create_model(model_name, force_custom_text=True)
    else:
        base = _build_from_config(architecture, architecture["text_cfg"].get("hf_model_pretrained", True))
    return base, architecture


def find_architecture(model_name: str | Architecture) -> Architecture:
    """The open_clip model config behind a built-in name, a JSON file or an `hf-hub:` / `local-dir:` name.

    Raises FileNotFoundError for a missing file, ValueError for an unknown name or a file that is no model config.
    """
    if isinstance(model_name, dict):
        return copy.deepcopy(model_name)
    if str(model_name).endswith(".json"):
        return _read_architecture(Path(model_name))
    architecture = open_clip.get_model_config(model_name)
    if architecture is None:
        raise ValueError(
            f"model {model_name!r} is unknown: expected a path ending in .json, or one of open_clip's names: "
            + ", ".join(open_clip.list_models())
        )
    return architecture


def context_length(architecture: Architecture) -> int:
    """The number of tokens that this model's tokenizer makes of a text."""
    return architecture["text_cfg"].get("context_length", 77)


def get_tokenizer(model_name: str | Architecture) -> Callable[[str | list[str]], Tensor]:
    """The tokenizer of a model: texts -> [B, context_length] int64. Takes what `create_model_and_transforms` takes."""
    if isinstance(model_name, str) and not model_name.endswith(".json"):
        find_architecture(model_name)  # open_clip would answer an unknown name with some tokenizer
        return open_clip.get_tokenizer(model_name)
    text = find_architecture(model_name)["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {}, context_length=text.get("context_length", 77))
    if text.get("hf_tokenizer_name"):
        return HFTokenizer(text["hf_tokenizer_name"], tokenizer_mode=text.get("tokenizer_mode"), **options)
    return SimpleTokenizer(**options)


def load_base(base: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a flat state_dict, all of it, into an open_clip model. Raises ValueError as `load_weights` does."""
    load_weights(base, state, {name: published_name(name) for name in base.state_dict()}, source)


def _read_architecture(path: Path) -> Architecture:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model config file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    architecture = content.get("model_cfg", content) if isinstance(content, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in architecture]
    if missing:
        raise ValueError(f"{path}: not an open_clip model config: {', '.join(missing)} is missing")
    return architecture


def _build_from_tag(model_name: str | Architecture, tag: str, architecture: Architecture) -> nn.Module:
    tags = [] if isinstance(model_name, dict) else open_clip.list_pretrained_tags_by_model(model_name)
    if tag not in tags:
        raise ValueError(
            f"pretrained={tag!r}: no such file, and no open_clip tag of {model_name!r}; its tags are: "
            + (", ".join(tags) or "none")
        )
    # The weights decide the activation: open_clip only warns when the name says otherwise.
    if get_pretrained_cfg(model_name, tag).get("quick_gelu"):
        architecture["quick_gelu"] = True
    quick_gelu = architecture.get("quick_gelu", False)
    return open_clip.create_model(model_name, tag, force_custom_text=True, force_quick_gelu=quick_gelu)


def _build_from_config(architecture: Architecture, fetch_text: bool) -> nn.Module:
    # open_clip reads a config that is not its own only from a folder.
    with tempfile.TemporaryDirectory() as folder, _quiet():
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))
        try:
            return open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, force_custom_text=True, pretrained_text=fetch_text
            )
        except (TypeError, KeyError, AssertionError) as error:
            raise ValueError(f"not a model that open_clip can build: {error}; its config: {architecture}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's word that a model has no weights yet: they are loaded next, or random on purpose."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
