"""The `clipn` command: one subcommand for each user task. It parses the command line and calls one function."""

import argparse
import os
import pkgutil
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipn import __version__
from clipn.runtime.signals import RESUME, STOPPED, install_signal_handlers, stop_line

# A subcommand imports its modules, and with them PyTorch, when it runs: --help answers at once. It calls the function
# that its `run` names, with the options as keyword arguments.

_ABOUT = """\
CLIPN: teach CLIP to say "no". For any image it says which of your classes it shows, or that it shows none of them.

  clipn train                                     train on the built-in world, about three minutes
  clipn demo                                      try the result in the browser
  clipn predict IMAGES --classes names.txt --checkpoint runs/toy
"""
_EXIT_CODES = """\
exit codes: 0 done; 1 an error, explained in one line; 2 wrong usage; 75 stopped on request, the same command resumes;
130 predict, demo, prepare, classes or export was stopped
"""
_GPUS = """
Uses every visible GPU of this machine; NPROC=N asks for N processes. torchrun's own variables (PET_NNODES,
PET_RDZV_ENDPOINT, ...) join several machines.
"""
_CONFIG = "a YAML file or the name of a shipped config"
_MODEL = "a checkpoint, a run folder, a shared folder, a saved detector or hf://user/repo"
_TEMPLATES = "simple (default), openai, clipn-release, a text with {}, or a text file"
_OPTIONS: dict[str, dict[str, Any]] = {  # of several subcommands
    "--classes": {"metavar": "FILE|NAMES", "help": "a file with one name per line, or cat,dog,...; or imagenet"},
    "--model-name": {"metavar": "NAME", "help": "open_clip name, for a checkpoint without one"},
    "--base": {"metavar": "CLIP", "help": "a tag or file, for a checkpoint that holds the no tower alone"},
    "--templates": {"metavar": "SET", "help": _TEMPLATES},
}
_OVERRIDES = {"nargs": "*", "metavar": "key=value"}
_EVALUATIONS = {  # by name: what it does, and an example
    "eval": ("evaluate checkpoints on image sets", "eval_imagenet data.root=/data eval.checkpoints=epoch_10.pt"),
    "adversarial": (
        "move OOD images towards ID training images, and evaluate on them",
        "eval_cifar100 eval.train=train eval.checkpoints=epoch_10.pt adversarial.smoothness=100",
    ),
    "correlation": (
        "relate ID accuracy of 20-NN to OOD AUROC of 1-NN over base CLIPs",
        "eval_cifar100 eval.checkpoints='bases/*.pt' eval.train=train",
    ),
}
_RAW = argparse.RawDescriptionHelpFormatter

Commands = argparse._SubParsersAction


def main(argv: list[str] | None = None) -> None:
    """Run the command. An error that the user can fix is one line and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    options = vars(_parser().parse_args(argv))
    run, all_gpus, stopped_code = (options.pop(name) for name in ("run", "all_gpus", "stopped_code"))
    os.environ.setdefault("CLIPN_COMMAND", _typed(argv))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a busy machine several times slower
    install_signal_handlers()
    try:
        from clipn.runtime.console import fail_in_one_line, start_log
    except KeyboardInterrupt:
        print(stop_line(stopped_code), file=sys.stderr)
        sys.exit(stopped_code)
    start_log(None)

    def run_here_or_launch() -> None:
        if all_gpus:
            from clipn.runtime.launch import launch_on_all_gpus

            launch_on_all_gpus(argv)
        (pkgutil.resolve_name(run) if isinstance(run, str) else run)(**options)

    fail_in_one_line(run_here_or_launch, stopped_code)


def _typed(argv: list[str]) -> str:
    """The shell command that repeats this one. run.sh gives its own path in CLIPN_PROGRAM."""
    script = Path(sys.argv[0])
    if os.environ.get("CLIPN_PROGRAM"):
        command = ["sh", os.environ["CLIPN_PROGRAM"], *argv[1:]]
    elif script.suffix == ".py" and script.name != "__main__.py":
        command = ["python", *sys.argv]
    else:
        command = ["clipn", *argv]
    processes = os.environ.get("NPROC")
    return f"NPROC={shlex.quote(processes)} {shlex.join(command)}" if processes else shlex.join(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("clipn", description=_ABOUT, epilog=_EXIT_CODES, formatter_class=_RAW)
    parser.add_argument("--version", action="version", version=f"clipn-ood {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_predict, _add_demo, _add_runs_of_a_config, _add_prepare, _add_classes, _add_export):
        add(commands)
    return parser


def _add(
    commands: Commands, name: str, run: str | Callable[..., None], about: str, example: str = "", all_gpus: bool = False
) -> argparse.ArgumentParser:
    description, epilog = f"{about[0].upper()}{about[1:]}.", example + _GPUS * all_gpus
    parser = commands.add_parser(name, help=about, description=description, epilog=epilog, formatter_class=_RAW)
    parser.set_defaults(run=run, all_gpus=all_gpus, stopped_code=RESUME if all_gpus else STOPPED)
    return parser


# --- with a trained model ---


def _add_predict(commands: Commands) -> None:
    example = """\
examples:
  clipn predict photos/ --classes cat,dog,horse --checkpoint epoch_10.pt --model-name ViT-B-16
  clipn predict photos/ --classes names.txt --checkpoint runs/toy --csv predictions.csv --move-ood none_of_them/
  clipn predict photos/ --classes cat,dog --checkpoint runs/toy --method kNN --fit known/ --save my_detector
"""
    about = "classify each image of a folder as one of the classes or none of them"
    parser = _add(commands, "predict", _predict, about, example)
    parser.add_argument("images", nargs="+", metavar="FOLDER", help="a folder with all its subfolders, or an image")
    _add_detector_options(parser, required=True)
    fit_help = "images of the classes, in class folders or not, that --method kNN, PLP-RMD, ... learns from"
    parser.add_argument("--fit", metavar="DIR", help=fit_help)
    filter_help = "CTW or ATD: leave out images of --fit that this decision of CLIPN calls OOD"
    parser.add_argument("--train-filter", metavar="SCORE", help=filter_help)
    calibrate_help = "images of the classes that set a threshold (default: every tenth of --fit, held out)"
    parser.add_argument("--calibrate", metavar="DIR", help=calibrate_help)
    keep_help = "of these, to stay at or above the threshold (default: 0.95)"
    parser.add_argument("--keep", type=float, metavar="SHARE", help=keep_help)
    save_help = "save the fitted and calibrated detector; then --checkpoint DIR needs neither --classes nor images"
    parser.add_argument("--save", metavar="DIR", help=save_help)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    csv_help = "write one row per image; of older rows, only those of moved images stay"
    parser.add_argument("--csv", dest="csv_file", metavar="FILE", help=csv_help)
    ood_help = "move the images of none of the classes to this folder"
    parser.add_argument("--move-ood", dest="ood_folder", metavar="DIR", help=ood_help)


def _add_demo(commands: Commands) -> None:
    example = "Without --checkpoint it shows the built-in run, runs/toy. No image leaves this machine.\n"
    parser = _add(commands, "demo", _demo, "open a web page to try a model", example)
    _add_detector_options(parser, required=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="N", help="(default: 7860, or the next free one)")
    parser.add_argument("--open", dest="open_browser", action="store_true", help="open the browser")


def _add_detector_options(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--classes", **_OPTIONS["--classes"])
    parser.add_argument("--checkpoint", required=required, metavar="C", help=_MODEL)
    for name in ("--model-name", "--base", "--templates"):
        parser.add_argument(name, **_OPTIONS[name])
    parser.add_argument("--method", metavar="SCORE", help="the score: ATD (default), CTW, MCM, ...")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")


def _predict(images: list[str], keep: float | None, classes: str | None, **options: Any) -> None:
    from PIL import Image

    from clipn.data.prompts import class_names_of
    from clipn.deploy.detector import Detector
    from clipn.deploy.folders import Training, predict_folders

    folders = {name: options.pop(name) for name in ("fit", "calibrate", "save", "train_filter")}
    if folders["train_filter"] and not folders["fit"]:
        raise ValueError(f"--train-filter={folders['train_filter']}: filters the images of --fit, which is missing")
    if keep is not None and not folders["calibrate"] and not folders["fit"]:
        raise ValueError(f"--keep={keep}: sets how strict --calibrate or --fit is; both are missing")
    training = Training(**folders, keep=0.95 if keep is None else keep)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an image that is too large is an error row
    writing = {name: options.pop(name) for name in ("csv_file", "ood_folder", "batch_size")}
    detector = Detector.from_pretrained(options.pop("checkpoint"), classes and class_names_of(classes), **options)
    predict_folders(detector, images, training=training, **writing)


def _demo(classes: str | None, **options: Any) -> None:
    from clipn.data.prompts import class_names_of
    from clipn.demo.app import run_demo

    run_demo(class_names=class_names_of(classes) if classes else None, **options)


def _add_export(commands: Commands) -> None:
    example = """\
examples:
  clipn export share runs/toy --out shared --license mit
  clipn export merge shared --base runs/toy/base/checkpoints/last.pt --out whole.pt
  clipn export onnx runs/toy --classes names.txt --out toy.onnx
"""
    parser = _add(commands, "export", lambda: None, "share weights, or write ONNX", example)
    kinds = parser.add_subparsers(title="formats", metavar="FORMAT", required=True)
    about = "write the no tower alone with a model card, ready for the hub"
    share = _add(kinds, "share", "clipn.deploy.sharing:run_share", about)
    share.add_argument("source", help="a run folder or a checkpoint; the results of a run go into the card")
    share.add_argument("--out", required=True, metavar="FOLDER")
    share.add_argument("--license", metavar="NAME", help="of these weights, by the hub's name: mit, apache-2.0, ...")
    share.add_argument("--data", metavar="TEXT", help='the training data, for the card, such as "CC3M"')
    share.add_argument("--repo", metavar="USER/REPO", help="its name on the hub, for the card")
    share.add_argument("--model-name", **_OPTIONS["--model-name"])
    share.add_argument("--tag", help="open_clip tag of the base, for a checkpoint without one")
    share.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="float16 halves the file")
    about = "write a shared file and its base as one whole checkpoint"
    merge = _add(kinds, "merge", "clipn.deploy.sharing:run_merge", about)
    merge.add_argument("source", help="a shared file, its folder or hf://user/repo")
    merge.add_argument("--base", metavar="CLIP", help="a tag or a checkpoint (default: the tag that the file names)")
    merge.add_argument("--out", required=True, metavar="FILE.pt")
    about = "write image tower and class names as ONNX, checked against torch"
    onnx = _add(kinds, "onnx", "clipn.deploy.onnx:run_onnx", about)
    onnx.add_argument("source", help=_MODEL)
    onnx.add_argument("--classes", required=True, **_OPTIONS["--classes"])
    onnx.add_argument("--out", required=True, metavar="FILE.onnx")
    for name in ("--model-name", "--base", "--templates"):
        onnx.add_argument(name, **_OPTIONS[name])
    onnx.add_argument("--scale", type=float, default=100.0, help="of the cosines (default: 100)")
    onnx.add_argument("--check", metavar="FOLDER", help="photos for the check (default: random pixels)")


# --- runs of a config, on all GPUs ---


def _add_runs_of_a_config(commands: Commands) -> None:
    example = """\
examples:
  clipn train                                                       the built-in world
  clipn train cc3m_vit_b16 data.shards='/data/cc3m/{00000..00331}.tar'
"""
    about = "train as a config says, and evaluate if it names image sets"
    train = _add(commands, "train", _train, about, example, all_gpus=True)
    words_help = f"{_CONFIG} (default: toy), then settings such as train.lr=1e-4"
    train.add_argument("words", nargs="*", metavar="CONFIG | key=value", help=words_help)

    for name, (about, example) in _EVALUATIONS.items():
        example, run = f"example:\n  clipn {name} --config {example}\n", f"clipn.pipeline:run_{name}"
        evaluation = _add(commands, name, run, about, example, all_gpus=True)
        evaluation.add_argument("--config", dest="path", required=True, help=_CONFIG)
        evaluation.add_argument("overrides", **_OVERRIDES, help=f"settings such as {example.split()[-1]}")

    about = "encode training pairs once, for data.source=features"
    features = _add(commands, "features", "clipn.pipeline:run_extraction", about, all_gpus=True)
    features.add_argument("path", metavar="CONFIG", help=_CONFIG)
    features.add_argument("overrides", **_OVERRIDES, help="settings such as features.dir=/data/features")

    example = """\
examples:
  clipn ablate toy train.tso_kind=l2,cosine model.num_prompts=1,4,16
  clipn ablate toy loss run.seeds=[0,1,2]

A key with several values varies; a key with one value is the same for all (brackets hold commas together). A NAME is an
ablation of the paper: prompts, loss, tso, ... Each combination is a run in run.dir/ablations.
"""
    about = "train and evaluate every combination of settings"
    ablate = _add(commands, "ablate", "clipn.ablation:run_ablation", about, example, all_gpus=True)
    ablate.add_argument("path", metavar="CONFIG", help=f"{_CONFIG} with an eval.id, such as toy")
    ablate.add_argument("words", nargs="+", metavar="key=v1,v2 | NAME", help="settings that vary, and common ones")


def _train(words: list[str]) -> None:
    from clipn.pipeline import run_training

    has_config = words and ("=" not in words[0] or Path(words[0]).is_file())
    run_training(words[0] if has_config else "toy", words[1:] if has_config else words)


# --- data ---


def _add_prepare(commands: Commands) -> None:
    example = """\
examples:
  clipn prepare --list                                     every set: its tree, size, source and terms
  clipn prepare imagenet inaturalist sun places textures --root /data
  clipn prepare photos                                     30 000 small captioned photos, for configs/photos.yaml

Archives are kept in DIR/downloads. Some sets need a login: the command names the file to put there. For ImageNet, also
put ILSVRC2012_devkit_t12.tar.gz there, or give --mapping, so that its images are sorted into class folders.
"""
    about = "download, unpack and check the benchmark image sets"
    parser = _add(commands, "prepare", "clipn.data.prepare:run_prepare", about, example)
    parser.add_argument("names", nargs="*", metavar="NAME", help="image sets, such as imagenet or textures")
    parser.add_argument("--root", default="data", metavar="DIR", help="data.root of the configs (default: data)")
    parser.add_argument("--mapping", metavar="FILE", help="for ImageNet: lines with an image name and its class")
    parser.add_argument(
        "--from", dest="source", metavar="DIR", help="for photos: a folder that has their files already"
    )
    parser.add_argument("--list", dest="only_list", action="store_true", help="describe these sets, or all, and stop")


def _add_classes(commands: Commands) -> None:
    about = "choose ID classes by the accuracy of a base CLIP on held-out pairs"
    parser = _add(commands, "classes", "clipn.evaluation.choose_classes:run_choice", about)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint of a training run")
    parser.add_argument("--pairs", required=True, help="held-out shards")
    parser.add_argument("--classes", required=True, metavar="DIR", help="a folder of class folders")
    parser.add_argument("--templates", default="simple", metavar="SET", help=_TEMPLATES)
    parser.add_argument("--number", type=int, default=20, metavar="N", help="classes to choose (default: 20)")
