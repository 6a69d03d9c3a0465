"""`clipn demo`: serve a page in the browser to try a model on images. No image leaves this machine."""

import errno
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipn.config.loading import load_config
from clipn.data.image_sets import ImageSet, open_image_sets
from clipn.data.prompts import load_class_names
from clipn.deploy.detector import Detector
from clipn.deploy.saved import read_settings
from clipn.model.checkpoint import checkpoint_folder, last_checkpoint
from clipn.model.weights import find_weights
from clipn.runtime.signals import stop_if_asked

log = logging.getLogger(__name__)

BUILT_IN = "runs/toy"  # the folder of the built-in run of `sh run.sh`
_FIRST_PORT, _PORTS = 7860, 20
_EXAMPLES = 6  # per image set
_TITLES = {  # of the image sets of the built-in world
    "toy": "Known classes",
    "near": "Other things, drawn in the same way",
    "scenes": "Landscapes",
    "textures": "Patterns",
    "digits": "Handwritten digits",
}
_TOY_NOTE = (
    "These are the weights of the built-in run. They know only small drawings of the built-in world, so most photos "
    "are none of the classes to them, or a wild guess. The examples show what they can do."
)


def run_demo(
    checkpoint: str | None = None,
    class_names: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    **detector_options: Any,
) -> None:
    """Serve the page until Ctrl-C, whose KeyboardInterrupt is passed on.

    checkpoint: by default that of the built-in run; class_names: by default those that its run was evaluated on.
    port: as in `free_port`; detector_options: as in `Detector.from_pretrained`.

    Raises ValueError, FileNotFoundError or OSError in one line for a missing or unsuitable file, option or port.
    """
    _check_gradio()
    from clipn.demo import page

    if checkpoint is None:
        checkpoint = str(last_checkpoint(BUILT_IN))
        if not Path(checkpoint).is_file():
            how = "train it with `clipn train` or `sh run.sh` (about three minutes), or name another: `--checkpoint C`"
            raise FileNotFoundError(f"{checkpoint}: no built-in run in this folder; {how}")
    run_names, image_sets, world = _read_run(checkpoint)
    if class_names is None:
        class_names = (read_settings(checkpoint) or {"class_names": run_names})["class_names"]
    detector = Detector.from_pretrained(checkpoint, class_names or ["anything"], **detector_options)  # at least one
    examples = {_TITLES.get(s.name, s.name): s.paths[:: -(-len(s) // _EXAMPLES)] for s in image_sets}
    with _upload_folder():
        demo = page.build_page(detector, examples, class_names, _TOY_NOTE if world == "toy" else "")
        address = page.start(demo, host, free_port(host, port), open_browser)
        print(f"CLIPN's page is at {address} (Ctrl-C stops it)", flush=True)
        try:
            while demo.is_running:
                stop_if_asked()
                time.sleep(0.1)
        finally:
            demo.close(verbose=False)


def free_port(host: str, port: int | None = None) -> int:
    """The port if it is free; for None the first free one from 7860 on, for 0 any.

    Raises ValueError or OSError in one line for an impossible or taken port, and for a host that is not this machine.
    """
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"port={port}: expected 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(_FIRST_PORT, _FIRST_PORT + _PORTS) if port is None else [port]
    for number in ports:
        try:
            with socket.create_server((host, number), family=family) as server:
                return server.getsockname()[1]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(f"host={host!r}, port={number}: {error.strerror or error}") from error
    taken = f"port={port}: taken" if port else f"ports {ports[0]} to {ports[-1]}: all taken"
    raise OSError(f"{taken}; name another")


def _check_gradio() -> None:
    how = 'pip install "clipn-ood[demo]"'
    try:
        import gradio  # noqa: F401
    except Exception as error:  # any kind, where versions of its dependencies do not fit together
        if isinstance(error, ModuleNotFoundError) and error.name == "gradio":
            raise ValueError(f"the demo needs Gradio: {how}") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"Gradio is installed but does not import ({reason}); try: {how} --upgrade") from error


@contextmanager
def _upload_folder() -> Iterator[None]:
    """Have Gradio store uploads in a folder that only this user can read, and delete it at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR", "")  # empty: Gradio's and tempfile's default
    with tempfile.TemporaryDirectory(prefix="clipn-demo-", dir=before or None, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ["GRADIO_TEMP_DIR"] = before


def _read_run(checkpoint: str) -> tuple[list[str], list[ImageSet], str | None]:
    """The class names, the image sets and the built-in world that the run of a checkpoint was evaluated on."""
    class_names, image_sets, world = [], [], None
    file = find_weights(checkpoint)
    run = file.parent.parent if file else Path()
    if file is None or file.parent != checkpoint_folder(run) or not (run / "config.yaml").is_file():
        return [], [], None
    try:  # the weights work without the evaluation
        config = load_config(run / "config.yaml")
        world = config.world.name
        if config.eval.id:
            image_sets += open_image_sets(_relocate(config.eval.id, config.run.dir, run), "eval.id")
            class_names += load_class_names(config.eval.class_names, image_sets[0].classes)
        if config.eval.ood:
            image_sets += open_image_sets(_relocate(config.eval.ood, config.run.dir, run), "eval.ood")
    except (ValueError, OSError) as error:
        log.info("%s: no class names or no examples from its evaluation: %s", checkpoint, error)
    return class_names, image_sets, world


def _relocate(value: Any, run_dir: str, run: Path) -> Any:
    """Replace the run folder of a config in the paths of a setting by its present location."""
    if isinstance(value, dict):
        return {key: _relocate(item, run_dir, run) for key, item in value.items()}
    if isinstance(value, list):
        return [_relocate(item, run_dir, run) for item in value]
    inside = isinstance(value, str) and value.startswith(f"{run_dir}/")
    return str(run / value.removeprefix(f"{run_dir}/")) if inside else value
