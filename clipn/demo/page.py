"""The page of `clipn demo`. This is the only module that imports Gradio, an optional dependency."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import gradio as gr
from PIL import Image, ImageOps

from clipn.data.images import open_image
from clipn.demo.verdict import class_shares, parse_class_names, summary, verdict
from clipn.deploy.detector import Detector
from clipn.deploy.result import Result
from clipn.runtime.console import printable
from clipn.scores import DECISIONS, SCORES

_CSS = """
.card { border-left: .35rem solid var(--neutral-400) !important; }
.known { border-left-color: #2b6cb0 !important; } .known h2 { color: #2b6cb0; } .dark .known h2 { color: #63a4e8; }
.none { border-left-color: #d97b29 !important; } .none h2 { color: #b45309; } .dark .none h2 { color: #f0a35e; }
.card .icon-button-wrapper { display: none; }
"""
_FONT = ["system-ui", "sans-serif"]  # of the reader's system, so that none is downloaded
_THEME = gr.themes.Default(primary_hue="blue", font=_FONT, font_mono=_FONT).set(
    button_primary_background_fill="*primary_600",
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",
)

_CLASSES = 5  # shown per image
_THUMBNAIL = 160  # pixels
_ABOUT = (
    "Name some classes and drop images. For each image the model says which of the classes it shows, or that it shows "
    "none of them (out-of-distribution). Images stay on the machine that runs this page."
)
_HOW = (
    "**p_class**: how likely a class is if the image shows one of your classes. **p_yes** and **p_no**: whether "
    "the image shows that class at all. With ATD each class keeps p_class × p_yes, and “unknown” has the rest: the "
    "bars. **Scores**: higher means more like your classes."
)
_NO_CLASSES = "Name at least one class to classify images."
_NO_IMAGES = "No images yet: drop some above, or choose examples."
_METHODS = [("ATD: class or “unknown”", "ATD"), ("CTW: yes or no", "CTW")]
_METHODS += [(f"{name}: a score only", name) for name in SCORES if name not in DECISIONS]


def build_page(detector: Detector, examples: dict[str, list[Path]], class_names: Sequence[str], note: str) -> gr.Blocks:
    """The page. examples: sets of images to choose from, by title; class_names: the initial content of the text box."""
    # Gradio checks every hour (3600 s) and deletes uploads after a day.
    with gr.Blocks(title="CLIPN", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        gr.Markdown("\n\n".join(["# Which class, or none of them?", _ABOUT, f"> {_escape(note)}" if note else ""]))
        with gr.Row():
            with gr.Column(scale=1, min_width=270):
                names, method, button = _questions(class_names, detector.method)
            with gr.Column(scale=4, min_width=320):
                images = _image_choice(examples)
                classes = gr.State(list(class_names))
                changed = [names.blur, names.submit, button.click]
                gr.on(changed, parse_class_names, names, classes, api_visibility="private")

                @gr.render([images, classes, method])  # also when the page is opened
                def show(images: list[tuple[str, Path]], classes: list[str], method: str) -> None:
                    _show_results(detector, images, classes, method)

    return page


def start(page: gr.Blocks, host: str, port: int, open_browser: bool = False) -> str:
    """Serve the page in the background and return its address."""
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size="100mb",
        theme=_THEME,
        css=_CSS,
    )
    return page.local_url


def _questions(class_names: Sequence[str], method: str) -> tuple[gr.Textbox, gr.Dropdown, gr.Button]:
    names = gr.Textbox(
        "\n".join(class_names),
        label="Class names",
        info="One per line, or separated by commas",
        placeholder="dog\ncat\nbicycle",
        lines=6,
        max_lines=12,
    )
    dropdown = gr.Dropdown(_METHODS, value=method, label="Method", filterable=False)
    button = gr.Button("Classify", variant="primary")
    with gr.Accordion("How to read the results", open=False):
        gr.Markdown(_HOW)
    return names, dropdown, button


def _image_choice(examples: dict[str, list[Path]]) -> gr.State:
    """The chosen images as (name, path): uploads, or one set of examples, each named after its folder."""
    images = gr.State([])
    files = gr.File(file_count="multiple", label="Images", height=140)

    def read_files(paths: list[str] | None) -> list[tuple[str, Path]]:
        return [(printable(Path(path).name), Path(path)) for path in paths or []]

    gr.on([files.upload, files.delete, files.clear], read_files, files, images, api_visibility="private")
    if examples:
        sets = list(examples.values())

        def choose(number: int) -> tuple[list[tuple[str, Path]], None]:
            return [(f"example: {printable(path.parent.name).replace('_', ' ')}", path) for path in sets[number]], None

        titles = [[title] for title in examples]
        choice = gr.Dataset(components=["textbox"], samples=titles, type="index", label="Examples")
        choice.click(choose, choice, [images, files], api_visibility="private")
    return images


def _show_results(detector: Detector, images: list[tuple[str, Path]], classes: list[str], method: str) -> None:
    if not classes or not images:
        gr.Markdown(_NO_IMAGES if classes else _NO_CLASSES)
        return
    results = detector.with_classes(classes, method=method).predict([path for _, path in images], on_error="return")
    gr.Markdown(summary(results))
    for (name, path), result in zip(images, results, strict=True):
        if isinstance(result, Result):
            _show_result(name, path, result)
            continue
        with gr.Row(variant="panel", elem_classes="card"):  # without the path, which names a folder of the server
            _text("not readable", str(result).replace(f"{path}: ", ""), name)


def _show_result(name: str, path: Path, result: Result) -> None:
    entries, count = result.top(_CLASSES), len(result.class_names)
    kind = {None: "score", False: "known", True: "none"}[result.says_ood]
    with gr.Row(variant="panel", elem_classes=["card", kind]):
        with gr.Column(scale=3, min_width=200):
            gr.Image(_thumbnail(path), height=_THUMBNAIL, show_label=False, container=False, buttons=[])
            _text(*verdict(result), name)
        with gr.Column(scale=3, min_width=200):
            title = "Class or “unknown”" if result.method == "ATD" else "Class probabilities"
            gr.Label(class_shares(result, _CLASSES), label=title, show_heading=False)
        with gr.Column(scale=4, min_width=280):
            gr.Dataframe(
                [[entry.label, *(f"{share:.1%}" for share in entry[1:])] for entry in entries],
                headers=["class", "p_class", "p_yes", "p_no"],
                interactive=False,
                buttons=[],
                column_widths=["28%", "28%", "22%", "22%"],
                wrap=True,
            )
            rest = f"and {count - len(entries)} less likely\n\n" if count > len(entries) else ""
            scores = {key: f"{key} {score:.4g}" for key, score in result.scores.items()}
            scores[result.method] = f"**{scores[result.method]}**"
            gr.Markdown(f"{rest}Scores (higher: in-distribution): {' · '.join(scores.values())}")


def _text(title: str, reason: str, name: str) -> None:
    gr.Markdown(f"## {_escape(title)}\n\n{_escape(reason)}\n\n*{_escape(name)}*")


def _escape(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join(letter if letter.isalnum() or letter == " " else f"&#{ord(letter)};" for letter in text)


@lru_cache(maxsize=512)  # the images stay while the classes change
def _thumbnail(path: Path) -> Image.Image:
    image, size = open_image(path), (_THUMBNAIL, _THUMBNAIL)
    method = Image.Resampling.NEAREST if max(image.size) < _THUMBNAIL else Image.Resampling.BICUBIC
    return ImageOps.contain(image, size, method)
