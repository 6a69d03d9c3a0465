"""Share the no tower and prompts, or the adapter, alone, with a model card; merge a shared file with its base again."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clipn.deploy.model_card import model_card, run_facts
from clipn.model.checkpoint import base_weights, no_weights, read_checkpoint, write_checkpoint, write_safetensors
from clipn.model.hashing import base_hash, weights_hash
from clipn.model.weights import WEIGHTS, find_weights, open_model
from clipn.runtime.files import atomic_write

_CARD = "README.md"


@dataclass(frozen=True)
class ShareOptions:
    """What a checkpoint may not state, and the precision of the file."""

    model_name: str | None = None  # open_clip's name of the base
    tag: str | None = None  # open_clip's tag of the base
    license: str | None = None
    data: str | None = None  # the training data in words
    repo: str | None = None  # user/repo on the hub
    dtype: str = "float32"  # or float16, which halves the file and rounds the weights


def share_weights(source: str | Path, folder: str | Path, options: ShareOptions = ShareOptions()) -> dict[str, Any]:
    """Write clipn.safetensors and its model card into a folder; returns the metadata in the file's header.

    source: a run folder or a CLIPN checkpoint.

    Raises ValueError for weights that are not CLIPN's, are shared already, or do not fit float16, and for a folder
    with a README.md that is not a model card.
    """
    folder = Path(folder)
    if (folder / _CARD).exists() and not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: has a {_CARD} that is not a model card; choose another folder")
    file = find_weights(source)
    if file is None:
        raise FileNotFoundError(f"{source}: no such checkpoint or run")
    content = read_checkpoint(file)
    state = content["state_dict"]
    if not no_weights(state) or not base_weights(state):
        kind = "the no tower alone" if no_weights(state) else "a plain CLIP without a no tower"
        raise ValueError(f"{file}: holds {kind}; expected a whole CLIPN checkpoint")
    model = open_model(file, options.model_name)
    shared = _cast(no_weights(model.published_state()), options.dtype, file)
    facts = _base_names(content, options) | {
        "base_sha256": base_hash(model.published_state()),
        "architecture": model.architecture,
        "preprocess": dict(model.preprocess) if content.get("preprocess") else None,
        "no_tower": model.no_tower,
        "num_prompts": model.num_prompts,
        "bias": None if model.no_text.bias is None else float(model.no_text.bias.detach()),
        "parameters": sum(value.numel() for value in shared.values()),
        "dtype": options.dtype,
        "license": options.license,
        "data": options.data,
    }
    facts |= run_facts(content, file, weights_hash(model))
    write_safetensors(shared, facts, folder / WEIGHTS)
    with atomic_write(folder / _CARD) as card:
        card.write(model_card(facts, options.repo).encode())
    return facts


def run_share(source: str, out: str, **stated: str | None) -> None:
    """`clipn export share`: share a run or a checkpoint, and print how to upload it."""
    options = ShareOptions(**stated)
    facts = share_weights(source, out, options)
    size = (Path(out) / WEIGHTS).stat().st_size / 1e6
    if not options.license:
        print("no --license: the card says that the license is not stated")
    if not facts["pretrained"]:
        print("the base is not an open_clip tag: also share its checkpoint, which is needed to load this file")
    print(f"upload it to the hub with: {shlex.join(['hf', 'upload', options.repo or 'USER/REPO', out, '.'])}")
    print(f"done: {out}/{WEIGHTS} ({size:.1f} MB) and its model card, {_CARD}")


def run_merge(source: str, out: str, base: str | None) -> None:
    """`clipn export merge`: merge a shared file with its base."""
    merge_weights(source, out, base)
    print(f"done: {out}")


def merge_weights(source: str | Path, path: str | Path, base: str | Path | None = None) -> None:
    """Write a shared file and its base as one whole checkpoint.

    source: clipn.safetensors, its folder, or "hf://user/repo"; base: as in `load_model`. Raises as `open_model` does.
    """
    file = find_weights(source)
    if file is None:
        raise FileNotFoundError(f"{source}: no such shared file or folder")
    content = read_checkpoint(file)
    if not no_weights(content["state_dict"]) or base_weights(content["state_dict"]):
        raise ValueError(f"{file}: not a shared file, which holds the no tower alone")
    model = open_model(file, base=base)
    write_checkpoint(content | {"state_dict": model.published_state(), "preprocess": dict(model.preprocess)}, path)


def _cast(state: dict[str, Tensor], dtype: str, source: Path) -> dict[str, Tensor]:
    cast = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state.items()}
    for key, value in cast.items():
        if not value.isfinite().all():
            raise ValueError(f"{source}: {key} is too large for {dtype}; share it as float32")
    return cast


def _base_names(content: dict[str, Any], options: ShareOptions) -> dict[str, str | None]:
    """open_clip's name and tag of the base, each None if it is not open_clip's."""
    settings = (content.get("config") or {}).get("model") or {}
    name = options.model_name or settings.get("name") or content.get("model_name")
    is_open_clip = name in open_clip.list_models() or str(name).startswith("hf-hub:")
    tags = open_clip.list_pretrained_tags_by_model(name) if is_open_clip else []
    if options.tag and options.tag not in tags:
        raise ValueError(f"tag={options.tag!r}: not open_clip's of {name!r}; its tags are: {', '.join(tags) or 'none'}")
    candidates = [options.tag, settings.get("pretrained"), content.get("pretrained")]
    pretrained = next((candidate for candidate in candidates if candidate in tags), None)
    return {"model_name": name if is_open_clip else None, "pretrained": pretrained}
