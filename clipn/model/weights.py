"""Open a model by any name of weights: checkpoint file, run folder, shared folder, hub repository, open_clip tag."""

import logging
import re
from pathlib import Path

import torch

from clipn.config.schema import ModelConfig
from clipn.model.base import find_architecture
from clipn.model.checkpoint import base_weights, last_checkpoint, no_weights, read_checkpoint
from clipn.model.clipn import CLIPN, create_model_and_transforms, load_model

WEIGHTS = "clipn.safetensors"  # the weights in a shared folder or a hub repository
HUB = "hf://"

log = logging.getLogger(__name__)


def open_model(
    source: str | Path,
    model_name: str | None = None,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    num_prompts: int = 16,
) -> CLIPN:
    """Build the model behind any name of weights, in evaluation mode.

    source: a checkpoint file, a run folder (its last checkpoint), a shared folder (`clipn export share`),
        "hf://user/repo" or "hf://user/repo@revision", or, with `model_name`, an open_clip tag.
    model_name: an open_clip name or a JSON model config, for a tag and for a file without its architecture; another
        architecture than the file's is ignored with a warning.
    base: for a shared file, as in `load_model`.
    num_prompts: for a tag or a plain CLIP, whose no tower is then an untrained copy.

    Downloads only what "hf://", a tag, or the model config's Hugging Face tokenizer or text tower names.
    Raises ValueError or FileNotFoundError for what does not exist or does not fit; OSError for a failed download.
    """
    file = find_weights(source)
    state = {}
    if file is None:
        if model_name is None:
            raise FileNotFoundError(
                f"{str(source)!r}: no such file or folder; expected a checkpoint, a run folder, a shared folder, "
                f"{HUB}user/repo, or an open_clip tag together with its model_name"
            )
        model = create_model_and_transforms(model_name, str(source), num_prompts)[0]
    else:
        content = read_checkpoint(file)
        state, architecture = content["state_dict"], content.get("architecture") or model_name
        if not architecture:
            raise ValueError(f"{file}: does not say its architecture; give model_name, open_clip's name or a JSON file")
        if model_name and content.get("architecture"):
            named = find_architecture(model_name)
            if architecture not in (named, named | {"quick_gelu": True}):  # weights of a tag may require QuickGELU
                message = "%s: model_name=%r is ignored: the file describes another architecture, which is used"
                log.warning(message, file, str(model_name))
        if base and base_weights(state):
            raise ValueError(f"base={str(base)!r}: {file} holds a base of its own; leave base out")
        model = load_model(content, str(file), architecture, ModelConfig(num_prompts=num_prompts), base)
        if base_weights(state) and not content.get("preprocess"):
            log.warning("%s does not say its images' statistics: CLIP's are used", file)
    if not no_weights(state):
        log.warning(
            "%s is a plain CLIP: its no tower is an untrained copy, so CTW and ATD are meaningless", file or source
        )
    return model.to(device).eval()


def find_weights(source: str | Path) -> Path | None:
    """The checkpoint file behind a name of weights, downloaded if it is on the hub; None if nothing has this name.

    Raises FileNotFoundError for a folder without weights, ValueError for other URLs and invalid names, OSError for a
    failed download.
    """
    if str(source).startswith(HUB):
        return _download(str(source))
    if "://" in str(source):
        raise ValueError(f"{source}: URLs are not fetched; download it and give its path, or give {HUB}user/repo")
    path = Path(source)
    if not path.is_dir():
        return path if path.is_file() else None
    for file in (last_checkpoint(path), path / WEIGHTS):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path}: neither a run's folder (no checkpoints/last.pt) nor a shared one (no {WEIGHTS})")


def _download(name: str) -> Path:
    """The shared file of hf://user/repo or hf://user/repo@revision."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name.removeprefix(HUB))
    if not match:
        raise ValueError(f"{name!r}: expected {HUB}user/repo or {HUB}user/repo@revision")
    from huggingface_hub import errors, hf_hub_download

    reasons = {  # subclasses before their base classes
        errors.HFValidationError: "not a valid repository name",
        errors.GatedRepoError: "access must be granted: request it on the repository's page, then run `hf auth login`",
        errors.RepositoryNotFoundError: "no such repository, or it is private: run `hf auth login`",
        errors.RevisionNotFoundError: "no such revision",
        errors.LocalEntryNotFoundError: "the hub cannot be reached, and the file is not in the local cache",
        errors.EntryNotFoundError: f"holds no {WEIGHTS}",
    }
    try:
        return Path(hf_hub_download(match[1], WEIGHTS, revision=match[2]))
    except Exception as error:  # downloads raise many kinds of exceptions
        reason = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), None)
        reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise (ValueError if isinstance(error, errors.HFValidationError) else OSError)(f"{name}: {reason}") from error
