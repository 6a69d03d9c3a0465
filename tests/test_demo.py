"""`clipn demo` without a browser: the cards' words, what a run's evaluation tells, ports and missing things."""

from __future__ import annotations

import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_clipn
from helpers import write_images

from clipn import demo
from clipn.demo.cards import cards, choices, heading, parse_class_names, verdict
from clipn.deploy.result import Result
from clipn.scores import DECISIONS, SCORES

with_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio, an extra, is not installed")


def result(yes: list[float], no: list[float], method: str = "ATD", names: list[str] | None = None) -> Result:
    logits = torch.tensor([yes]).float(), torch.tensor([no]).float()
    scores = {name: score(*logits).item() for name, score in SCORES.items()}
    says_ood = DECISIONS[method](*logits).item() if method in DECISIONS else None
    return Result(method, scores, says_ood, logits[0][0], logits[1][0], names or ["dog", "cat"])


@pytest.fixture
def picture(tmp_path) -> Path:
    return write_images(tmp_path / "pictures", "one.png") / "one.png"


def text(page: str) -> str:
    """What a page says, its tags as spaces."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).replace("\N{NO-BREAK SPACE}", " ").split())


# --- the cards ---


@pytest.mark.parametrize("method", ["ATD", "CTW"])
def test_the_verdict_is_the_class_or_none_with_the_nearest(method):
    assert verdict(result([9, 1], [1, 9], method))[0] == "dog"
    assert verdict(result([9, 1], [15, 9], method))[0] == "none of these (nearest: dog)"


def test_a_score_without_a_decision_gives_no_verdict():
    said, why = verdict(result([1, 9], [15, 15], "MSP"))
    assert said == "most like: cat" and "MSP gives a score, not a verdict" in why


def test_why_shows_the_numbers_that_decide():
    even = result([3, 3], [3, 3])  # each class: 50 % x yes 50 %; unknown: the other half
    assert verdict(even)[1].replace("\N{NO-BREAK SPACE}", " ") == (
        "“unknown” has 50.0 %; no class keeps more than 25.0 % (dog: 50.0 % × yes 50.0 %)."
    )
    assert "“yes” wins over “no”: 88.1" in verdict(result([3, 1], [1, 1], "CTW"))[1]


def test_a_card_shows_each_class_and_unknown_for_atd_only(picture):
    words = text(cards([("one.png", picture)], [result([3, 3], [3, 3])]))
    assert words.startswith("1 picture: 1 none of them ")
    assert "dog 50.0 % 50.0 % 50.0 % cat 50.0 % 50.0 % 50.0 % unknown 50.0 %" in words
    assert "MSP 0.5 " in words and words.endswith("ATD 0.5")
    assert "unknown" not in text(cards([("one.png", picture)], [result([3, 3], [3, 3], "CTW")]))


def test_bars_are_as_long_as_what_they_show(picture):
    card = cards([("one.png", picture)], [result([3], [2], names=["dog"])])
    widths = re.findall(r'class="(likely|yes|no)" style="width: ([\d.]+)%"', card)
    assert widths == [("likely", "100.00"), ("yes", "73.11"), ("no", "26.89"), ("likely", "26.89")]  # the last: unknown


def test_of_many_classes_the_likeliest_are_shown_and_the_rest_counted(picture):
    names = [f"thing {number}" for number in range(1000)]
    words = text(cards([("one.png", picture)], [result(list(range(1000)), [0] * 1000, names=names)]))
    assert words.count("thing 99") >= 8 and "thing 991 " not in words
    assert "and 992 less likely" in words


def test_an_unreadable_picture_is_a_card_without_the_folder_of_the_upload(picture):
    broken = Path("/somewhere/a1b2/x.jpg")
    found = [ValueError(f"{broken}: no image, or of an unknown format"), result([9, 1], [1, 9])]
    page = cards([("x.jpg", broken), ("one.png", picture)], found)
    assert text(page).startswith(
        "2 pictures: 1 of your classes, 1 not readable not readable no image, or of an unknown"
    )
    assert "somewhere" not in page


def test_names_are_text_not_html(picture):
    bad = "<img src=x onerror=alert(1)>"
    found = [result([9, 1], [1, 9], names=[bad, "cat"]), ValueError(bad)]
    pages = [cards([(bad, picture)] * 2, found), choices({bad: [(bad, picture)]}), heading(bad, bad, bad)]
    assert all(bad not in page and "&lt;img src=x onerror=alert(1)&gt;" in page for page in pages)


def test_choices_are_numbered_through(picture):
    page = choices({"Known": [("dog", picture), ("cat", picture)], "Other": [("tree", picture)]})
    assert re.findall(r'data-number="(\d)"', page) == ["0", "1", "2"]
    assert text(page) == "Known dog cat Other tree"


@pytest.mark.parametrize(
    "written, names",
    [
        ("", []),
        (" , \n,", []),
        ("dog", ["dog"]),
        ("dog, polar  bear\r\ncat\n\ndog,", ["dog", "polar bear", "cat"]),
    ],
)
def test_class_names_are_read_by_line_and_comma(written, names):
    assert parse_class_names(written) == names


# --- what is shown at the start ---


@pytest.fixture
def printable(monkeypatch):
    """Runs the demo up to its page; returns what the page is given."""
    given = {}

    def build(detector, examples, class_names, note):
        given.update(detector=detector, examples=examples, class_names=class_names, note=note)
        return SimpleNamespace(is_running=False, close=lambda verbose: None)

    def run(*arguments, **more):
        demo.run_demo(*arguments, device="cpu", **more)
        return SimpleNamespace(**given)

    monkeypatch.setattr(demo, "build_demo", build)
    monkeypatch.setattr(demo, "start", lambda page, host, port, open_browser: f"http://{host}:{port}/")
    return run


def write_run(folder: Path, world: str = "null") -> Path:
    """A run's folder as another machine wrote it, with its evaluation's pictures; returns its checkpoint."""
    write_images(folder / "world/id", *[f"polar_bear/{n}.png" for n in range(8)], *[f"cat/{n}.png" for n in range(8)])
    write_images(folder / "world/far", "tree/1.png", "tree/2.png")
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text(
        f"run: {{dir: runs/before}}\nworld: {{name: {world}}}\n"
        "eval: {id: {toy: runs/before/world/id}, ood: {far: runs/before/world/far}}\n"
    )
    return write_clipn(folder / "checkpoints/last.pt")


@with_gradio
def test_a_run_gives_its_own_classes_and_examples(shown, tmp_path, capsys):
    page = printable(str(write_run(tmp_path / "run")), method="CTW", port=1234)
    assert page.class_names == page.detector.class_names == ["cat", "polar bear"]
    assert {title: len(paths) for title, paths in page.examples.items()} == {"Things that it knows": 6, "far": 2}
    assert {path.parent.name for path in page.examples["Things that it knows"]} == {"cat", "polar_bear"}
    assert page.note == "" and page.detector.method == "CTW"
    assert capsys.readouterr().out == "CLIPN's page is at http://127.0.0.1:1234/ (Ctrl-C stops it)\n"


@with_gradio
def test_the_built_in_run_is_the_default_and_says_what_it_knows(shown, tmp_path, monkeypatch):
    write_run(tmp_path / "runs/toy", world="toy")
    monkeypatch.chdir(tmp_path)
    page = printable()
    assert page.class_names == ["cat", "polar bear"] and "small drawings" in page.note


@with_gradio
def test_given_classes_win(shown, tmp_path):
    assert printable(str(write_run(tmp_path / "run")), ["sun", "moon"]).class_names == ["sun", "moon"]


@with_gradio
@pytest.mark.parametrize("config", [None, "no: config", "run: {dir: r}\neval: {id: r/gone, ood: r/gone}\n"])
def test_weights_that_say_nothing_start_with_an_empty_box(shown, tmp_path, config):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = write_clipn(tmp_path / "checkpoints/last.pt")
    if config:
        (tmp_path / "config.yaml").write_text(config)
    page = printable(str(checkpoint))
    assert page.class_names == [] and page.examples == {} and page.note == ""


@with_gradio
def test_a_missing_ood_folder_leaves_the_classes(shown, tmp_path):
    checkpoint = write_run(tmp_path / "run")
    (tmp_path / "run/world/far").rename(tmp_path / "elsewhere")
    page = printable(str(checkpoint))
    assert page.class_names == ["cat", "polar bear"] and list(page.examples) == ["Things that it knows"]


@with_gradio
def test_uploads_lie_in_a_private_folder_that_goes_with_the_page(shown, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    seen = []

    def start(*arguments):
        folder = Path(demo.os.environ["GRADIO_TEMP_DIR"])
        seen.append((folder.parent, folder.stat().st_mode & 0o77))
        return "http://x/"

    monkeypatch.setattr(demo, "start", start)
    printable(str(write_run(tmp_path / "run")))
    assert seen == [(tmp_path / "mine", 0)]
    assert not list((tmp_path / "mine").iterdir()) and demo.os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "mine")


@with_gradio
def test_no_built_in_run_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs/toy/checkpoints/last.pt: .*`sh run.sh`.*--checkpoint C`"):
        demo.run_demo()


def test_without_gradio_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="pip install gradio$"):
        demo.run_demo()


# --- ports ---


def test_a_taken_port_is_named_or_the_next_free_one_found(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"^port={port}: taken"):
            demo.free_port("127.0.0.1", port)
        monkeypatch.setattr(demo, "_FIRST_PORT", port)
        assert port < demo.free_port("127.0.0.1") < port + 20
        monkeypatch.setattr(demo, "_PORTS", 1)
        with pytest.raises(OSError, match=f"^ports {port} to {port}: all taken"):
            demo.free_port("127.0.0.1")


def test_impossible_ports_and_hosts_are_named():
    with pytest.raises(ValueError, match="port=65536: expected 0 to 65535"):
        demo.free_port("127.0.0.1", 65536)
    with pytest.raises(OSError, match="host='203.0.113.1', port=0"):  # an address kept for examples
        demo.free_port("203.0.113.1", 0)
