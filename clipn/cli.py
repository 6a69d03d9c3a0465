"""The `clipn` command: predict, train, eval, demo."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable

from . import __version__
from .interrupt import RESUME, STOPPED, heed_signals

# What a subcommand needs, PyTorch above all, is imported when it runs: --help answers at once.

_ABOUT = """\
CLIPN: teach CLIP to say "no". Says of any picture which of your classes it shows, or that it shows none of them.

  clipn train                                     draw the built-in world and train on it, about three minutes
  clipn demo                                      try it in the browser
  clipn predict PICTURES --classes names.txt --checkpoint runs/toy
"""
_EXIT_CODES = """\
exit codes: 0 done; 1 an error that the message says how to mend; 2 wrong usage; 75 training or evaluation was stopped,
the same command goes on; 130 predict or demo was stopped
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command. Errors that its user can mend are one line and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("CLIPN_COMMAND", shlex.join(["clipn", *argv]))
    heed_signals()
    try:
        from .command import fail_in_one_line, start_log
    except KeyboardInterrupt:
        sys.exit(arguments.stopped_code)
    start_log(None)
    fail_in_one_line(lambda: arguments.run(arguments), arguments.stopped_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clipn", description=_ABOUT, epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"clipn-ood {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_predict(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_demo(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, run: Callable, stopped_code: int, about: str, example: str
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


def _add_predict(commands: argparse._SubParsersAction) -> None:
    example = """\
examples:
  clipn predict photos/ --classes cat,dog,horse --checkpoint epoch_10.pt --model-name ViT-B-16
  clipn predict photos/ --classes names.txt --checkpoint runs/toy --csv verdicts.csv --move-ood none_of_them/
"""
    about = "say of each picture in a folder which class it shows, or none"
    parser = _add(commands, "predict", _predict, STOPPED, about, example)
    parser.add_argument("pictures", nargs="+", metavar="FOLDER", help="a folder, with all below it, or a picture")
    _add_detector_options(parser, classes=True)
    parser.add_argument("--calibrate", metavar="DIR", help="pictures of the classes, to set a threshold by")
    about = "of them, to stay at or above the threshold (default: 0.95)"
    parser.add_argument("--keep", type=float, metavar="SHARE", help=about)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once (default: 32)")
    parser.add_argument("--csv", metavar="FILE", help="write a row per picture there")
    parser.add_argument("--move-ood", metavar="DIR", help="move the pictures that show none of the classes there")


def _add_train(commands: argparse._SubParsersAction) -> None:
    example = """\
examples:
  clipn train                                                       the built-in world
  clipn train cc3m_vit_b16 data.shards='/data/cc3m/{00000..00331}.tar'

Uses every visible GPU of this machine; NPROC=N asks for N processes. torchrun's own variables (PET_NNODES,
PET_RDZV_ENDPOINT, ...) join several machines.
"""
    about = "pretrain as a config says, and evaluate if it says on what"
    parser = _add(commands, "train", _train, RESUME, about, example)
    about = "a YAML file or a shipped config's name (default: toy), then settings such as train.lr=1e-4"
    parser.add_argument("words", nargs="*", metavar="CONFIG | key=value", help=about)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    example = """\
example:
  clipn eval --config eval_imagenet data.root=/data eval.checkpoints=epoch_10.pt
"""
    about = "judge checkpoints on image sets, as zero_shot_infer.py does"
    parser = _add(commands, "eval", _eval, RESUME, about, example)
    parser.add_argument("--config", required=True, help="a YAML file, or a shipped config's name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.checkpoints=epoch_10.pt")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    example = """\
Without --checkpoint it shows the built-in run, runs/toy. Nothing leaves this machine.
"""
    parser = _add(commands, "demo", _demo, STOPPED, "a page to try it in the browser", example)
    _add_detector_options(parser, classes=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="N", help="(default: 7860, or the next free one)")
    parser.add_argument("--open", action="store_true", help="open the browser")


def _add_detector_options(parser: argparse.ArgumentParser, classes: bool) -> None:
    parser.add_argument(
        "--classes",
        required=classes,
        metavar="FILE|NAMES",
        help="a file with a name a line, or cat,dog,...; or imagenet",
    )
    kinds = "a checkpoint, a run's folder, an exported folder or hf://user/repo"
    parser.add_argument("--checkpoint", required=classes, metavar="C", help=kinds)
    parser.add_argument("--model-name", metavar="NAME", help="open_clip's, for a checkpoint that does not say its own")
    parser.add_argument("--base", metavar="CLIP", help="a tag or file, where C holds the no tower alone")
    parser.add_argument("--method", default="ATD", metavar="SCORE", help="the score: ATD (default), CTW, MCM, ...")
    parser.add_argument(
        "--templates", default="simple", metavar="SET", help="simple (default), openai, clipn-release, or a text file"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")


def _predict(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from .predict import predict_pictures

    if arguments.keep is not None and not arguments.calibrate:
        raise ValueError(f"--keep={arguments.keep}: says how strict --calibrate is; give that too")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # those too large are errors of their own
    predict_pictures(
        _detector(arguments),
        arguments.pictures,
        csv_file=arguments.csv,
        ood_folder=arguments.move_ood,
        calibration_folder=arguments.calibrate,
        keep=0.95 if arguments.keep is None else arguments.keep,
        batch_size=arguments.batch_size,
    )


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from .launch import launch
    from .pipeline import run_training

    words = arguments.words
    config, overrides = (words[0], words[1:]) if words and "=" not in words[0] else ("toy", words)
    asked = os.environ.get("NPROC") or str(max(1, torch.cuda.device_count()))
    if not asked.isdigit() or int(asked) < 1:
        raise ValueError(f"NPROC={asked!r}: expected a number of processes, 1 or more")
    processes = int(asked)
    several_machines = any(os.environ.get(name) for name in ("PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"))
    if "TORCHELASTIC_RUN_ID" in os.environ or processes == 1 and not several_machines:
        run_training(config, overrides)
        return
    options = [f"--nproc_per_node={processes}", *([] if several_machines else ["--standalone"])]
    sys.exit(launch([*options, "-m", "clipn", "train", config, *overrides]))


def _eval(arguments: argparse.Namespace) -> None:
    from .pipeline import run_evaluation

    run_evaluation(arguments.config, arguments.overrides)


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import run_demo
    from .prompts import class_names_of

    run_demo(
        arguments.checkpoint,
        class_names_of(arguments.classes) if arguments.classes else None,
        host=arguments.host,
        port=arguments.port,
        open_browser=arguments.open,
        **_detector_options(arguments),
    )


def _detector(arguments: argparse.Namespace):
    from .detector import Detector
    from .prompts import class_names_of

    names = class_names_of(arguments.classes)
    return Detector.from_pretrained(arguments.checkpoint, names, **_detector_options(arguments))


def _detector_options(arguments: argparse.Namespace) -> dict[str, str | None]:
    return {name: getattr(arguments, name) for name in ("model_name", "templates", "method", "device", "base")}
