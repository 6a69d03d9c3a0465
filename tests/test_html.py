"""report.html: whole in itself, safe with any name, and a gallery of the right pictures."""

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
from clipn.report.html import figure, gallery, page
from clipn.report.tables import Table
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
        assert self.open.pop() == tag, "tags are closed in turn"

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(source: str) -> Image.Image:
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", source).groups()
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.format.lower() == kind
    return image


@pytest.fixture
def found(tmp_path):
    """Twenty pictures each: ID in two classes, OOD in a class with a nasty name, OOD without labels.

    Picture n has a shade of its own, and the score n / 20 by ATD, 1 - n / 20 by MSP.
    """
    names = {"cats": ["a_tabby", "b"], "dogs": ["o&<i>"], "flat": [""]}
    sets, n = {}, np.arange(20)
    for name, classes in names.items():
        for number in n:
            path = tmp_path / name / classes[0 if number < 10 else -1] / f"{number:02d} <ü>.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (10 * int(number), 90, 160)).save(path)
        images = open_image_set(name, tmp_path / name)
        own = np.array([int(path.name[:2]) for path in images.paths])
        scores = {"ATD": own / 20, "MSP": 1 - own / 20}
        sets[name] = set_scores(images, scores, predicted=own % 2, p_yes=own / 100)
    return sets


@pytest.fixture
def results():
    rows = [
        {"id_set": "cats", "ood_set": name, "method": method, "AUROC": 0.5, "FPR95": fpr, "AUPR_IN": 0.1}
        | {"AUPR_OUT": 0.2, "id_accuracy": 0.5, "seed": 0}
        for name, fpr in (("dogs", 0.25), ("flat", 0.5))
        for method in ("ATD", "MSP")
    ]
    return pd.DataFrame(rows)


DECISIONS = pd.DataFrame(
    [{"id_set": "cats", "ood_set": "dogs", "decision": "CTW", "id_kept": 0.9, "ood_found": 0.6, "accuracy": 0.75}]
)


def parts(*arguments) -> list[str]:
    """The gallery's parts: the OOD sets, then the ID set."""
    return re.split("(?=<h3>)", gallery(*arguments))[1:]


def shades(part: str) -> list[int]:
    return [picture(image["src"]).getpixel((5, 5))[0] // 10 for image in Page(part).all("img")]


def test_the_gallery_shows_the_worst_first(found, results):
    dogs, flat, cats = parts(found, results, ["a tabby", "b"], "ATD")
    assert shades(dogs) == shades(flat) == list(range(19, 7, -1)), "OOD: the highest scores"
    assert shades(cats) == list(range(12)), "ID: the lowest"
    dogs, flat, cats = parts(found, results, ["a tabby", "b"], "MSP")
    assert shades(dogs) == list(range(12)) and shades(cats) == list(range(19, 7, -1))


def test_a_card_says_what_it_was_taken_for(found, results):
    dogs, flat, cats = (Page(part).text for part in parts(found, results, ["a tabby", NASTY], "ATD"))
    assert dogs.startswith("dogs (OOD): most sure to be ID25.00 % of its 20 images pass")
    assert f"o&<i>taken for {NASTY}ATD 0.9500pyes 0.190, pno 0.810" in dogs
    assert f"pass where 95 % of the ID do.\ntaken for {NASTY}ATD 0.9500" in flat, "no class of its own"
    assert "a tabbyclass rightATD 0.000" in cats and f"a tabbytaken for {NASTY}ATD 0.0500" in cats
    dogs, flat, cats = (Page(part).text for part in parts(found, results, ["o&<i>", "under_score"], "MSP"))
    assert "o&<i>taken for o&<i>MSP" in dogs, "an OOD image's class is never right, whatever its folder is called"
    assert "under_scoretaken for o&<i>" in cats and "tabby" not in cats, "the names that were asked for, as they are"


def test_the_page_needs_nothing_else(tmp_path, found, results):
    write_report(tmp_path / "run <&>", results, DECISIONS, found, [NASTY, "b"])
    text = (tmp_path / "run <&>" / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert not parsed.open, "every tag is closed"
    assert not {"script", "link", "iframe", "i"} & {tag for tag, _ in parsed.tags}
    assert "url(" not in text and "@import" not in text
    images = parsed.all("img")
    assert len(images) == 4 + 3 * 12 and all(min(picture(image["src"]).size) >= 12 for image in images)
    assert all(image["alt"] for image in images)
    assert "default-src 'none'" in parsed.all("meta")[2]["content"]
    anchors = {f"#{section['id']}" for section in parsed.all("section")}
    assert {a["href"] for a in parsed.all("a")} == anchors and len(anchors) == 4
    assert "run <&>" in parsed.text and NASTY in parsed.text and "Worst mistakes of ATD" in parsed.text
    assert len(text) < 2_000_000


def test_without_atd_the_last_method_is_shown(tmp_path, found, results):
    write_report(tmp_path / "run", results[results["method"] != "ATD"], DECISIONS, found, ["a", "b"])
    assert "Worst mistakes of MSP" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_thumbnails_are_small_and_tiny_pictures_exact(tmp_path, results):
    rng = np.random.default_rng(0)
    large, tiny = (
        rng.integers(0, 256, (900, 1200, 3), dtype=np.uint8),
        rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
    )
    sets = {}
    for name, pixels in {"cats": large, "dogs": tiny, "flat": tiny}.items():
        write_images(tmp_path / name, "a/1.png")
        Image.fromarray(pixels).save(tmp_path / name / "a/1.png")
        sets[name] = set_scores(open_image_set(name, tmp_path / name), {"ATD": np.zeros(1)})
    dogs, _, cats = (Page(part).all("img") for part in parts(sets, results, ["a"], "ATD"))
    assert picture(cats[0]["src"]).size == (160, 120) and "class" not in cats[0] and len(cats[0]["src"]) < 30_000
    assert np.array_equal(np.asarray(picture(dogs[0]["src"])), tiny) and dogs[0]["class"] == "pixels"


def test_a_figure_of_many_photos_becomes_a_jpeg(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos.png")
    Image.new("RGB", (700, 700)).save(tmp_path / "chart.png")
    shown = [Page(figure(tmp_path / f"{name}.png", 'a "caption"')).all("img")[0] for name in ("photos", "chart")]
    assert [picture(image["src"]).format for image in shown] == ["JPEG", "PNG"]
    assert shown[0]["alt"] == 'a "caption"' and len(shown[0]["src"]) < (tmp_path / "photos.png").stat().st_size


def test_an_empty_section_is_left_out():
    parsed = Page(page("t", [("one", "<p>1</p>"), ("two", ""), ("<three>", "<p>3</p>")]))
    assert "two" not in parsed.text and parsed.text.count("<three>") == 2, "in the list above, and over its section"


def test_a_table_with_groups():
    columns = [("", "method"), ("d&gs", "AUROC"), ("d&gs", "FPR95"), ("ID", "accuracy")]
    parsed = Page(Table(columns, [["<b>", "90.00 ± 1.00", "5.00", "–"]]).html())
    assert [head.get("colspan") for head in parsed.all("th")] == ["2", "1", None, None, None, None, None]
    assert "d&gs" in parsed.text and "<b>90.00 ± 1.005.00–" in parsed.text and not parsed.all("b")
