"""`clipn demo` in a real browser: pictures in, verdicts out, and nothing that goes to another machine."""

from __future__ import annotations

import shutil
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import SHARED, write_clipn
from helpers import image_bytes, write_images

from clipn.demo.app import build_demo, start
from clipn.deploy.detector import Detector

pytest.importorskip("gradio", reason="Gradio, an extra, is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHOTOS = SHARED / "data" / "photos" / "cifar10_test.tar"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")


@pytest.fixture(scope="module")
def called() -> Iterator[list[str]]:
    """The hosts that this process, the demo's server, asks for."""
    hosts, ask = [], socket.getaddrinfo

    def noted(host, *arguments, **more):
        hosts.append(host)
        return ask(host, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        yield hosts


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Detector:
    checkpoint = write_clipn(tmp_path_factory.mktemp("model") / "clip.pt")
    return Detector.from_pretrained(checkpoint, ["lion"], device="cpu")


@pytest.fixture(scope="module")
def url(tmp_path_factory, detector, called) -> Iterator[str]:
    """The page, with two examples."""
    folder = write_images(tmp_path_factory.mktemp("demo"), "tree/1.png", "polar_bear/1.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        examples = {"Some": [folder / "tree/1.png", folder / "polar_bear/1.png"]}
        demo = build_demo(detector, examples, note="A <b>note</b>")
        yield start(demo, port=0)
        demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # only our own page
        yield browser
        browser.close()


@pytest.fixture
def requested() -> list[str]:
    """The addresses that the browser asked for."""
    return []


@pytest.fixture
def open_page(browser, url, requested):
    """Opens the page in a tab of its own visitor's."""
    contexts = []

    def open_page(**more):
        contexts.append(browser.new_context(**more))
        contexts[-1].set_default_timeout(15_000)
        page = contexts[-1].new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("websocket", lambda channel: requested.append(channel.url))
        page.goto(url)
        page.get_by_text("No pictures yet").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A real photo, or a drawn picture where there is none."""
    path = tmp_path_factory.mktemp("photo") / "my photo.png"
    if PHOTOS.is_file():
        with tarfile.open(PHOTOS) as archive:
            path.write_bytes(archive.extractfile(next(one for one in archive if one.isfile())).read())
    else:
        path.write_bytes(image_bytes(kind="PNG"))
    return path


def drop(page, *files: Path) -> None:
    page.locator("input[type=file]").set_input_files(files)


def ask_for(page, names: str) -> None:
    page.get_by_label("Class names").fill(names)
    page.get_by_label("Class names").blur()


def verdicts(page, *expected: str, place: str = "#verdicts") -> None:
    """Wait until the cards' headings say so. Of one class, the verdict names it, or has it in its brackets."""
    wanted = [f"{name}|none of these (nearest: {name})".split("|") for name in expected]
    page.wait_for_function(
        """([place, wanted]) => {
            const said = [...document.querySelectorAll(`${place} article h2`)].map((one) => one.textContent);
            return said.length === wanted.length && said.every((one, number) => wanted[number].includes(one));
        }""",
        arg=[place, wanted],
    )


def test_a_photo_is_judged_and_again_when_the_classes_change(open_page, photo, requested, called, url):
    page = open_page()
    drop(page, photo)
    verdicts(page, "lion")
    card = page.locator("#verdicts article")
    assert "my photo.png" in card.inner_text() and card.locator("img").evaluate("image => image.naturalWidth") > 0
    assert card.locator("tbody th").all_inner_texts() == ["lion", "unknown"]
    ask_for(page, "polar bear")
    verdicts(page, "polar bear")
    ask_for(page, "sun, moon\nstar")
    card.get_by_text("moon", exact=True).wait_for()
    assert sorted(card.locator("tbody th").all_inner_texts()) == ["moon", "star", "sun", "unknown"]
    page.get_by_label("Method").click()
    page.get_by_role("option", name="MSP").click()
    card.get_by_text("MSP gives a score, not a verdict").wait_for()
    assert {urlsplit(asked).netloc for asked in requested} - {""} == {urlsplit(url).netloc}  # data: has no host
    assert set(called) == {"127.0.0.1"}


def test_an_unreadable_file_does_not_stop_the_others(open_page, photo, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    page = open_page()
    drop(page, tmp_path / "broken.jpg", photo)
    page.get_by_text("1 not readable").wait_for()
    first, second = page.locator("#verdicts article").all_inner_texts()
    assert first.split("\n\n") == ["not readable", "no image, or of an unknown format", "broken.jpg"]
    assert "my photo.png" in second


def test_names_are_shown_as_they_were_typed(open_page, photo):
    page = open_page()
    drop(page, photo)
    bad = "<img src=x onerror=window.harmed=1> ${window.harmed=1} {{harmed}}"
    ask_for(page, bad)
    verdicts(page, bad)
    assert page.evaluate("window.harmed") is None
    assert page.get_by_text("A <b>note</b>").is_visible()


def test_without_names_nothing_is_judged(open_page, photo):
    page = open_page()
    ask_for(page, " , ")
    drop(page, photo)
    page.locator("#verdicts").get_by_text("Name at least one class").wait_for()
    page.get_by_label("Class names").fill("lion")
    page.get_by_role("button", name="Judge").dispatch_event("click")  # a click would leave the box as well
    verdicts(page, "lion")


def test_an_example_is_judged_by_keyboard_on_a_phone(open_page):
    page = open_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page.get_by_role("tab", name="Examples").click()
    page.get_by_role("button", name="polar bear").press("Enter")
    verdicts(page, "lion", place="#example-verdict")
    playwright.expect(page.locator("#example-verdict article")).to_be_in_viewport()
    assert "polar bear" in page.locator("#example-verdict article").inner_text()
    ask_for(page, "moon")
    verdicts(page, "moon", place="#example-verdict")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_visitors_have_their_own_classes(open_page, photo, detector):
    one, other = open_page(), open_page()
    ask_for(one, "sun")
    ask_for(other, "moon")
    for page in (one, other):
        drop(page, photo)
    verdicts(one, "sun")
    verdicts(other, "moon")
    drop(one, photo)  # beside the first
    verdicts(one, "sun", "sun")
    assert detector.class_names == ["lion"]
