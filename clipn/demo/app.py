"""`clipn demo`: a page in the browser to try a model on pictures. Nothing leaves this machine."""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipn.config.loading import load_config
from clipn.config.schema import Config
from clipn.data.image_sets import ImageSet, open_image_sets
from clipn.data.prompts import load_class_names
from clipn.demo.cards import STYLE
from clipn.deploy.detector import Detector
from clipn.model.checkpoint import checkpoint_folder, last_checkpoint
from clipn.model.weights import find_weights

log = logging.getLogger(__name__)

BUILT_IN = "runs/toy"  # where `sh run.sh` leaves the built-in run
_FIRST_PORT, _PORTS = 7860, 20  # Gradio's own, and how many from there on are tried
_EXAMPLES = 6  # of each image set
_LARGEST_FILE = "100mb"
_TITLES = {  # of the built-in world's sets
    "toy": "Things that it knows",
    "near": "Other things, drawn in the same way",
    "scenes": "Landscapes",
    "textures": "Patterns",
    "digits": "Handwritten digits",
}
_TOY_NOTE = (
    "These are the weights of the built-in run: they know only small drawings of the world it was trained on, so most "
    "photos are none of the classes to them, or a wild guess. The examples show what they can do."
)


def build_demo(
    detector: Detector,
    examples: dict[str, list[Path]] | None = None,
    class_names: Sequence[str] | None = None,
    note: str = "",
) -> Any:
    """The page, a gradio.Blocks.

    examples: pictures to choose from, by title; each is named after its folder. class_names: what stands in the box
    at first, by default the detector's. Raises ValueError where Gradio is not installed.
    """
    _check_gradio()
    from clipn.demo.page import build_page

    return build_page(detector, examples, detector.class_names if class_names is None else class_names, note)


def run_demo(
    checkpoint: str | None = None,
    class_names: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    model_name: str | None = None,
    base: str | None = None,
    device: str = "auto",
    templates: Any = None,
    method: str = "ATD",
    open_browser: bool = False,
) -> None:
    """Show the page until Ctrl-C, whose KeyboardInterrupt is passed on.

    checkpoint: by default the built-in run's. class_names: what stands in the box at first, by default what the run
    of the checkpoint was evaluated on, if that is here. port: None is 7860, or the next free one. The rest is as in
    `Detector.from_pretrained`.

    Raises ValueError, FileNotFoundError or OSError, one line, for what is not there, does not fit or is taken.
    """
    _check_gradio()
    if checkpoint is None:
        checkpoint = str(last_checkpoint(BUILT_IN))
        if not Path(checkpoint).is_file():
            how = "make it with `clipn train` or `sh run.sh` (about three minutes), or name another: `--checkpoint C`"
            raise FileNotFoundError(f"{checkpoint}: no built-in run here; {how}")
    config, sets = _evaluated(checkpoint)
    if class_names is None:
        class_names = _class_names(config, sets)
    asked = class_names or ["anything"]  # a detector wants a class, the box may stay empty
    detector = Detector.from_pretrained(
        checkpoint, asked, model_name=model_name, base=base, device=device, templates=templates, method=method
    )
    note = _TOY_NOTE if config and config.world.name == "toy" else ""
    with _upload_folder():
        demo = build_demo(detector, _examples(sets), class_names, note)
        print(f"CLIPN's page is at {start(demo, host, port, open_browser)} (Ctrl-C stops it)", flush=True)
        try:
            while demo.is_running:
                time.sleep(0.1)
        finally:
            demo.close(verbose=False)


def start(demo: Any, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False) -> str:
    """Serve the page in the background, and return its address. port: as in `free_port`.

    Raises ValueError or OSError, one line, for a port that cannot be or is taken, and a host that is not this machine.
    """
    demo.launch(
        server_name=host,
        server_port=free_port(host, port),
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=_LARGEST_FILE,
        theme=_theme(),
        css=STYLE,
    )
    return demo.local_url


def free_port(host: str, port: int | None = None) -> int:
    """The port, if it is free; for None the first free one from 7860 on, for 0 any. Raises as `start` does."""
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"port={port}: expected 0 to 65535")
    ports = range(_FIRST_PORT, _FIRST_PORT + _PORTS) if port is None else [port]
    for number in ports:
        try:
            with socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as it:
                return it.getsockname()[1]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(f"host={host!r}, port={number}: {error.strerror or error}") from error
    taken = f"port={port}: taken" if port else f"ports {ports[0]} to {ports[-1]}: all taken"
    raise OSError(f"{taken}; name another")


@contextmanager
def _upload_folder() -> Iterator[None]:
    """Has Gradio keep uploads where no other user looks, and only until the page is closed."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="clipn-demo-", dir=before, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            os.environ.update({"GRADIO_TEMP_DIR": before} if before else {})


def _theme() -> Any:
    import gradio as gr

    theme = gr.themes.Default(  # Gradio's own fonts are files of its server; the system's need none
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    quiet = {"body_text_color_subdued": "*neutral_500", "block_info_text_color": "*neutral_500"}
    return theme.set(button_primary_background_fill="*primary_600", **quiet)


def _check_gradio() -> None:
    if find_spec("gradio") is None:
        raise ValueError("the demo needs Gradio: pip install gradio")


# --- what a run's own evaluation tells ---


def _evaluated(checkpoint: str) -> tuple[Config | None, list[ImageSet]]:
    """The settings of the run that a checkpoint lies in, and those image sets of its evaluation that are here."""
    file = find_weights(checkpoint)
    run = file.parent.parent if file else Path()
    if file is None or file.parent != checkpoint_folder(run) or not (run / "config.yaml").is_file():
        return None, []
    config, sets = None, []
    try:
        config = load_config(run / "config.yaml")
        for key, value in (("eval.id", config.eval.id), ("eval.ood", config.eval.ood)):
            sets += open_image_sets(_moved(value, config.run.dir, run), key) if value else []
    except (ValueError, OSError) as error:  # the weights work without them
        log.info("%s: no class names or no examples from its evaluation: %s", checkpoint, error)
    return config, sets


def _moved(value: Any, before: str, run: Path) -> Any:
    """A setting with the paths below a run's folder as they are now, also from another folder or machine."""
    if isinstance(value, dict):
        return {key: _moved(one, before, run) for key, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, before, run) for one in value]
    inside = isinstance(value, str) and value.startswith(f"{before}/")
    return str(run / value.removeprefix(f"{before}/")) if inside else value


def _class_names(config: Config | None, sets: list[ImageSet]) -> list[str]:
    """The ID classes' names; none where they are not known."""
    if config is None or not config.eval.id or not sets:
        return []
    try:
        return load_class_names(config.eval.class_names, sets[0].classes)
    except (ValueError, OSError):
        return []


def _examples(sets: list[ImageSet]) -> dict[str, list[Path]]:
    """A few pictures of each set, of different classes."""
    return {_TITLES.get(one.name, one.name): one.paths[:: -(-len(one) // _EXAMPLES)] for one in sets}
