"""`clipn export`: share the no tower with a model card, or write an ONNX file."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from clipn.data.image_sets import find_images
from clipn.data.images import open_image, val_transform
from clipn.data.prompts import class_names_of, load_templates
from clipn.deploy.onnx import export_onnx
from clipn.deploy.sharing import share_weights
from clipn.model.base import get_tokenizer
from clipn.model.clipn import CLIPN
from clipn.model.head import build_head
from clipn.model.weights import WEIGHTS, open_model

_CHECKED = 64  # images


def run_share(source: str, folder: str, license: str | None = None, repo: str | None = None, **more) -> None:
    """Share a run or a checkpoint in a folder, and print how to upload it. The rest is as in `share_weights`."""
    facts = share_weights(source, folder, license=license, repo=repo, **more)
    size = (Path(folder) / WEIGHTS).stat().st_size / 1e6
    if not license:
        print("no --license was given: the card says that it is not stated")
    if not facts["pretrained"]:
        print("its base is no open_clip tag: share the checkpoint of the base too, it is needed to load this file")
    print(f"to upload it to the hub: {shlex.join(['hf', 'upload', repo or 'USER/REPO', folder, '.'])}")
    print(f"done: {folder}/{WEIGHTS} ({size:.1f} MB) and its model card, README.md")


def run_onnx(
    source: str,
    classes: str,
    path: str,
    templates: str = "simple",
    scale: float = 100.0,
    check: str | None = None,
    model_name: str | None = None,
    base: str | None = None,
) -> None:
    """Write model and class names as ONNX, compared with torch on the photos in `check` or on random pixels."""
    class_names = class_names_of(classes)
    templates = load_templates(templates, "--templates")
    model = open_model(source, model_name, base)
    images = _photos(check, model) if check else None
    head = build_head(model, get_tokenizer(model.architecture), class_names, templates)
    differences = export_onnx(model, head, class_names, path, scale, images)
    on = f"{len(images)} images of {check}" if check else "random pixels"
    print(
        f"onnxruntime and torch on {on}: cosines differ by {differences['cosine']:.1e}, "
        f"scores by {differences['score']:.1e}"
    )
    print(f"done: {path} ({Path(path).stat().st_size / 1e6:.1f} MB, {len(class_names)} classes)")


def _photos(folder: str, model: CLIPN) -> torch.Tensor:
    """[N, 3, H, W] of up to 64 images from all over a folder. Raises FileNotFoundError where there is none."""
    paths = sorted(find_images(Path(folder)))
    if not paths:
        raise FileNotFoundError(f"--check={folder!r}: no such folder, or no image in it")
    transform = val_transform(model.preprocess)
    step = -(-len(paths) // _CHECKED)
    return torch.stack([transform(open_image(path)) for path in paths[::step]])
