"""Templates, their negations, and class names."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

from clipn.data.prompts import (
    check_templates,
    clipn_release_templates,
    fill,
    load_class_names,
    load_templates,
    negate,
    openai_templates,
    simple_templates,
)

DROPPED = ["embroidered", "plastic", "origami", "toy", "cartoon", "plushie"]
DROPPED += ["hard to see", "itap of my", "art of the"]


# The templates of the published results


def test_there_are_128_in_literal_quotes():
    templates = clipn_release_templates()
    assert len(templates) == 128
    for number, template in enumerate(templates):
        ending = "'," if number in (34, 64 + 34) else "'"
        assert re.fullmatch(r"'[^']*'", template.removesuffix(",")) and template.endswith(ending), (number, template)
        assert template.count("{}") == 1


def test_the_first_half_is_openais_list_without_nine_kinds():
    first = [template.strip("',") for template in clipn_release_templates()[:64]]
    openai = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    assert len(openai) == 80
    assert [text for text in openai if text in first] == first, "in OpenAI's order"
    assert all(any(words in text for words in DROPPED) for text in openai if text not in first)
    assert not any(words in text for words in DROPPED for text in clipn_release_templates())


def test_the_second_half_says_with_for_of():
    templates = clipn_release_templates()
    for first, second in zip(templates[:64], templates[64:], strict=True):
        expected = first.replace(" of ", " with ", 1).replace("in a video game", "appearing in a video game")
        assert second == expected
    assert "'a bad photo of a {}.'" in templates and "'a bad photo with a {}.'" in templates
    assert "'a {} in a video game.'" in templates and "'a {} appearing in a video game.'" in templates
    assert "'a photo with one {}.'" in templates, "only the words between spaces"


def test_each_call_gives_a_list_of_its_own():
    clipn_release_templates().clear()
    assert len(clipn_release_templates()) == 128


def test_openais_templates():
    assert len(openai_templates()) == 80 and openai_templates()[0] == "a bad photo of a {}."
    assert len(simple_templates()) == 7
    assert all(text.count("{}") == 1 for text in openai_templates() + simple_templates())


# Negations


@pytest.mark.parametrize(
    "yes, no",
    [
        ("a photo of a {}.", "a photo of no {}."),
        ("a photo of an {}", "a photo of no {}"),
        ("a photo of the {}", "a photo of no {}"),
        ("a photo of my {}", "a photo of no {}"),
        ("a photo of one {}", "a photo of no {}"),
        ("a photo of many {}", "a photo of no {}"),
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
        twin = negate(template)
        assert len(re.findall(r"\bno |\bwithout ", twin)) == 1 and twin.count("{}") == 1
        assert not re.search(r"\bno (a|an|the|my|one|many) |\b(a|an|the|my|one|many) no ", twin)
        rest = re.sub(r"\b(no|without) ", "", twin)
        assert all(word.strip("'") in template for word in rest.split())


@given(before=st.text(max_size=20), text=st.text(max_size=20))
def test_filling_puts_the_text_as_it_is(before, text):
    before = before.replace("{}", "")
    assert fill(before + " {} {0} }{", text) == f"{before} {text} {{0}} }}{{"


# Reading templates


def test_templates_by_name():
    assert load_templates("clipn-release") == clipn_release_templates()
    assert load_templates("openai") == openai_templates()
    assert load_templates("simple") == simple_templates()


def test_templates_from_a_file_and_a_list(tmp_path):
    (tmp_path / "mine.txt").write_text("\ufeffa photo of a {}\n\n  a sketch of {}, café  \r\n", encoding="utf-8")
    assert load_templates(str(tmp_path / "mine.txt")) == ["a photo of a {}", "a sketch of {}, café"]
    assert load_templates(["{}", "a {}"]) == ["{}", "a {}"]


def test_templates_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval\.templates='opanai'.*clipn-release, openai, simple"):
        load_templates("opanai")
    (tmp_path / "bad.txt").write_text("a {}\na photo\n")
    with pytest.raises(ValueError, match=r"bad\.txt: 'a photo' has no"):
        load_templates(str(tmp_path / "bad.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        load_templates(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("value", [[], ["a photo"], ["{}", 3], None, {}])
def test_templates_of_a_wrong_form(value):
    with pytest.raises(ValueError, match=r"eval\.templates"):
        load_templates(value)


def test_one_text_is_no_list_of_templates():
    with pytest.raises(ValueError, match="expected a list"):
        check_templates("a {}")


# Class names

FOLDERS = ["n01", "n02", "night_owl"]


def test_names_from_the_folders():
    assert load_class_names("folders", FOLDERS) == ["n01", "n02", "night owl"]


def test_names_from_a_list_or_a_dict():
    assert load_class_names(["cat", " dog ", "owl"], FOLDERS) == ["cat", "dog", "owl"]
    words = {"night_owl": "owl, night bird", "n02": "dog", "n01": "cat", "n03": "not asked for"}
    assert load_class_names(words, FOLDERS) == ["cat", "dog", "owl"]


def test_names_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffcat\ngrüne Meerkatze\n\nowl\n", encoding="utf-8")
    assert load_class_names(str(tmp_path / "names.txt"), FOLDERS) == ["cat", "grüne Meerkatze", "owl"]
    (tmp_path / "list.json").write_text(json.dumps(["cat", "dog", "owl"]))
    assert load_class_names(str(tmp_path / "list.json"), FOLDERS) == ["cat", "dog", "owl"]
    (tmp_path / "words.json").write_text(json.dumps({"n02": "dog, hound", "n01": "cat", "night_owl": "owl"}))
    assert load_class_names(str(tmp_path / "words.json"), FOLDERS) == ["cat", "dog", "owl"]


def test_names_of_imagenet():
    folders = [f"n{n:08d}" for n in range(1000)]
    assert load_class_names("imagenet", folders) == list(IMAGENET_CLASSNAMES)
    with pytest.raises(ValueError, match="1000 class names for 3 class folders"):
        load_class_names("imagenet", FOLDERS)


def test_a_flat_folder_takes_any_number_of_names():
    assert load_class_names(["cat", "dog"], []) == ["cat", "dog"]


def test_the_number_of_names_is_checked(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"names\.txt.*2 class names for 3 class folders"):
        load_class_names(str(tmp_path / "names.txt"), FOLDERS)
    with pytest.raises(ValueError, match="4 class names for 3"):
        load_class_names(list("abcd"), FOLDERS)


def test_a_folder_without_a_name_is_named():
    with pytest.raises(ValueError, match=r"'n02' \(2 in all\)"):
        load_class_names({"n01": "cat"}, FOLDERS)


@pytest.mark.parametrize("value", [["cat", " ", "owl"], [], None, {}, {"n01": "", "n02": "b", "night_owl": "c"}])
def test_empty_names_are_refused(value):
    with pytest.raises(ValueError, match=r"eval\.class_names"):
        load_class_names(value, FOLDERS)


def test_names_from_a_flat_folders_own_name_are_refused():
    with pytest.raises(ValueError, match=r"eval\.class_names='folders'"):
        load_class_names("folders", [])


@pytest.mark.parametrize("value", [3, 1.5, True])
def test_names_of_a_wrong_form_are_refused(value):
    with pytest.raises(ValueError, match=r"eval\.class_names"):
        load_class_names(value, FOLDERS)


def test_name_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval\.class_names='imagnet'.*imagenet"):
        load_class_names("imagnet", FOLDERS)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: not valid JSON"):
        load_class_names(str(tmp_path / "bad.json"), FOLDERS)
    (tmp_path / "three.json").write_text("3")
    with pytest.raises(ValueError, match=r"three\.json"):
        load_class_names(str(tmp_path / "three.json"), FOLDERS)
    (tmp_path / "word.json").write_text('"abc"')
    with pytest.raises(ValueError, match=r"word\.json"):
        load_class_names(str(tmp_path / "word.json"), FOLDERS)


def test_names_that_classes_share_are_allowed_and_told(caplog):
    assert load_class_names(["sunglasses", "key", "sunglasses"], ["a", "b", "c"]).count("sunglasses") == 2
    assert "several classes have the same name" in caplog.text and "sunglasses" in caplog.text


@pytest.mark.parametrize("names", [[None, "key"], [False, "key"], {"a": ["cat", "tom"], "b": "key"}])
def test_what_is_no_name_is_told(names):
    with pytest.raises(ValueError, match="eval.class_names: .* is no name; put it in quotes"):
        load_class_names(names, ["a", "b"])
