"""Share a trained CLIPN, take a shared one back, or make an ONNX file of it.

    python scripts/export.py share runs/toy --out shared --license mit
    python scripts/export.py back shared --base runs/toy/base/checkpoints/last.pt --out whole.pt
    python scripts/export.py onnx runs/toy --classes names.txt --out toy.onnx

What is shared is the no tower and its prompts alone, with a model card: who loads it fetches the base CLIP from where
that one lives, and is told if it is another.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.base import get_tokenizer
from clipn.command import fail_in_one_line, start_log
from clipn.head import build_head
from clipn.image_sets import find_images
from clipn.images import open_image, val_transform
from clipn.interrupt import STOPPED
from clipn.model import CLIPN
from clipn.onnx_export import export_onnx
from clipn.prompts import class_names_of, load_templates
from clipn.share import DTYPES, WEIGHTS, open_model, restore_weights, share_weights

_CHECKED = 64  # images

_SOURCE = "a checkpoint, a run's folder, a shared folder or hf://user/repo"


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text. Raises what `clipn.share` and `clipn.onnx_export` raise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_share(commands)
    _add_back(commands)
    _add_onnx(commands)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _add_share(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("share", help=f"write {WEIGHTS} and its model card, ready for the hub")
    parser.set_defaults(run=_share)
    parser.add_argument("source", help="a run's folder or a checkpoint; a run's results go into the card")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--license", metavar="NAME", help="of these weights, as the hub calls it: mit, apache-2.0, ...")
    parser.add_argument("--data", metavar="TEXT", help='what it was trained on, for the card, such as "CC3M"')
    parser.add_argument("--repo", metavar="USER/REPO", help="where it will be on the hub, for the card")
    parser.add_argument("--model-name", metavar="NAME", help="open_clip's, for a checkpoint that does not say its own")
    parser.add_argument("--tag", help="open_clip's tag of the base, for a checkpoint that does not say it")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="float16 halves the file and rounds")


def _add_back(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("back", help="write a shared file and its base as one whole checkpoint")
    parser.set_defaults(run=_back)
    parser.add_argument("source", help=f"{WEIGHTS}, its folder or hf://user/repo")
    parser.add_argument("--base", metavar="CLIP", help="a tag or a checkpoint; default: the tag that the file names")
    parser.add_argument("--out", required=True, metavar="FILE.pt")


def _add_onnx(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("onnx", help="write image tower and class names as ONNX, checked against torch")
    parser.set_defaults(run=_onnx)
    parser.add_argument("source", help=_SOURCE)
    parser.add_argument(
        "--classes", required=True, metavar="FILE|NAMES", help="a file with a name a line, or cat,dog,...; or imagenet"
    )
    parser.add_argument("--out", required=True, metavar="FILE.onnx")
    parser.add_argument("--templates", default="simple", help="simple (default), openai, clipn-release, or a text file")
    parser.add_argument("--scale", type=float, default=100.0, help="of the cosines (default: 100)")
    parser.add_argument("--check", metavar="FOLDER", help="photos to check it with; default: random pixels")
    parser.add_argument("--model-name", metavar="NAME", help="open_clip's, for a checkpoint that does not say its own")
    parser.add_argument("--base", metavar="CLIP", help="a tag or file, where the source holds the no tower alone")


def _share(arguments: argparse.Namespace) -> None:
    given = arguments.model_name, arguments.tag, arguments.license, arguments.data, arguments.repo, arguments.dtype
    facts = share_weights(arguments.source, arguments.out, *given)
    size = (Path(arguments.out) / WEIGHTS).stat().st_size / 1e6
    if not arguments.license:
        print("no --license was given: the card says that it is not stated")
    if not facts["pretrained"]:
        print("its base is no tag of open_clip: share the base's checkpoint too, without it nobody can use this")
    upload = shlex.join(["hf", "upload", arguments.repo or "USER/REPO", str(arguments.out), "."])
    print(f"to put it on the hub: {upload}")
    print(f"done: {arguments.out}/{WEIGHTS} ({size:.1f} MB) and its model card, README.md")


def _back(arguments: argparse.Namespace) -> None:
    restore_weights(arguments.source, arguments.out, arguments.base)
    print(f"done: {arguments.out}")


def _onnx(arguments: argparse.Namespace) -> None:
    class_names = class_names_of(arguments.classes)
    templates = load_templates(arguments.templates, "--templates")
    model = open_model(arguments.source, arguments.model_name, arguments.base)
    images = _photos(arguments.check, model) if arguments.check else None
    head = build_head(model, get_tokenizer(model.architecture), class_names, templates)
    found = export_onnx(model, head, class_names, arguments.out, arguments.scale, images)
    on = f"{len(images)} images of {arguments.check}" if arguments.check else "random pixels"
    print(f"onnxruntime and torch on {on}: cosines differ by {found['cosine']:.1e}, scores by {found['score']:.1e}")
    print(f"done: {arguments.out} ({Path(arguments.out).stat().st_size / 1e6:.1f} MB, {len(class_names)} classes)")


def _photos(folder: str, model: CLIPN) -> torch.Tensor:
    """[N, 3, H, W] of up to 64 images from all over a folder. Raises FileNotFoundError where there is none."""
    paths = sorted(find_images(Path(folder)))
    if not paths:
        raise FileNotFoundError(f"--check={folder!r}: no such folder, or no image in it")
    transform = val_transform(model.preprocess)
    step = -(-len(paths) // _CHECKED)
    return torch.stack([transform(open_image(path)) for path in paths[::step]])


if __name__ == "__main__":
    start_log(None)
    fail_in_one_line(main, STOPPED)
