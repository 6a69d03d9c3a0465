"""Weights from and for others: files, runs' folders and the hub; a shared file holds the no tower and prompts alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clipn.deploy.model_card import model_card, run_facts
from clipn.model.checkpoint import (
    base_hash,
    base_weights,
    is_clipn,
    no_weights,
    read_checkpoint,
    write_checkpoint,
    write_shared,
)
from clipn.model.clipn import load_model
from clipn.model.weights import WEIGHTS, find_weights, open_model
from clipn.runtime.files import atomic_write

DTYPES = {"float32": torch.float32, "float16": torch.float16}

log = logging.getLogger(__name__)


def share_weights(
    source: str | Path,
    folder: str | Path,
    model_name: str | None = None,
    tag: str | None = None,
    license: str | None = None,
    data: str | None = None,
    repo: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write clipn.safetensors and its model card, README.md, into a folder; returns what the file's header tells.

    source: a run's folder or a CLIPN checkpoint.
    model_name, tag: open_clip's names of the base, for a checkpoint that does not say them.
    license, data, repo: the license, the training data in words, and the user/repo on the hub, for the card.
    dtype: float32, or float16, which halves the file and rounds the weights.

    Raises ValueError for weights that are not CLIPN's, are shared already, or do not fit float16, and for a folder
    that holds another README.md.
    """
    if (Path(folder) / "README.md").exists() and not (Path(folder) / WEIGHTS).exists():
        raise ValueError(f"{folder}: holds a README.md that is no model card; choose another folder")
    file = find_weights(source)
    if file is None:
        raise FileNotFoundError(f"{source}: no such checkpoint or run")
    content = read_checkpoint(file)
    state = content["state_dict"]
    if not is_clipn(state) or not base_weights(state):
        found = "the no tower alone" if is_clipn(state) else "a plain CLIP without a no tower"
        raise ValueError(f"{file}: holds {found}; expected a whole CLIPN checkpoint")
    if not (content.get("architecture") or model_name):
        raise ValueError(f"{file}: does not say its architecture; give open_clip's name of its model, or a JSON file")
    model = load_model(content, str(file), content.get("architecture") or model_name)
    shared = _cast(no_weights(model.published_state()), dtype, file)
    facts = _base_names(content, model_name, tag) | {
        "base_sha256": base_hash(model.published_state()),
        "architecture": model.architecture,
        "preprocess": dict(model.preprocess) if content.get("preprocess") else None,
        "parameters": sum(value.numel() for value in shared.values()),
        "dtype": dtype,
        "license": license,
        "data": data,
    }
    facts |= run_facts(content, file)
    write_shared(shared, facts, Path(folder) / WEIGHTS)
    with atomic_write(Path(folder) / "README.md") as card:
        card.write(model_card(facts, repo).encode())
    return facts


def restore_weights(source: str | Path, path: str | Path, base: str | Path | None = None) -> None:
    """Write a shared file and its base as one whole checkpoint, which loads everywhere.

    source: clipn.safetensors, its folder, or "hf://user/repo"; base: as in `load_model`. Raises as `open_model` does.
    """
    file = find_weights(source)
    if file is None:
        raise FileNotFoundError(f"{source}: no such shared file or folder")
    content = read_checkpoint(file)
    if not is_clipn(content["state_dict"]) or base_weights(content["state_dict"]):
        raise ValueError(f"{file}: not a shared file, which holds the no tower alone")
    model = open_model(file, base=base)
    write_checkpoint(content | {"state_dict": model.published_state(), "preprocess": dict(model.preprocess)}, path)


def _cast(state: dict[str, Tensor], dtype: str, source: Path) -> dict[str, Tensor]:
    cast = {key: value.to(DTYPES[dtype]) if value.is_floating_point() else value for key, value in state.items()}
    broken = [key for key, value in cast.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{source}: {broken[0]} is too large for {dtype}; share it as float32")
    return cast


def _base_names(content: dict[str, Any], model_name: str | None, tag: str | None) -> dict[str, str | None]:
    """open_clip's name and tag of the base, each None where it is not open_clip's."""
    settings = (content.get("config") or {}).get("model") or {}
    name = model_name or settings.get("name") or content.get("model_name")
    known = name if name in open_clip.list_models() or str(name).startswith("hf-hub:") else None
    tags = open_clip.list_pretrained_tags_by_model(known) if known else []
    if tag and tag not in tags:
        raise ValueError(f"tag={tag!r}: not open_clip's of {name!r}; its tags are: {', '.join(tags) or 'none'}")
    told = [tag, settings.get("pretrained"), content.get("pretrained")]
    return {"model_name": known, "pretrained": next((one for one in told if one in tags), None)}
