"""report.html: self-contained, safe with any name, with a gallery of the worst mistakes."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from helpers import set_scores, write_images
from PIL import Image

from clipn.data.image_sets import open_image_set
from clipn.evaluation.results import Evaluation
from clipn.report.html import figure_uri
from clipn.report.write import write_report

NASTY = '<script>alert("1")</script> & größe 日本'


class Page(HTMLParser):
    """A page's tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are closed in the order of opening"

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def decoded(source: str) -> Image.Image:
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", source).groups()
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.format.lower() == kind
    return image


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Twenty images each: ID in two classes, OOD in a class with a nasty name, OOD without labels.

    Image n has a shade of its own, and the score n / 20 by ATD, 1 - n / 20 by MSP.
    """
    root, classes = tmp_path_factory.mktemp("sets"), {"cats": ["a_tabby", "b"], "dogs": ["o&<i>"], "flat": [""]}
    sets = {}
    for name, folders in classes.items():
        for number in range(20):
            path = root / name / folders[0 if number < 10 else -1] / f"{number:02d} <ü>.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (10 * number, 90, 160)).save(path)
        images = open_image_set(name, root / name)
        numbers = np.array([int(path.name[:2]) for path in images.paths])
        by_method = {"ATD": numbers / 20, "MSP": 1 - numbers / 20}
        sets[name] = set_scores(images, by_method, predicted=numbers % 2, p_yes=numbers / 100)
    return sets


METRICS = {"AUROC": 0.5, "AUPR_IN": 0.1, "AUPR_OUT": 0.2, "id_accuracy": 0.5, "seed": 0}
RESULTS = pd.DataFrame(
    {"id_set": "cats", "ood_set": name, "method": method, "FPR95": fpr95} | METRICS
    for name, fpr95 in (("dogs", 0.25), ("flat", 0.5))
    for method in ("MSP", "ATD")
)
DECISION = {"id_set": "cats", "ood_set": "dogs", "decision": "CTW", "id_kept": 0.9, "ood_found": 0.6, "accuracy": 0.75}
DECISIONS = pd.DataFrame([DECISION])


def html(folder, scores, class_names, results=RESULTS, decisions=DECISIONS) -> str:
    write_report(folder, Evaluation(results, decisions, scores, class_names))
    return (folder / "report.html").read_text(encoding="utf-8")


def gallery(*arguments) -> list[Page]:
    """The gallery's sections: the OOD sets, then the ID set."""
    return [Page(section) for section in re.split("(?=<h3>)", html(*arguments).split("</section>\n</body>")[0])[1:]]


def shades(section: Page) -> list[int]:
    return [decoded(image["src"]).getpixel((5, 5))[0] // 10 for image in section.all("img")]


@pytest.mark.parametrize("method, by_rising_score", [("ATD", list(range(20))), ("MSP", list(range(19, -1, -1)))])
def test_the_gallery_shows_the_worst_mistakes_first(tmp_path, scores, no_figures, method, by_rising_score):
    """Of ATD if it was evaluated, else of the last method."""
    results = RESULTS if method == "ATD" else RESULTS[RESULTS["method"] == "MSP"]
    dogs, flat, cats = gallery(tmp_path, scores, ["a tabby", "b"], results)
    assert shades(dogs) == shades(flat) == by_rising_score[:7:-1], "OOD: the highest scores"
    assert shades(cats) == by_rising_score[:12], "ID: the lowest scores"
    assert f"Worst mistakes of {method}" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_card_shows_classes_score_and_probabilities(tmp_path, scores, no_figures):
    dogs, flat, cats = (section.text for section in gallery(tmp_path, scores, ["a tabby", NASTY]))
    assert dogs.startswith("dogs (OOD): highest scores\n25.00 % of its 20 images are accepted")
    assert f"o&<i>predicted: {NASTY}ATD, log odds 0.9500pyes 0.190,\npno 0.810" in dogs
    assert f"\npredicted: {NASTY}ATD, log odds 0.9500" in flat, "no class of its own"
    assert (
        "a tabbyclass correctATD, log odds 0.000" in cats and f"a tabbypredicted: {NASTY}ATD, log odds 0.0500" in cats
    )
    dogs, _, cats = (section.text for section in gallery(tmp_path, scores, ["under_score", "o&<i>"]))
    assert "o&<i>predicted: o&<i>ATD" in dogs and "class correct" not in dogs, "an OOD image's class is never correct"
    assert "under_scorepredicted: o&<i>" in cats and "tabby" not in cats, "the class names of the evaluation"


def test_the_page_is_self_contained_and_escapes_names(tmp_path, scores):
    """With real figures, in a folder and with a class whose names are markup."""
    text = html(tmp_path / "run <&>", scores, [NASTY, "b"])
    page = Page(text)
    assert not page.open, "every tag is closed"
    assert not {"script", "link", "iframe", "i"} & {tag for tag, _ in page.tags}
    assert "url(" not in text and "@import" not in text and len(text) < 2_000_000
    figures, thumbnails = page.all("img")[:4], page.all("img")[4:]
    assert len(thumbnails) == 3 * 12 and all(image["alt"] for image in figures + thumbnails)
    for image, name in zip(figures, ("bars", "histograms", "roc", "samples"), strict=True):
        file = Image.open(tmp_path / f"run <&>/figures/{name}.png")
        assert decoded(image["src"]).tobytes() == file.tobytes() and np.asarray(file.convert("L")).std() > 5
    assert "default-src 'none'" in page.all("meta")[2]["content"] and "prefers-color-scheme: dark" in text
    anchors = [f"#{section['id']}" for section in page.all("section")]
    assert [link["href"] for link in page.all("a")] == anchors and len(anchors) == 4
    assert "run <&>" in page.text and NASTY in page.text


def test_tables_have_groups_scopes_and_small_deviations(tmp_path, scores, no_figures):
    row = DECISIONS.assign(ood_set="d&gs", decision="<b>", open_accuracy=0.5)
    text = html(tmp_path, scores, ["a", "b"], decisions=pd.concat([row, row.assign(id_kept=0.7)]))
    table = Page(text.split("<table>")[2].split("</table>")[0])
    assert [head.get("colspan") for head in table.all("th")] == ["1", "1", "2"] + [None] * 6
    assert [head["scope"] for head in table.all("th")] == ["colgroup"] * 3 + ["col"] * 5 + ["row"]
    assert "d&gs" in table.text and not table.all("b")
    assert "<b>80.00 ± 14.1460.00 ± 0.00" in table.text and len(table.all("small")) == 4


def test_thumbnails_are_small_and_tiny_images_exact(tmp_path, no_figures):
    sets, pixels = {}, {}
    for name, size in {"cats": (900, 1200), "dogs": (32, 32), "flat": (32, 32)}.items():
        pixels[name] = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels[name]).save(write_images(tmp_path / name, "a/1.png") / "a/1.png")
        sets[name] = set_scores(open_image_set(name, tmp_path / name), {"ATD": np.zeros(1)})
    dogs, _, cats = (section.all("img")[0] for section in gallery(tmp_path, sets, ["a"]))
    assert decoded(cats["src"]).size == (160, 120) and "class" not in cats and len(cats["src"]) < 30_000
    assert np.array_equal(decoded(dogs["src"]), pixels["dogs"]) and dogs["class"] == "pixels"


def test_a_large_figure_of_photos_becomes_a_jpeg(tmp_path):
    photos, chart = tmp_path / "photos.png", tmp_path / "chart.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)).save(photos)
    Image.new("RGB", (700, 700)).save(chart)
    assert decoded(figure_uri(photos)).format == "JPEG" and decoded(figure_uri(chart)).format == "PNG"
    assert len(figure_uri(photos)) < photos.stat().st_size
