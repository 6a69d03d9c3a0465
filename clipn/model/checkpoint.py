"""Checkpoint files: parameter names of the published layout, safe reading, atomic writing.

A file is a dict {"epoch", "name", "state_dict", ...}. The state_dict is flat: `visual.*`, the text tower's parts
(`transformer.*`, `ln_final.*`, ...), `logit_scale`, the no tower's parts with `_no` after the first name
(`transformer_no.*`), and `prompt_no` [P, context, width]. An adapter has `adapter_no.*` in their place. A bias is
`bias_no` []. These two are not in the published layout. A plain CLIP checkpoint has no `*_no`. A shared file, written
by `clipn export share`, has nothing else, as safetensors with the rest of the dict in the header.
"""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clipn.runtime.files import atomic_write

PROMPTS, BIAS = "prompt_no", "bias_no"
ADAPTER = "adapter_no."  # of names
_SHARED_FORMAT = "1"
_FORMAT_KEY = "clipn_format"  # in the header of a shared file
_METADATA_TYPES = dict.fromkeys(("architecture", "preprocess", "config", "training"), dict)
_METADATA_TYPES |= dict.fromkeys(("model_name", "pretrained", "base_sha256"), str)

# Constants that some writers store beside the weights. The model config defines them.
_NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size", "transformer.embeddings.position_ids")


def checkpoint_folder(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def last_checkpoint(run_dir: str | Path) -> Path:
    """The path of a run's newest checkpoint, which need not exist."""
    return checkpoint_folder(run_dir) / "last.pt"


def published_name(name: str) -> str:
    """The name in the published layout of a parameter of a CLIPN or of its base (module path -> flat name)."""
    name = name.replace("no_text.prompts", PROMPTS).replace("no_text.tower.", "no_text.")
    name = re.sub(r"^no_text\.(\w+)", r"\1_no", name)
    return name.removeprefix("base.").removeprefix("text.")


def published_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a CLIPN or of its base by their published names."""
    return {published_name(name): value for name, value in module.state_dict().items()}


def base_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base CLIP's part of a flat state_dict; empty for a shared file."""
    return {name: value for name, value in state.items() if not name.split(".")[0].endswith("_no")}


def no_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a flat state_dict that CLIPN adds: no tower and prompts, or adapter; bias. Empty for a plain CLIP."""
    return {name: value for name, value in state.items() if name.split(".")[0].endswith("_no")}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file into a dict whose "state_dict" has flat, unprefixed names.

    Accepts .safetensors, and PyTorch files with or without the wrapping dict and the "module." prefix. The metadata in
    a shared file's header become keys beside "state_dict". No code in the file is executed.

    Raises FileNotFoundError, or ValueError for a file that is not a whole checkpoint or would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        safe = path.suffix == ".safetensors"
        content = _read_safetensors(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds Python objects that would be executed, or is no PyTorch file; only tensors are read"
        raise ValueError(f"{path}: refused: {reason}") from error
    except Exception as error:  # the readers raise many kinds of exceptions for damaged files
        text = "" if isinstance(error, KeyError) else str(error).strip()  # a key of a parser means nothing to a reader
        reason = (text or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a whole checkpoint file: {reason}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        content = {"state_dict": content}
    content["state_dict"] = _flatten(content["state_dict"], path)
    _check_metadata(content, path)
    return content


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a flat state_dict, all of it, into a CLIPN or an open_clip model.

    source: the file's name in messages. Raises ValueError, before anything is changed, that names the keys that are
    missing, unexpected, of another shape, or not finite.
    """
    own = module.state_dict()
    names = {name: published_name(name) for name in own}
    problems = {
        "missing": [key for key in names.values() if key not in state],
        "unexpected": sorted(state.keys() - set(names.values())),
        "other shapes": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[name].shape)}"
            for name, key in names.items()
            if key in state and state[key].numel() * own[name].numel() > 1 and state[key].shape != own[name].shape
        ],
    }
    text = "; ".join(f"{problem}: {_first_of(keys)}" for problem, keys in problems.items() if keys)
    if text:
        raise ValueError(f"{source}: does not fit this model: {text}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{source}: NaN or infinite weights in: {_first_of(broken)}")
    # A scalar such as logit_scale is stored with shape [] or [1].
    module.load_state_dict({name: state[key].reshape(own[name].shape) for name, key in names.items()})


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically. Raises OSError, and leaves the old file, when the disk is full."""
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch.save's error for a full disk
        raise OSError(f"{path}: could not be written (is the disk full?): {str(error).splitlines()[0]}") from error


def write_safetensors(state: dict[str, Tensor], metadata: dict[str, Any], path: str | Path) -> None:
    """Write a flat state_dict as safetensors, with JSON-able `metadata` in the header."""
    header = {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in metadata.items()}
    header |= {"format": "pt", _FORMAT_KEY: _SHARED_FORMAT}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        content = {"state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (not a dict)
    if _FORMAT_KEY not in header:
        return content
    if header[_FORMAT_KEY] != _SHARED_FORMAT:
        raise ValueError(f"{_FORMAT_KEY} {header[_FORMAT_KEY]}: this version of clipn reads {_SHARED_FORMAT}")
    return {key: json.loads(value) for key, value in header.items() if key not in ("format", _FORMAT_KEY)} | content


def _check_metadata(content: dict[str, Any], path: Path) -> None:
    for key, kind in _METADATA_TYPES.items():
        if not isinstance(content.get(key), (kind, type(None))):
            raise ValueError(f"{path}: its {key} is {type(content[key]).__name__}, expected {kind.__name__}")
    for section, settings in (content.get("config") or {}).items():
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: its config's {section} is {type(settings).__name__}, expected dict")
    if "trust_remote_code" in str(content.get("architecture")):  # transformers would download and execute code
        raise ValueError(f"{path}: refused: its architecture asks for trust_remote_code, which would execute code")


def _flatten(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds no weights: its state_dict is {'empty' if state == {} else type(state)}")
    named = {str(key).removeprefix("module.").removeprefix("text."): value for key, value in state.items()}
    weights = {name: value for name, value in named.items() if name not in _NOT_WEIGHTS}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is {type(value).__name__}, expected a tensor")
    return weights


def _first_of(keys: list[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
