"""`clipn demo` in a real browser: images in, verdicts out, and no request to another machine."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import write_clipn
from helpers import write_images

from clipn.demo.app import free_port
from clipn.deploy.detector import Detector

pytest.importorskip("gradio", reason="Gradio, an extra, is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")


@pytest.fixture(scope="module")
def looked_up() -> Iterator[list[str]]:
    """The hosts that this process, which is also the server, looks up."""
    hosts, getaddrinfo = [], socket.getaddrinfo

    def record(host, *arguments, **options):
        hosts.append(host)
        return getaddrinfo(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", record)
        yield hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("demo"), "tree/1.png", "polar_bear/1.png", "my image.png")
    write_clipn(folder / "clip.pt")
    (folder / "broken.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def url(folder, looked_up) -> Iterator[str]:
    from clipn.demo.page import build_page, start

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        detector = Detector.from_pretrained(folder / "clip.pt", ["lion"], device="cpu")
        examples = {"Some": [folder / "tree/1.png", folder / "polar_bear/1.png"]}
        page = build_page(detector, examples, ["lion"], "A <b>note</b>")
        yield start(page, "127.0.0.1", free_port("127.0.0.1", 0))
        page.close(verbose=False)
        assert detector.class_names == ["lion"]  # whatever the visitors asked for


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # it opens only our own page
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """Open the page as a new visitor; each page has `requested`, the addresses that the browser requests."""
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(20_000)
        page = contexts[-1].new_page()
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("websocket", lambda channel: page.requested.append(channel.url))
        page.goto(url)
        page.get_by_text("No images yet").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def drop(page, *files: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(files)


def enter(page, names: str) -> None:
    page.get_by_label("Class names").fill(names)
    page.get_by_label("Class names").blur()


def wait_for_verdicts(page, *classes: str) -> None:
    """Wait until each card's heading is its class, or "none of these" with it in brackets."""
    expected = [[name, f"none of these (nearest: {name})"] for name in classes]
    page.wait_for_function(
        """expected => {
            const titles = [...document.querySelectorAll(".card h2")].map(title => title.textContent.trim());
            return titles.length === expected.length && titles.every((title, n) => expected[n].includes(title));
        }""",
        arg=expected,
    )


def test_an_image_is_classified_again_when_classes_or_method_change(open_page, folder, looked_up, url):
    page = open_page()
    drop(page, folder / "my image.png")
    wait_for_verdicts(page, "lion")
    card = page.locator(".card")
    assert "my image.png" in card.inner_text() and "ATD" in card.inner_text()
    assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 160
    enter(page, "sun, moon\nstar")
    for name in ("moon", "star", "sun"):
        card.get_by_role("gridcell", name=name, exact=True).wait_for()
    assert sorted(card.locator("dt").all_inner_texts()) == ["moon", "star", "sun", "“unknown”"]
    page.get_by_label("Method").click()
    page.get_by_role("option", name="MSP").click()
    card.get_by_text("MSP gives a score, not a verdict").wait_for()
    assert {urlsplit(address).netloc for address in page.requested} - {""} == {urlsplit(url).netloc}  # data: has none
    assert set(looked_up) == {"127.0.0.1"}


def test_names_are_shown_as_typed_and_without_names_nothing_is_classified(open_page, folder):
    page = open_page()
    enter(page, " , ")
    drop(page, folder / "my image.png")
    page.get_by_text("Name at least one class").wait_for()
    name = "<img src=x onerror=window.harmed=1> **b** `c` [d](e) $$f$$ {{g}}"
    page.get_by_label("Class names").fill(name)
    page.get_by_role("button", name="Classify").dispatch_event("click")  # unlike a click it keeps the focus
    wait_for_verdicts(page, name)
    assert page.evaluate("window.harmed") is None
    assert page.get_by_text("A <b>note</b>").is_visible()


def test_an_unreadable_file_is_reported_beside_the_others_without_a_server_path(open_page, folder):
    page = open_page()
    drop(page, folder / "broken.jpg", folder / "my image.png")
    page.get_by_text("2 images: 1").wait_for()
    error, card = page.locator(".card").all_inner_texts()
    assert error.startswith("not readable") and "format" in error and error.endswith("broken.jpg") and "/" not in error
    assert "my image.png" in card
    page.get_by_label("Remove this file").first.click()
    wait_for_verdicts(page, "lion")


def test_examples_replace_the_uploads_also_on_a_phone(open_page, folder):
    page = open_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    drop(page, folder / "my image.png")
    wait_for_verdicts(page, "lion")
    page.get_by_role("button", name="Some").press("Enter")
    wait_for_verdicts(page, "lion", "lion")
    assert "example: tree" in page.locator(".card").first.inner_text()
    assert page.get_by_text("my image.png").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    drop(page, folder / "my image.png")
    wait_for_verdicts(page, "lion")


def test_two_visitors_have_their_own_classes(open_page, folder):
    pages = {"sun": open_page(), "moon": open_page()}
    for name, page in pages.items():
        enter(page, name)
        drop(page, folder / "my image.png")
    for name, page in pages.items():
        wait_for_verdicts(page, name)
    drop(pages["sun"], folder / "my image.png")  # in addition to the first
    wait_for_verdicts(pages["sun"], "sun", "sun")
