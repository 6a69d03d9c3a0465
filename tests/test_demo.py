"""`clipn demo` without a browser: the verdicts, what it reads from a run, ports and missing dependencies."""

import os
import runpy
import shutil
import signal
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_clipn
from helpers import write_images

from clipn.demo import app
from clipn.demo.verdict import class_shares, parse_class_names, summary, verdict
from clipn.deploy.result import Result
from clipn.runtime import signals
from clipn.scores import DECISIONS, SCORES

with_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio, an extra, is not installed")


def result(yes: list[float], no: list[float], method: str = "ATD", names: list[str] | None = None) -> Result:
    logits = torch.tensor([yes]).float(), torch.tensor([no]).float()
    scores = {name: score(*logits).item() for name, score in SCORES.items()}
    says_ood = DECISIONS[method](*logits).item() if method in DECISIONS else None
    return Result(method, scores, says_ood, logits[0][0], logits[1][0], names or ["dog", "cat"])


# --- the verdicts ---


NONE, CTW = "none of these (nearest: dog)", "For the likeliest class, dog, "


@pytest.mark.parametrize(
    "result, title, reason",
    [
        (result([9, 1], [1, 9]), "dog", "dog keeps 99.9% (100.0% × yes 100.0%); “unknown” has 0.1%."),
        (result([3, 3], [3, 3]), NONE, "“unknown” has 50.0%; no class keeps more than 25.0% (dog: 50.0% × yes 50.0%)."),
        (result([3, 1], [1, 1], "CTW"), "dog", f"{CTW}“yes” wins over “no”: 88.1% to 11.9%."),
        (result([9, 1], [15, 9], "CTW"), NONE, f"{CTW}“no” wins over “yes”: 99.8% to 0.2%."),
        (result([1, 9], [9, 9], "MSP"), "most like: cat", "MSP gives a score, not a verdict; ATD and CTW decide."),
    ],
)
def test_the_verdict_names_the_class_or_none_and_the_numbers_that_decide(result, title, reason):
    assert verdict(result) == (title, reason)


def test_of_many_classes_the_largest_shares_are_shown_and_those_of_atd_sum_to_one():
    assert class_shares(result([3, 3], [3, 3]), 2) == pytest.approx({"dog": 0.25, "cat": 0.25, "“unknown”": 0.5})
    assert class_shares(result([3, 3], [3, 3], "CTW"), 2) == pytest.approx({"dog": 0.5, "cat": 0.5})
    names = [f"thing {number}" for number in range(1000)]
    no = [0.0] * 999 + [2000.0]  # the likeliest class, which keeps nothing
    assert list(class_shares(result(list(range(1000)), no, names=names), 2)) == ["thing 998", "thing 997", "“unknown”"]
    assert list(class_shares(result(list(range(1000)), no, "MSP", names), 2)) == ["thing 999", "thing 998"]


def test_the_summary_counts_each_kind_of_verdict():
    assert summary([result([3, 3], [3, 3])]) == "1 image: 1 none of them"
    results = [result([9, 1], [1, 9]), ValueError("x"), result([1, 1], [1, 1], "MSP")]
    assert summary(results) == "3 images: 1 of your classes, 1 without a verdict, 1 not readable"


@pytest.mark.parametrize(
    "text, names",
    [("", []), (" , \n,", []), ("dog, polar  bear\r\ncat\n\ndog,", ["dog", "polar bear", "cat"])],
)
def test_class_names_are_read_by_line_and_comma(text, names):
    assert parse_class_names(text) == names


# --- what the page starts with ---


@pytest.fixture
def run_demo(monkeypatch):
    """Run the demo up to its page; return the arguments of the page and the folder of the uploads."""
    from clipn.demo import page

    shown = SimpleNamespace()

    def build_page(detector, examples, class_names, note):
        shown.__dict__.update(detector=detector, examples=examples, class_names=class_names, note=note)
        shown.uploads = Path(os.environ["GRADIO_TEMP_DIR"])
        shown.mode = shown.uploads.stat().st_mode & 0o777
        return SimpleNamespace(is_running=False, close=lambda verbose: None)

    def run(*arguments, **options):
        app.run_demo(*arguments, device="cpu", **options)
        return shown

    monkeypatch.setattr(page, "build_page", build_page)
    monkeypatch.setattr(page, "start", lambda page, host, port, open_browser: f"http://{host}:{port}/")
    return run


def write_run(folder: Path, world: str = "null") -> Path:
    """Write a run folder as another machine made it, with the images of its evaluation; return its checkpoint."""
    write_images(folder / "world/id", *[f"polar_bear/{n}.png" for n in range(8)], *[f"cat/{n}.png" for n in range(8)])
    write_images(folder / "world/far", "tree/1.png", "tree/2.png")
    (folder / "config.yaml").write_text(
        f"run: {{dir: runs/before}}\nworld: {{name: {world}}}\n"
        "eval: {id: {toy: runs/before/world/id}, ood: {far: runs/before/world/far}}\n"
    )
    return write_clipn(folder / "checkpoints/last.pt")


@with_gradio
def test_a_run_gives_its_classes_and_examples(run_demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    page = run_demo(str(write_run(tmp_path / "run")), method="CTW", port=port)
    assert page.class_names == page.detector.class_names == ["cat", "polar bear"]
    assert {title: len(paths) for title, paths in page.examples.items()} == {"Known classes": 6, "far": 2}
    assert {path.parent.name for path in page.examples["Known classes"]} == {"cat", "polar_bear"}
    assert page.note == "" and page.detector.method == "CTW"
    assert capsys.readouterr().out == f"CLIPN's page is at http://127.0.0.1:{port}/ (Ctrl-C stops it)\n"
    # Uploads are private and deleted, and the environment is as before.
    assert page.uploads.parent == tmp_path and page.mode == 0o700 and not page.uploads.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)


@with_gradio
def test_the_built_in_run_is_the_default_and_has_a_note(run_demo, tmp_path, monkeypatch):
    write_run(tmp_path / "runs/toy", world="toy")
    monkeypatch.chdir(tmp_path)
    assert "small drawings" in run_demo().note
    assert run_demo(class_names=["sun", "moon"]).class_names == ["sun", "moon"]
    shutil.rmtree("runs/toy/world/far")  # the rest of the evaluation is still used
    page = run_demo()
    assert page.class_names == ["cat", "polar bear"] and list(page.examples) == ["Known classes"]


@with_gradio
@pytest.mark.parametrize("config", [None, "no: config", "run: {dir: r}\neval: {id: r/gone, ood: r/gone}\n"])
def test_weights_without_a_usable_run_start_with_an_empty_text_box(run_demo, tmp_path, config):
    checkpoint = write_clipn(tmp_path / "checkpoints/last.pt")
    if config:
        (tmp_path / "config.yaml").write_text(config)
    page = run_demo(str(checkpoint))
    assert page.class_names == [] and page.examples == {} and page.note == ""


@with_gradio
def test_a_stop_request_that_python_drops_while_gradio_starts_ends_the_demo(run_demo, tmp_path, monkeypatch):
    """Python drops the KeyboardInterrupt of a signal that arrives in a __del__, such as that of an event loop."""

    def start(page, *arguments):
        page.is_running = True
        monkeypatch.setattr(signals, "_asked", [signal.SIGTERM])

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("clipn.demo.page.start", start)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    checkpoint = write_clipn(tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt):
        run_demo(str(checkpoint))
    assert list(tmp_path.iterdir()) == [checkpoint], "the uploads are deleted"


# --- errors ---


@with_gradio
def test_a_missing_built_in_run_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs/toy/checkpoints/last.pt: .*`sh run.sh`.*--checkpoint C"):
        app.run_demo()


@pytest.mark.parametrize(
    "code, message",
    [
        (None, r'^the demo needs Gradio: pip install "clipn-ood\[demo\]"$'),
        ("import no_such_package", "^Gradio is installed but does not import .*No module named 'no_such_package'"),
        ("raise RuntimeError('two\\nlines')", r"^Gradio is installed but does not import \(RuntimeError: two lines\)"),
    ],
)
def test_gradio_that_is_missing_or_broken_is_one_line(tmp_path, monkeypatch, code, message):
    if code is None:
        monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    else:
        (tmp_path / "gradio.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "gradio", raising=False)
    module = runpy.run_path(app.__file__)  # importing the module does not import Gradio
    with pytest.raises(ValueError, match=message) as caught:
        module["run_demo"]()
    assert "\n" not in str(caught.value)


def test_only_the_demo_imports_gradio():
    package = Path(app.__file__).parents[1]
    users = {path.relative_to(package) for path in package.rglob("*.py") if "import gradio" in path.read_text()}
    assert users == {Path("demo/app.py"), Path("demo/page.py")}


def test_a_taken_port_is_an_error_or_the_next_free_one_is_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"^port={port}: taken"):
            app.free_port("127.0.0.1", port)
        monkeypatch.setattr(app, "_FIRST_PORT", port)
        assert port < app.free_port("127.0.0.1") < port + 20
        monkeypatch.setattr(app, "_PORTS", 1)
        with pytest.raises(OSError, match=f"^ports {port} to {port}: all taken"):
            app.free_port("127.0.0.1")


def test_an_impossible_port_or_host_is_an_error():
    with pytest.raises(ValueError, match="port=65536: expected 0 to 65535"):
        app.free_port("127.0.0.1", 65536)
    with pytest.raises(OSError, match="host='203.0.113.1', port=0"):  # an address reserved for documentation
        app.free_port("203.0.113.1", 0)


@with_gradio
def test_an_ipv6_host_is_served():
    import gradio

    from clipn.demo.page import start

    try:
        port = app.free_port("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with gradio.Blocks(analytics_enabled=False) as page:
        pass
    try:
        assert start(page, "::1", port) == f"http://[::1]:{port}/"
    finally:
        page.close(verbose=False)
