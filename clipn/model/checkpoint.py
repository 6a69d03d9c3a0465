"""Checkpoint files: the published layout's names, reading without executing anything, writing atomically.

A file is a dict {"epoch", "name", "state_dict", ...}. The state_dict is flat: `visual.*`, the text tower's parts by
their own names (`transformer.*`, `ln_final.*`, ...), `logit_scale`, the same parts with `_no` after the first name
(`transformer_no.*`), and `prompt_no` [P, context, width]. A plain CLIP checkpoint is the same without the last two, and
a shared file (clipn/share.py) is the last two alone, as safetensors with the rest of the dict in its header.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from clipn.runtime.files import atomic_write

PROMPTS = "prompt_no"
SHARED_FORMAT = 1
_FORMAT_KEY = "clipn_format"  # in a shared file's header
_FACTS = dict.fromkeys(("architecture", "preprocess", "config", "training"), dict)
_FACTS |= dict.fromkeys(("model_name", "pretrained", "base_sha256"), str)

# Constants that some writers store beside the weights; they are rebuilt from the model's config.
_NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size", "transformer.embeddings.position_ids")


def published_name(name: str) -> str:
    """The published layout's name of a CLIPN parameter (module path -> flat name)."""
    if name == "no_text.prompts":
        return PROMPTS
    if name.startswith("no_text.tower."):
        part, *rest = name.removeprefix("no_text.tower.").split(".")
        return ".".join([part + "_no", *rest])
    return name.removeprefix("base.").removeprefix("text.")


def is_clipn(state: dict[str, torch.Tensor]) -> bool:
    """Whether a flat state_dict holds a no tower or prompts."""
    return any(_is_no(key) for key in state)


def base_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a flat state_dict that is the base CLIP: empty for a shared file."""
    return {key: value for key, value in state.items() if not _is_no(key)}


def no_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a flat state_dict that CLIPN adds: the no tower and the prompts."""
    return {key: value for key, value in state.items() if _is_no(key)}


def base_hash(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names and values of a base CLIP's weights, the same for every file and dtype they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(base_weights(state).items()):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(key.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file into a dict whose "state_dict" has flat, unprefixed names.

    Takes .safetensors, and PyTorch files with or without the wrapping dict and the "module." prefix. What a shared
    file's header tells stands beside "state_dict". Nothing in the file is executed. Raises FileNotFoundError, or
    ValueError for a file that is no checkpoint or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            content = _read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds Python objects that would be executed, or is no PyTorch file; only tensors are read"
        raise ValueError(f"{path}: refused: {reason}") from error
    except Exception as error:  # broken bytes make the readers fail in every way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a whole checkpoint file: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    if "state_dict" not in content:
        content = {"state_dict": content}
    content["state_dict"] = _flat(content["state_dict"], path)
    _check_facts(content, path)
    if "trust_remote_code" in str(content.get("architecture")):  # transformers would run a stranger's code
        raise ValueError(f"{path}: refused: its architecture asks for trust_remote_code, which would run code")
    return content


def load_weights(module: torch.nn.Module, state: dict[str, torch.Tensor], names: dict[str, str], source: str) -> None:
    """Copy every tensor of `state` into `module`; `names` maps each of the module's keys to its key in `state`.

    Raises ValueError, before anything is changed, that lists what is missing, unexpected, or of another shape,
    or not finite.
    """
    own = module.state_dict()
    assert own.keys() == names.keys()
    missing = [key for key in names.values() if key not in state]
    unexpected = sorted(state.keys() - set(names.values()))
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[name].shape)}"
        for name, key in names.items()
        if key in state and state[key].numel() * own[name].numel() > 1 and state[key].shape != own[name].shape
    ]
    finds = [("missing", missing), ("unexpected", unexpected), ("other shapes", shapes)]
    text = "; ".join(f"{word}: {_shorten(keys)}" for word, keys in finds if keys)
    if text:
        raise ValueError(f"{source}: does not fit this model: {text}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{source}: NaN or infinite weights in: {_shorten(broken)}")
    # A scalar such as logit_scale is stored as [] or as [1].
    module.load_state_dict({name: state[key].reshape(own[name].shape) for name, key in names.items()})


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that `path` is at every moment either absent, the old file, or the whole new one."""
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # what torch.save says of a full disk
        raise OSError(f"{path}: could not be written (is the disk full?): {str(error).splitlines()[0]}") from error


def write_shared(state: dict[str, torch.Tensor], facts: dict[str, Any], path: str | Path) -> None:
    """Write the no tower and prompts of a flat state_dict as safetensors, with `facts`, JSON values, in the header."""
    header = {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in facts.items()}
    header |= {"format": "pt", _FORMAT_KEY: str(SHARED_FORMAT)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in no_weights(state).items()}
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        names, header = file.keys(), file.metadata() or {}
        content = {"state_dict": {name: file.get_tensor(name) for name in names}}
    if _FORMAT_KEY not in header:
        return content
    if header[_FORMAT_KEY] != str(SHARED_FORMAT):
        raise ValueError(f"{_FORMAT_KEY} {header[_FORMAT_KEY]}: this version of clipn reads {SHARED_FORMAT}")
    facts = {key: json.loads(value) for key, value in header.items() if key not in ("format", _FORMAT_KEY)}
    return facts | content


def _check_facts(content: dict[str, Any], path: Path) -> None:
    """Raises ValueError for what stands beside the weights and is not of its kind."""
    for key, kind in _FACTS.items():
        if not isinstance(content.get(key), (kind, type(None))):
            raise ValueError(f"{path}: its {key} is {type(content[key]).__name__}, expected {kind.__name__}")
    for section, settings in (content.get("config") or {}).items():
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: its config's {section} is {type(settings).__name__}, expected dict")


def _is_no(key: str) -> bool:
    return key.split(".")[0].endswith("_no")


def _flat(state: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds no weights: its state_dict is {'empty' if state == {} else type(state)}")
    flat = {}
    for key, value in state.items():
        name = str(key).removeprefix("module.").removeprefix("text.")
        if name in _NOT_WEIGHTS:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {key} is {type(value).__name__}, expected a tensor")
        flat[name] = value
    return flat


def _shorten(keys: list[str], limit: int = 5) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def checkpoint_folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def last_checkpoint(run_dir: str | Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return checkpoint_folder(run_dir) / "last.pt"
