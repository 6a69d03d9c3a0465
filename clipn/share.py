"""Weights from and for others: files, runs' folders and the hub; a shared file holds the no tower and prompts alone."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from .checkpoint import base_hash, base_weights, is_clipn, no_weights, read_checkpoint, write_checkpoint, write_shared
from .files import whole_file
from .model import CLIPN, create_model_and_transforms, load_model
from .model_card import model_card, run_facts
from .run_folder import last_checkpoint

WEIGHTS = "clipn.safetensors"
HUB = "hf://"
DTYPES = {"float32": torch.float32, "float16": torch.float16}

log = logging.getLogger(__name__)


def open_model(
    source: str | Path,
    model_name: str | None = None,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    num_prompts: int = 16,
) -> CLIPN:
    """The model behind any name of weights, in evaluation mode.

    source: a checkpoint file, a run's folder (its last checkpoint), a folder that scripts/export.py shared,
        "hf://user/repo" or "hf://user/repo@revision", or, with `model_name`, an open_clip tag.
    model_name: an open_clip name or a JSON model config, for a file that does not say its architecture, and for a tag.
    base: for a shared file, as in `load_model`.
    num_prompts: for a tag or a plain CLIP, whose no tower is then an untrained copy.

    Raises ValueError or FileNotFoundError, one line, for what is not there or does not fit; OSError for a download
    that fails. Nothing is fetched but what "hf://" or a tag asks for, and a Hugging Face tokenizer or text tower that
    the model's config names.
    """
    file = find_weights(source)
    if file is None:
        if model_name is None:
            raise FileNotFoundError(
                f"{str(source)!r}: no such file or folder; expected a checkpoint, a run's or a shared folder, "
                f"{HUB}user/repo, or an open_clip tag together with its model_name"
            )
        model = create_model_and_transforms(model_name, str(source), num_prompts, device)[0]
        _warn_of_copy(source)
        return model
    content = read_checkpoint(file)
    architecture = content.get("architecture") or model_name
    if not architecture:
        raise ValueError(f"{file}: does not say its architecture; give model_name, open_clip's name or a JSON file")
    if base and base_weights(content["state_dict"]):
        raise ValueError(f"base={str(base)!r}: {file} holds a base of its own; leave base out")
    model = load_model(content, str(file), architecture, num_prompts, base)
    if not is_clipn(content["state_dict"]):
        _warn_of_copy(file)
    if not content.get("preprocess") and base_weights(content["state_dict"]):
        log.warning("%s does not say its images' statistics: CLIP's are used", file)
    return model.to(device).eval()


def find_weights(source: str | Path) -> Path | None:
    """The checkpoint file behind a name of weights, fetched if it is on the hub; None if there is nothing.

    Raises FileNotFoundError for a folder without weights; ValueError for other URLs and bad names; OSError for a
    download that fails.
    """
    if str(source).startswith(HUB):
        return _fetch(str(source))
    if "://" in str(source):
        raise ValueError(f"{source}: not fetched; download it and give its path, or give {HUB}user/repo")
    path = Path(source)
    if not path.is_dir():
        return path if path.is_file() else None
    for file in (last_checkpoint(path), path / WEIGHTS):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path}: neither a run's folder (no checkpoints/last.pt) nor a shared one (no {WEIGHTS})")


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
    with whole_file(Path(folder) / "README.md") as card:
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


def _fetch(name: str) -> Path:
    """The shared file of hf://user/repo or hf://user/repo@revision."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name.removeprefix(HUB))
    if not found:
        raise ValueError(f"{name!r}: expected {HUB}user/repo or {HUB}user/repo@revision")
    from huggingface_hub import errors, hf_hub_download

    reasons = {  # the narrower kinds first
        errors.HFValidationError: "no possible name of a repository",
        errors.GatedRepoError: "its owner must let you in: ask on its page, then log in with `hf auth login`",
        errors.RepositoryNotFoundError: "no such repository; or it is private: log in with `hf auth login`",
        errors.RevisionNotFoundError: "no such revision",
        errors.LocalEntryNotFoundError: "the hub cannot be reached, and the file was not fetched before",
        errors.EntryNotFoundError: f"holds no {WEIGHTS}",
    }
    try:
        return Path(hf_hub_download(found[1], WEIGHTS, revision=found[2]))
    except Exception as error:  # downloads fail in every way
        known = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), None)
        reason = known or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise (ValueError if isinstance(error, errors.HFValidationError) else OSError)(f"{name}: {reason}") from error


def _warn_of_copy(source: str | Path) -> None:
    log.warning("%s is a plain CLIP: its no tower is an untrained copy, so CTW and ATD tell nothing", source)


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
