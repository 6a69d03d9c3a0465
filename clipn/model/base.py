"""The base CLIP: any open_clip model by name, JSON config or checkpoint, and its tokenizer."""

import copy
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from clipn.data.images import merge_preprocess
from clipn.model.checkpoint import load_weights, read_checkpoint

Architecture = dict[str, Any]  # an open_clip JSON model config: embed_dim, vision_cfg, text_cfg, ...


def build_base(model_name: str | Architecture, pretrained: str | Path | None = None) -> tuple[nn.Module, Architecture]:
    """Build an open_clip model with its text tower at `.text`; returns it and the model config that describes it.

    pretrained: an open_clip tag, a path to a plain CLIP checkpoint, or None for random weights (for an `hf-hub:` or
        `local-dir:` name: its own weights).
    Raises FileNotFoundError or ValueError for unknown names and files that do not fit, OSError for a failed download.
    """
    architecture = find_architecture(model_name)
    if pretrained is not None and Path(pretrained).is_file():
        content = read_checkpoint(pretrained)
        base = build_unloaded(architecture, content, str(pretrained))
        load_weights(base, content["state_dict"], str(pretrained))
    elif pretrained is not None:
        base = _build_from_tag(model_name, str(pretrained), architecture)
    elif str(model_name).startswith(("hf-hub:", "local-dir:")):
        base = open_clip.create_model(model_name, force_custom_text=True)
    else:
        base = _build_from_config(architecture, architecture["text_cfg"].get("hf_model_pretrained", True))
    return base, architecture


def build_unloaded(architecture: Architecture, content: dict[str, Any], source: str) -> nn.Module:
    """The open_clip model that a checkpoint's weights are loaded into, with the checkpoint's preprocessing.

    Sets quick_gelu in `architecture` where the checkpoint does: the weights decide the activation, not the name.
    Raises ValueError for a model or a preprocessing that open_clip cannot build.
    """
    if (content.get("architecture") or {}).get("quick_gelu"):
        architecture["quick_gelu"] = True
    base = _build_from_config(architecture, fetch_text=False)
    base.visual.preprocess_cfg = merge_preprocess(base.visual.preprocess_cfg, content.get("preprocess") or {}, source)
    return base


def find_architecture(model_name: str | Architecture) -> Architecture:
    """A copy of the open_clip model config of a built-in name, a JSON file or an `hf-hub:` / `local-dir:` name.

    Raises FileNotFoundError for a missing file, ValueError for an unknown name or a file that is not a model config.
    """
    if isinstance(model_name, dict):
        return copy.deepcopy(model_name)
    if not str(model_name).endswith(".json"):
        architecture = open_clip.get_model_config(model_name)
        if architecture is None:
            choices = f"a path ending in .json, or one of open_clip's names: {', '.join(open_clip.list_models())}"
            raise ValueError(f"model {model_name!r} is unknown: expected {choices}")
        return architecture
    if not Path(model_name).is_file():
        raise FileNotFoundError(f"{model_name}: no such model config file")
    try:
        content = json.loads(Path(model_name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{model_name}: not valid JSON: {error}") from error
    architecture = content.get("model_cfg", content) if isinstance(content, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in architecture]
    if missing:
        raise ValueError(f"{model_name}: not an open_clip model config: {', '.join(missing)} is missing")
    return architecture


def context_length(architecture: Architecture) -> int:
    """The number of tokens of a tokenized text."""
    return architecture["text_cfg"].get("context_length", 77)


def get_tokenizer(model_name: str | Architecture) -> Callable[[str | list[str]], Tensor]:
    """The tokenizer of a model: texts -> [B, context_length] int64.

    model_name: as in `create_model_and_transforms`. Raises what `find_architecture` raises, and OSError, one line, for
    a Hugging Face tokenizer that cannot be loaded.
    """
    architecture = find_architecture(model_name)  # for an unknown name open_clip returns a default tokenizer
    if isinstance(model_name, str) and not model_name.endswith(".json"):
        return open_clip.get_tokenizer(model_name)
    text = architecture["text_cfg"]
    options = (text.get("tokenizer_kwargs") or {}) | {"context_length": context_length(architecture)}
    if not text.get("hf_tokenizer_name"):
        return SimpleTokenizer(**options)
    try:
        return HFTokenizer(text["hf_tokenizer_name"], tokenizer_mode=text.get("tokenizer_mode"), **options)
    except OSError as error:  # transformers' message has many lines
        raise OSError(f"tokenizer {text['hf_tokenizer_name']!r}: {str(error).splitlines()[0]}") from error


def _build_from_tag(model_name: str | Architecture, tag: str, architecture: Architecture) -> nn.Module:
    tags = [] if isinstance(model_name, dict) else open_clip.list_pretrained_tags_by_model(model_name)
    if tag not in tags:
        raise ValueError(
            f"pretrained={tag!r}: no such file, and no open_clip tag of {model_name!r}; its tags are: "
            + (", ".join(tags) or "none")
        )
    # The weights decide the activation. open_clip only warns when the model's name disagrees.
    if get_pretrained_cfg(model_name, tag).get("quick_gelu"):
        architecture["quick_gelu"] = True
    quick_gelu = architecture.get("quick_gelu", False)
    try:
        return open_clip.create_model(model_name, tag, force_custom_text=True, force_quick_gelu=quick_gelu)
    except RuntimeError as error:  # open_clip's error for a failed download
        raise OSError(f"pretrained={tag!r} of {model_name!r}: {str(error).splitlines()[0]}") from error


def _build_from_config(architecture: Architecture, fetch_text: bool) -> nn.Module:
    logger = logging.getLogger()
    level = logger.level
    # open_clip reads a config that is not built in only from a folder.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))
        logger.setLevel(logging.ERROR)  # open_clip warns of random weights: they are loaded next, or random on purpose
        try:
            return open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, force_custom_text=True, pretrained_text=fetch_text
            )
        except (TypeError, KeyError, AssertionError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"not a model that open_clip can build: {reason}; its config: {architecture}") from error
        finally:
            logger.setLevel(level)
