"""Weights by any name: a checkpoint file, a run folder, a shared folder, the hub or an open_clip tag."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from clipn.model.checkpoint import base_weights, is_clipn, last_checkpoint, read_checkpoint
from clipn.model.clipn import CLIPN, create_model_and_transforms, load_model

WEIGHTS = "clipn.safetensors"
log = logging.getLogger(__name__)

HUB = "hf://"


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
