"""The page of `clipn demo`. It alone imports Gradio, which is an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from clipn.demo.cards import cards, choices, heading, paragraph, parse_class_names
from clipn.deploy.detector import Detector
from clipn.runtime.console import printable
from clipn.scores import SCORES

Pictures = list[tuple[str, Path]]  # names and files

_DAY = 24 * 60 * 60
_ABOUT = (
    "Name some classes and drop pictures. The model says for each picture which of the classes it shows, or that it "
    "shows none of them (out-of-distribution). Pictures stay on the machine that runs this page."
)
_HOW = (
    "A class's probability says how likely it is if the picture shows one of the classes. Yes and no say whether the "
    "picture shows that class at all. All the no's together, each times its class's probability, make “unknown”. "
    "Of every score, higher means more like your classes."
)
_METHODS = {
    "ATD": "ATD: a class or “unknown”?",
    "CTW": "CTW: yes or no to the likeliest?",
}
_NO_NAMES = "Name at least one class: then pictures are judged."
_NO_PICTURES = "No pictures yet: drop some above, or click there to choose them."
_NO_CHOICE = "Choose a picture: it is judged with your classes."
_ON_CLICK = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  for (const other of element.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
  trigger("click", {number: Number(button.dataset.number)});
});
"""
_SHOW_VERDICT = '() => document.getElementById("example-verdict").scrollIntoView({block: "nearest"})'


class _Asked(NamedTuple):
    """What is asked of every picture, and the button that asks."""

    names: gr.Textbox
    method: gr.Dropdown
    button: gr.Button


def build_page(
    detector: Detector, examples: dict[str, list[Path]] | None, class_names: Sequence[str], note: str
) -> gr.Blocks:
    """The page; see `clipn.demo.build_demo`."""
    # An upload is kept for a day, and looked at every hour.
    with gr.Blocks(title="CLIPN", analytics_enabled=False, delete_cache=(_DAY // 24, _DAY)) as page:
        _html(heading("Which class, or none of them?", _ABOUT, note))
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                asked = _questions(class_names, detector.method)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Your pictures"):
                    _pictures_tab(detector, asked)
                if examples:
                    with gr.Tab("Examples"):
                        _examples_tab(detector, asked, examples)
    return page


def _questions(class_names: Sequence[str], method: str) -> _Asked:
    names = gr.Textbox(
        "\n".join(class_names),
        label="Class names",
        info="One a line, or separated by commas",
        placeholder="dog\ncat\nbicycle",
        lines=6,
        max_lines=12,
    )
    labels = {name: _METHODS.get(name, f"{name}: a score only") for name in (*_METHODS, *SCORES)}
    choice = gr.Dropdown(
        [(label, name) for name, label in labels.items()], value=method, label="Method", filterable=False
    )
    button = gr.Button("Judge", variant="primary")
    with gr.Accordion("How to read the cards", open=False):
        _html(paragraph(_HOW))
    return _Asked(names, choice, button)


def _pictures_tab(detector: Detector, asked: _Asked) -> None:
    files = gr.File(file_count="multiple", label="Pictures", height=160)
    verdicts = _html(paragraph(_NO_PICTURES), elem_id="verdicts")

    def judge(paths: list[str] | None, names: list[str], method: str) -> str:
        pictures = [(printable(Path(path).name), Path(path)) for path in paths or []]
        return _judged(detector, pictures, names, method) if pictures else paragraph(_NO_PICTURES)

    _judge_on([files.change], judge, files, asked, verdicts)


def _examples_tab(detector: Detector, asked: _Asked, examples: dict[str, list[Path]]) -> None:
    groups = {
        title: [(printable(path.parent.name).replace("_", " "), path) for path in paths]
        for title, paths in examples.items()
    }
    pictures = [picture for group in groups.values() for picture in group]
    chosen = gr.State()
    with gr.Row():
        with gr.Column(min_width=300):
            shelf = _html(choices(groups), js_on_load=_ON_CLICK)
        with gr.Column(min_width=300):
            said = _html(paragraph(_NO_CHOICE), elem_id="example-verdict")

    def choose(event: gr.EventData) -> int:
        return event.number

    def judge(number: int | None, names: list[str], method: str) -> str:
        return paragraph(_NO_CHOICE) if number is None else _judged(detector, [pictures[number]], names, method)

    shelf.click(choose, None, chosen, show_progress="hidden", api_visibility="private")
    _judge_on([chosen.change], judge, chosen, asked, said)
    said.change(None, js=_SHOW_VERDICT, api_visibility="private")


def _html(content: str, **more: Any) -> gr.HTML:
    return gr.HTML(content, apply_default_css=False, **more)


def _judge_on(events: list[Any], judge: Callable[..., str], about: Any, asked: _Asked, said: gr.HTML) -> None:
    """Run when something that the verdict depends on has changed, and not when nothing has."""
    before, track = gr.State(), gr.Progress(track_tqdm=True)

    def judge_once(what: Any, text: str, method: str, last: Any, progress: gr.Progress = track) -> Any:
        now = (what, parse_class_names(text), method)
        return gr.skip() if now == last else (judge(*now), now)

    gr.on(
        [*events, asked.button.click, asked.names.blur, asked.names.submit, asked.method.change],
        judge_once,
        [about, asked.names, asked.method, before],
        [said, before],
        show_progress_on=said,
        trigger_mode="always_last",
        api_visibility="private",
    )


def _judged(detector: Detector, pictures: Pictures, names: list[str], method: str) -> str:
    if not names:
        return paragraph(_NO_NAMES)
    found = detector.with_classes(names, method=method).predict([path for _, path in pictures], on_error="return")
    return cards(pictures, found)
