"""Templates, their negations, and class names."""

import json
import re

import pytest
from helpers import messages
from hypothesis import given
from hypothesis import strategies as st
from open_clip import IMAGENET_CLASSNAMES

from clipn.data.prompts import (
    caption_labeller,
    check_templates,
    class_names_of,
    clipn_release_templates,
    fill,
    load_class_names,
    load_templates,
    negate,
    openai_templates,
    simple_templates,
    warn_of_shared_names,
)


def test_there_are_128_in_literal_quotes():
    templates = clipn_release_templates()
    assert len(templates) == 128
    for number, template in enumerate(templates):
        ending = "'," if number in (34, 64 + 34) else "'"
        assert re.fullmatch(r"'[^']*'", template.removesuffix(",")) and template.endswith(ending), (number, template)
        assert template.count("{}") == 1


def test_the_first_half_is_openais_list_without_nine_kinds():
    dropped = "embroidered|plastic|origami|toy|cartoon|plushie|hard to see|itap of my|art of the"
    openai, first = openai_templates(), [template.strip("',") for template in clipn_release_templates()[:64]]
    assert [text for text in openai if not re.search(dropped, text)] == first
    assert (len(openai), len(simple_templates())) == (80, 7)
    assert all(text.count("{}") == 1 for text in openai + simple_templates())


def test_the_second_half_has_with_for_of():
    templates = clipn_release_templates()
    for first, second in zip(templates[:64], templates[64:], strict=True):
        assert second == first.replace(" of ", " with ", 1).replace("in a video", "appearing in a video")
    for text in ("a bad photo of a {}.", "a bad photo with a {}.", "a {} appearing in a video game."):
        assert f"'{text}'" in templates
    assert "'a photo with one {}.'" in templates, "only the words between spaces"


@pytest.mark.parametrize(
    "yes, no",
    [
        ("a photo of a {}.", "a photo of no {}."),
        *[(f"a photo of {word} {{}}", "a photo of no {}") for word in ("an", "the", "my", "one", "many")],
        ("a photo of a clean {}", "a photo of no clean {}"),
        ("a photo of the hard to see {}.", "a photo of no hard to see {}."),
        ("a photo with a clean {}.", "a photo without a clean {}."),
        ("the {} in a video game", "no {} in a video game"),
        ("'a photo of a {}.',", "'a photo of no {}.',"),
        ("graffiti of {}", "graffiti of no {}"),
        ("{}", "no {}"),
        ("a pizza {}", "no pizza {}"),
    ],
)
def test_negations(yes, no):
    assert negate(yes) == no


def test_every_known_template_has_one_negation():
    for template in openai_templates() + simple_templates() + clipn_release_templates():
        negation = negate(template)
        assert len(re.findall(r"\bno |\bwithout ", negation)) == 1 and negation.count("{}") == 1
        assert not re.search(r"\bno (a|an|the|my|one|many) |\b(a|an|the|my|one|many) no ", negation)
        rest = re.sub(r"\b(no|without) ", "", negation)
        assert all(word.strip("'") in template for word in rest.split())


@given(before=st.text(max_size=20), text=st.text(max_size=20))
def test_filling_inserts_the_text_as_it_is(before, text):
    before = before.replace("{}", "")
    assert fill(before + " {} {0} }{", text) == f"{before} {text} {{0}} }}{{"


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("a small photo of the Truck", 0),
        ("a pickup truck seen in the wild", 1),  # no other class, though a part of its name is
        ("a pickup truck beside a truck", None),
        ("a firetruck, a kind of trucks", None),  # whole words alone
        ("an oak tree", 4),
        ("an oak", 5),
        ("an oak beside an oak tree", None),
        ("a C++ book, a book", 2),
        ("STRASSE", 3),
        ("", None),
    ],
)
def test_a_caption_belongs_to_the_one_class_that_it_names(caption, label):
    names = ["truck", "pickup truck", "book", "straße", "oak tree", "oak"]
    assert caption_labeller(names)(caption) == label
    assert caption_labeller([])(caption) is None


def test_templates_by_name_from_a_file_and_from_a_list(tmp_path):
    assert load_templates("clipn-release") == clipn_release_templates()
    assert load_templates("openai") == openai_templates() and load_templates("simple") == simple_templates()
    (tmp_path / "mine.txt").write_text("\ufeffa photo of a {}\n\n  a sketch of {}, café  \r\n", encoding="utf-8")
    assert load_templates(str(tmp_path / "mine.txt")) == ["a photo of a {}", "a sketch of {}, café"]
    assert load_templates(["{}", "a {}"]) == ["{}", "a {}"] and load_templates("a {}") == ["a {}"]


def test_templates_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval\.templates='opanai'.*clipn-release, openai, simple"):
        load_templates("opanai")
    for content, message in ((b"a {}\na photo\n", "'a photo' has no"), (b"\n", "expected a list"), (b"\xff", "UTF-8")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.txt: .*{message}"):
            load_templates(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize("value", [[], ["a photo"], ["{}", 3], None, {}])
def test_templates_of_a_wrong_form_are_refused(value):
    with pytest.raises(ValueError, match=r"eval\.templates"):
        load_templates(value)
    with pytest.raises(ValueError, match="expected a list"):
        check_templates("a {}")


FOLDERS = ["n01", "n02", "night_owl"]
WORDS = {"night_owl": "owl, night bird", "n02": "dög", "n01": "cat", "n03": "not asked for"}


@pytest.mark.parametrize(
    "value, folders, expected",
    [
        ("folders", FOLDERS, ["n01", "n02", "night owl"]),
        (["cat", " dog ", "owl"], FOLDERS, ["cat", "dog", "owl"]),
        (WORDS, FOLDERS, ["cat", "dög", "owl"]),
        ({"b": "dog, hound", "a": "cat"}, [], ["dog", "cat"]),
        (["cat", "dog"], [], ["cat", "dog"]),
        ("imagenet", [f"n{n:08d}" for n in range(1000)], list(IMAGENET_CLASSNAMES)),
    ],
)
def test_class_names_of_every_form(value, folders, expected):
    assert load_class_names(value, folders) == expected


@pytest.mark.parametrize(
    "name, text",
    [("x.txt", "\ufeffcat\n\n dög\nowl\n"), ("x.json", '["cat", "dög", "owl"]'), ("x.json", json.dumps(WORDS))],
)
def test_class_names_from_files(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_class_names(str(tmp_path / name), FOLDERS) == ["cat", "dög", "owl"]


@pytest.mark.parametrize(
    "value, message",
    [
        ("imagenet", "eval.class_names='imagenet': 1000 class names for 3 class folders"),
        (["a", "b", "c", "d"], "eval.class_names: 4 class names for 3"),
        ({"n01": "cat"}, r"'n02' \(2 in all\)"),
        (["cat", " ", "owl"], "eval.class_names: expected names, found an empty one"),
        ([], "eval.class_names: expected names, found none"),
        ({"n01": "", "n02": "b", "night_owl": "c"}, "eval.class_names: expected names, found an empty one"),
        (None, "eval.class_names: expected a list"),
        (1.5, "eval.class_names: expected a list"),
        (["a", None, "c"], "eval.class_names: None is no name; put it in quotes"),
        (["a", False, "c"], "eval.class_names: False is no name; put it in quotes"),
        ({"n01": ["cat", "tom"], "n02": "b", "night_owl": "c"}, "eval.class_names: .* is no name; put it in quotes"),
    ],
)
def test_class_names_that_do_not_fit_are_reported(value, message):
    with pytest.raises(ValueError, match=message):
        load_class_names(value, FOLDERS)


def test_name_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval\.class_names='imagnet'.*imagenet"):
        load_class_names("imagnet", FOLDERS)
    with pytest.raises(ValueError, match=r"eval\.class_names='folders': expected names, found none"):
        load_class_names("folders", [])  # of a flat folder
    for text, message in (("{", ": not valid"), ("3", ""), ('"abc"', ""), ('["cat", "dog"]', ".*2 class names for 3")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=rf"bad\.json{message}"):
            load_class_names(str(tmp_path / "bad.json"), FOLDERS)


def test_names_that_classes_share_are_a_warning(caplog):
    assert load_class_names(["sunglasses", "key", "sunglasses"], ["a", "b", "c"]).count("sunglasses") == 2
    assert "several classes have the same name" in caplog.text and "sunglasses" in caplog.text
    caplog.clear()
    warn_of_shared_names([str(n) for n in (*range(8), *range(7))], "names")
    assert messages(caplog) == (
        "names: several classes have the same name, so they cannot be distinguished: 0, 1, 2, 3, 4 and 2 more"
    )
    caplog.clear()
    assert class_names_of("cat,dog,cat") == ["cat", "dog", "cat"] and not caplog.text, "the Detector warns"
