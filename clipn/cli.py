"""The `clipn` command: one subcommand for each thing a user runs. It parses words and calls one function."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from clipn import __version__
from clipn.runtime.signals import RESUME, STOPPED, install_signal_handlers

# A subcommand imports what it needs, PyTorch above all, when it runs: --help answers at once.

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
_CLASSES = "a file with one name per line, or cat,dog,...; or imagenet"


def main(argv: list[str] | None = None) -> None:
    """Run the command. An error that the user can fix is one line and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("CLIPN_COMMAND", _typed(argv))
    install_signal_handlers()
    try:
        from clipn.runtime.console import fail_in_one_line, start_log
    except KeyboardInterrupt:
        sys.exit(arguments.stopped_code)
    start_log(None)
    fail_in_one_line(lambda: arguments.run(arguments), arguments.stopped_code)


def _typed(argv: list[str]) -> str:
    """The command line that repeats this one; run.sh gives its own beginning in CLIPN_PROGRAM."""
    program = os.environ.get("CLIPN_PROGRAM")
    if program:
        return f"{program} {shlex.join(argv[1:])}".rstrip()
    if Path(sys.argv[0]).suffix == ".py" and Path(sys.argv[0]).name != "__main__.py":
        return shlex.join(["python", *sys.argv])
    return shlex.join(["clipn", *argv])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clipn", description=_ABOUT, epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"clipn-ood {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_predict, _add_demo, _add_train, _add_eval, _add_features, _add_ablate, _add_prepare):
        add(commands)
    _add_classes(commands)
    _add_export(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, run: Callable, stopped_code: int, about: str, example: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, stopped_code=stopped_code)
    return parser


# --- with a trained model ---


def _add_predict(commands: argparse._SubParsersAction) -> None:
    example = """\
examples:
  clipn predict photos/ --classes cat,dog,horse --checkpoint epoch_10.pt --model-name ViT-B-16
  clipn predict photos/ --classes names.txt --checkpoint runs/toy --csv predictions.csv --move-ood none_of_them/
"""
    about = "classify each image of a folder as one of the classes or none of them"
    parser = _add(commands, "predict", _predict, STOPPED, about, example)
    parser.add_argument("images", nargs="+", metavar="FOLDER", help="a folder with all its subfolders, or an image")
    _add_detector_options(parser, required=True)
    parser.add_argument("--calibrate", metavar="DIR", help="images of the classes, from which a threshold is set")
    about = "of these, to stay at or above the threshold (default: 0.95)"
    parser.add_argument("--keep", type=float, metavar="SHARE", help=about)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    parser.add_argument("--csv", metavar="FILE", help="write one row per image to this file")
    parser.add_argument("--move-ood", metavar="DIR", help="move the images of none of the classes to this folder")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    example = "Without --checkpoint it shows the built-in run, runs/toy. No image leaves this machine.\n"
    parser = _add(commands, "demo", _demo, STOPPED, "open a web page to try a model", example)
    _add_detector_options(parser, required=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="N", help="(default: 7860, or the next free one)")
    parser.add_argument("--open", action="store_true", help="open the browser")


def _add_export(commands: argparse._SubParsersAction) -> None:
    example = """\
examples:
  clipn export share runs/toy --out shared --license mit
  clipn export merge shared --base runs/toy/base/checkpoints/last.pt --out whole.pt
  clipn export onnx runs/toy --classes names.txt --out toy.onnx
"""
    parser = _add(commands, "export", lambda arguments: None, STOPPED, "share weights, or write ONNX", example)
    kinds = parser.add_subparsers(title="what to write", metavar="KIND", required=True)
    share = _add(kinds, "share", _share, STOPPED, "write the no tower alone with a model card, ready for the hub")
    share.add_argument("source", help="a run folder or a checkpoint; the results of a run go into the card")
    share.add_argument("--out", required=True, metavar="FOLDER")
    share.add_argument("--license", metavar="NAME", help="of these weights, by the hub's name: mit, apache-2.0, ...")
    share.add_argument("--data", metavar="TEXT", help='the training data, for the card, such as "CC3M"')
    share.add_argument("--repo", metavar="USER/REPO", help="its name on the hub, for the card")
    share.add_argument("--model-name", metavar="NAME", help="open_clip name, for a checkpoint without one")
    share.add_argument("--tag", help="open_clip tag of the base, for a checkpoint without one")
    share.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="float16 halves the file")
    merge = _add(kinds, "merge", _merge, STOPPED, "write a shared file and its base as one whole checkpoint")
    merge.add_argument("source", help="a shared file, its folder or hf://user/repo")
    merge.add_argument("--base", metavar="CLIP", help="a tag or a checkpoint (default: the tag that the file names)")
    merge.add_argument("--out", required=True, metavar="FILE.pt")
    onnx = _add(kinds, "onnx", _onnx, STOPPED, "write image tower and class names as ONNX, checked against torch")
    onnx.add_argument("source", help="a checkpoint, a run folder, a shared folder or hf://user/repo")
    onnx.add_argument("--classes", required=True, metavar="FILE|NAMES", help=_CLASSES)
    onnx.add_argument("--out", required=True, metavar="FILE.onnx")
    onnx.add_argument("--templates", default="simple", help="simple (default), openai, clipn-release, or a text file")
    onnx.add_argument("--scale", type=float, default=100.0, help="of the cosines (default: 100)")
    onnx.add_argument("--check", metavar="FOLDER", help="photos for the check (default: random pixels)")
    onnx.add_argument("--model-name", metavar="NAME", help="open_clip name, for a checkpoint without one")
    onnx.add_argument("--base", metavar="CLIP", help="a tag or file, where the source holds the no tower alone")


def _add_detector_options(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--classes", required=required, metavar="FILE|NAMES", help=_CLASSES)
    kinds = "a checkpoint, a run folder, a shared folder or hf://user/repo"
    parser.add_argument("--checkpoint", required=required, metavar="C", help=kinds)
    parser.add_argument("--model-name", metavar="NAME", help="open_clip name, for a checkpoint without one")
    parser.add_argument("--base", metavar="CLIP", help="a tag or file, where C holds the no tower alone")
    parser.add_argument("--method", default="ATD", metavar="SCORE", help="the score: ATD (default), CTW, MCM, ...")
    parser.add_argument(
        "--templates", default="simple", metavar="SET", help="simple (default), openai, clipn-release, or a text file"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")


def _detector_options(arguments: argparse.Namespace) -> dict[str, str | None]:
    return {name: getattr(arguments, name) for name in ("model_name", "templates", "method", "device", "base")}


def _predict(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from clipn.data.prompts import class_names_of
    from clipn.deploy.detector import Detector
    from clipn.deploy.folders import predict_pictures

    if arguments.keep is not None and not arguments.calibrate:
        raise ValueError(f"--keep={arguments.keep}: sets how strict --calibrate is; --calibrate is missing")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an image that is too large is an error row
    names = class_names_of(arguments.classes)
    predict_pictures(
        Detector.from_pretrained(arguments.checkpoint, names, **_detector_options(arguments)),
        arguments.images,
        csv_file=arguments.csv,
        ood_folder=arguments.move_ood,
        calibration_folder=arguments.calibrate,
        keep=0.95 if arguments.keep is None else arguments.keep,
        batch_size=arguments.batch_size,
    )


def _demo(arguments: argparse.Namespace) -> None:
    from clipn.data.prompts import class_names_of
    from clipn.demo.app import run_demo

    run_demo(
        arguments.checkpoint,
        class_names_of(arguments.classes) if arguments.classes else None,
        host=arguments.host,
        port=arguments.port,
        open_browser=arguments.open,
        **_detector_options(arguments),
    )


def _share(arguments: argparse.Namespace) -> None:
    from clipn.deploy.export import run_share

    names = ("model_name", "tag", "license", "data", "repo", "dtype")
    run_share(arguments.source, arguments.out, **{name: getattr(arguments, name) for name in names})


def _merge(arguments: argparse.Namespace) -> None:
    from clipn.deploy.sharing import restore_weights

    restore_weights(arguments.source, arguments.out, arguments.base)
    print(f"done: {arguments.out}")


def _onnx(arguments: argparse.Namespace) -> None:
    from clipn.deploy.export import run_onnx

    names = ("templates", "scale", "check", "model_name", "base")
    run_onnx(arguments.source, arguments.classes, arguments.out, **{name: getattr(arguments, name) for name in names})


# --- runs of a config ---


def _add_config(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=_CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings such as {example}")


def _add_train(commands: argparse._SubParsersAction) -> None:
    example = f"""\
examples:
  clipn train                                                       the built-in world
  clipn train cc3m_vit_b16 data.shards='/data/cc3m/{{00000..00331}}.tar'
{_GPUS}"""
    about = "train as a config says, and evaluate if it names image sets"
    parser = _add(commands, "train", _train, RESUME, about, example)
    about = f"{_CONFIG} (default: toy), then settings such as train.lr=1e-4"
    parser.add_argument("words", nargs="*", metavar="CONFIG | key=value", help=about)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    example = f"""\
example:
  clipn eval --config eval_imagenet data.root=/data eval.checkpoints=epoch_10.pt
{_GPUS}"""
    about = "evaluate checkpoints on image sets, as zero_shot_infer.py does"
    parser = _add(commands, "eval", _eval, RESUME, about, example)
    parser.add_argument("--config", required=True, help=_CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.checkpoints=epoch_10.pt")


def _add_features(commands: argparse._SubParsersAction) -> None:
    about = "encode training pairs once, for data.source=features"
    parser = _add(commands, "features", _features, RESUME, about, _GPUS)
    _add_config(parser, "features.dir=/data/features")


def _add_ablate(commands: argparse._SubParsersAction) -> None:
    example = """\
examples:
  clipn ablate toy train.tso_kind=l2,cosine model.num_prompts=1,4,16
  clipn ablate toy loss run.seeds=[0,1,2]

A key with several values varies; a key with one value is the same for all (brackets hold commas together). A NAME is an
ablation of the paper: prompts, loss, tso, ... Each combination is a run in run.dir/ablations.
"""
    about = "train and evaluate every combination of settings"
    parser = _add(commands, "ablate", _ablate, RESUME, about, example)
    parser.add_argument("config", metavar="CONFIG", help=f"{_CONFIG} with an eval.id, such as toy")
    parser.add_argument("words", nargs="+", metavar="key=v1,v2 | NAME", help="what varies")


def _on_all_gpus(run: Callable[[], None], words: list[str]) -> None:
    """Run here for one process; else start torchrun with one process per GPU on `clipn WORDS`."""
    import torch

    from clipn.runtime.launch import launch

    asked = os.environ.get("NPROC") or str(max(1, torch.cuda.device_count()))
    if not asked.isdigit() or int(asked) < 1:
        raise ValueError(f"NPROC={asked!r}: expected a number of processes, 1 or more")
    several_machines = any(os.environ.get(name) for name in ("PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"))
    if "TORCHELASTIC_RUN_ID" in os.environ or int(asked) == 1 and not several_machines:
        run()
        return
    options = [f"--nproc_per_node={asked}", *([] if several_machines else ["--standalone"])]
    sys.exit(launch([*options, "-m", "clipn", *words]))


def _train(arguments: argparse.Namespace) -> None:
    from clipn.pipeline import run_training

    words = arguments.words
    config, overrides = (words[0], words[1:]) if words and "=" not in words[0] else ("toy", words)
    _on_all_gpus(lambda: run_training(config, overrides), ["train", config, *overrides])


def _eval(arguments: argparse.Namespace) -> None:
    from clipn.pipeline import run_evaluation

    config, overrides = arguments.config, arguments.overrides
    _on_all_gpus(lambda: run_evaluation(config, overrides), ["eval", "--config", config, *overrides])


def _features(arguments: argparse.Namespace) -> None:
    from clipn.pipeline import run_extraction

    config, overrides = arguments.config, arguments.overrides
    _on_all_gpus(lambda: run_extraction(config, overrides), ["features", config, *overrides])


def _ablate(arguments: argparse.Namespace) -> None:
    from clipn.ablation import run_ablation

    config, words = arguments.config, arguments.words
    _on_all_gpus(lambda: run_ablation(config, words), ["ablate", config, *words])


# --- data ---


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    example = """\
examples:
  clipn prepare --list                                     every set: its tree, size, source and terms
  clipn prepare imagenet inaturalist sun places textures --root /data

Archives are kept in DIR/downloads. Some sets need a login: the command names the file to put there. For ImageNet, also
put ILSVRC2012_devkit_t12.tar.gz there, or give --mapping, so that its images are sorted into class folders.
"""
    about = "download, unpack and check the benchmark image sets"
    parser = _add(commands, "prepare", _prepare, STOPPED, about, example)
    parser.add_argument("names", nargs="*", metavar="NAME", help="image sets, such as imagenet or textures")
    parser.add_argument("--root", default="data", metavar="DIR", help="data.root of the configs (default: data)")
    parser.add_argument("--mapping", metavar="FILE", help="for ImageNet: lines with an image name and its class")
    parser.add_argument("--list", action="store_true", help="describe these sets, or all, and stop")


def _add_classes(commands: argparse._SubParsersAction) -> None:
    about = "choose ID classes by the accuracy of a base CLIP on held-out pairs"
    parser = _add(commands, "classes", _classes, STOPPED, about)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint of a training run")
    parser.add_argument("--pairs", required=True, help="held-out shards")
    parser.add_argument("--classes", required=True, metavar="DIR", help="a folder of class folders")
    parser.add_argument("--number", type=int, default=20, metavar="N", help="classes to choose (default: 20)")


def _prepare(arguments: argparse.Namespace) -> None:
    from clipn.data.prepare import run_prepare

    run_prepare(arguments.names, arguments.root, arguments.mapping, arguments.list)


def _classes(arguments: argparse.Namespace) -> None:
    from clipn.evaluation.choose_classes import run_choice

    run_choice(arguments.checkpoint, arguments.pairs, arguments.classes, arguments.number)
