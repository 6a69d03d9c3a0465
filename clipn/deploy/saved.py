"""The folder of a saved Detector: its weights, its settings, and what it learned from training images."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from clipn.config.evaluation import ProbeConfig, TagoodConfig
from clipn.methods.registry import MethodInputs, save_fits
from clipn.methods.tokens import open_tokens
from clipn.model.checkpoint import write_safetensors
from clipn.model.clipn import CLIPN
from clipn.model.hashing import weights_hash
from clipn.model.weights import WEIGHTS
from clipn.runtime.files import atomic_write

SETTINGS = "detector.json"
_TRAINING = "training.safetensors"  # features [M, D], tower [M, W], labels [M] and tokens of the training images
_FOLDERS = {"probe_folder": "probes", "tagood_folder": "tagood"}
_FORMAT = 2  # 1 had the threshold of a probability where 2 has that of its log odds
_TYPES = {"class_names": list, "templates": list, "method": str, "scale": float, "threshold": (float, type(None))}
_TYPES |= {"fitted": bool, "image_tower": str, "model": str, "tagger": (str, type(None)), "probe": dict, "tagood": dict}


def write_detector(folder: str | Path, inputs: MethodInputs, settings: dict[str, Any]) -> None:
    """Write model, training images and probes of a Detector, and its `settings`, into a folder.

    Raises ValueError for a folder that holds something else.
    """
    folder = Path(folder)
    check_folder(folder)
    staging, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{name}") for name in ("partial", "old"))
    try:
        staging.mkdir(parents=True)
        _write(staging, inputs, settings)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, inputs: MethodInputs, settings: dict[str, Any]) -> None:
    model = inputs.model
    facts = {"architecture": model.architecture, "preprocess": dict(model.preprocess)}
    write_safetensors(model.published_state(), facts, folder / WEIGHTS)
    if inputs.train is not None:
        columns = {"features": inputs.train, "tower": inputs.train_tower, "labels": inputs.labels}
        if inputs.tokens:
            selected = inputs.tokens.selected
            columns |= {"tokens": selected.values[:], "count": selected.counts}
            columns |= {"image": inputs.tokens.image[:], "tagged": inputs.tokens.tagged}
        with atomic_write(folder / _TRAINING) as file:
            file.write(save({name: value.cpu().contiguous() for name, value in columns.items() if value is not None}))
        save_fits(inputs, *(folder / name for name in _FOLDERS.values()))
    settings = settings | {"format": _FORMAT, "fitted": inputs.train is not None, "image_tower": _tower_hash(model)}
    settings |= {"probe": vars(inputs.probe), "tagood": vars(inputs.tagood), "model": weights_hash(model)}
    settings |= {"tagger": _hash(inputs.tagger.identity) if inputs.tokens else None}
    with atomic_write(folder / SETTINGS) as file:
        file.write(json.dumps(settings, indent=2).encode())


def check_folder(folder: str | Path) -> None:
    """Raise ValueError for a folder that holds something else than a saved Detector."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / SETTINGS).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder}: holds something else than a saved detector; choose another folder")


def is_same_model(settings: dict[str, Any], model: CLIPN) -> bool:
    """Whether a model has the weights that were saved."""
    return settings["model"] == weights_hash(model)


def read_settings(folder: str | Path) -> dict[str, Any] | None:
    """The settings of a saved Detector; None for any other name of weights. Raises ValueError for a damaged file."""
    file = Path(folder) / SETTINGS
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["format"] != _FORMAT:
            raise ValueError(f"format {settings['format']}: this version of clipn reads {_FORMAT}")
        for name, kinds in _TYPES.items():
            value = settings[name]
            if not isinstance(value, kinds) or isinstance(value, bool) and kinds is not bool or value != value:
                raise ValueError(f"{name}={value!r}")
        settings["probe"], settings["tagood"] = ProbeConfig(**settings["probe"]), TagoodConfig(**settings["tagood"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the settings of a saved detector: {error}; make and save it again") from error
    return settings


def read_training(folder: str | Path, settings: dict[str, Any], model: CLIPN) -> dict[str, Any]:
    """The fields of MethodInputs that a saved Detector learned from its training images; empty if it was not fitted.

    Raises ValueError for a damaged file, and for a model of another image tower than that which encoded the images.
    """
    if not settings["fitted"]:
        return {}
    own, file = _tower_hash(model), Path(folder) / _TRAINING
    if own != settings.get("image_tower"):
        other = str(settings.get("image_tower"))[:12]
        reason = f"its training images were encoded by another image tower ({other}) than that of {WEIGHTS}"
        raise ValueError(f"{folder}: {reason} ({own[:12]}); fit and save it again")
    try:
        columns = load_file(file)
        features, tower, labels = columns.pop("features"), columns.pop("tower"), columns.pop("labels", None)
        if not len(features) == len(tower) == (len(tower) if labels is None else len(labels)):
            raise ValueError("columns of different lengths")
        learned = {name: settings[name] for name in ("probe", "tagood")}
        learned |= {"tokens": open_tokens([columns], model.logit_scale.device) if columns else None}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not whole ({error}); fit and save the detector again") from error
    learned |= {"train": features, "train_tower": tower.to(model.logit_scale.device), "labels": labels}
    return learned | {name: Path(folder) / subfolder for name, subfolder in _FOLDERS.items()}


def check_tokens(folder: str | Path, settings: dict[str, Any], inputs: MethodInputs) -> None:
    """Raise ValueError where a saved Detector's tokens were chosen by another tagger than the inputs'."""
    if inputs.tokens and _hash(inputs.tagger.identity) != settings["tagger"]:
        reason = "its tokens were chosen by another tagger, of another base, no tower or class names"
        raise ValueError(f"{folder}: {reason}; fit and save it again")


def _tower_hash(model: CLIPN) -> str:
    """The hash of all that features of images depend on."""
    facts = json.dumps([model.architecture, dict(model.preprocess)], sort_keys=True)
    return _hash(f"{weights_hash(model.base.visual)} {facts}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
