"""Texts: prompt templates, their negations, and class names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

log = logging.getLogger(__name__)

# What the published evaluation leaves out of OpenAI's 80 ImageNet templates, and where its list has a stray comma.
_LEFT_OUT = (
    "embroidered",
    "plastic",
    "origami",
    "toy",
    "cartoon",
    "plushie",
    "hard to see",
    "itap of my",
    "art of the",
)
_STRAY_COMMA = 34


def openai_templates() -> list[str]:
    """OpenAI's 80 templates for ImageNet, as texts with "{}"."""
    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def simple_templates() -> list[str]:
    """OpenAI's 7 best templates for ImageNet, as texts with "{}"."""
    return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]


def clipn_release_templates() -> list[str]:
    """The 128 templates behind CLIPN's published results.

    The single quotes, and one comma after them, were part of the encoded texts.
    """
    kept = [text for text in openai_templates() if not any(words in text for words in _LEFT_OUT)]
    quoted = [f"'{text}'" for text in kept]
    quoted[_STRAY_COMMA] += ","
    video = "in a video game"
    second = [text.replace(" of ", " with ", 1).replace(video, f"appearing {video}") for text in quoted]
    return quoted + second


# The class name with its determiner, if it has one, and up to three words between: "a hard to see {}".
_NOUN_PHRASE = re.compile(r"(?:\b(?:a|an|the|my|one|many)\s+)?((?:(?<=\s)(?!(?:a|an|the|of)\s)[\w-]+\s+){0,3})\{\}")

TEMPLATE_SETS = {
    "clipn-release": clipn_release_templates,
    "openai": openai_templates,
    "simple": simple_templates,
}


def negate(template: str) -> str:
    """The hand-crafted "no" twin of a template, by the rule behind the published list.

    "a photo of a clean {}." -> "a photo of no clean {}.", "a photo with a {}." -> "a photo without a {}.".
    """
    if " with " in template:
        return template.replace(" with ", " without ", 1)
    return _NOUN_PHRASE.sub(r"no \1{}", template, count=1)


def fill(template: str, text: str) -> str:
    """The template with `text` in the place of each "{}"; other braces stay as they are."""
    return template.replace("{}", text)


def check_templates(templates: Sequence[str], source: str = "templates") -> list[str]:
    """The templates as a list. Raises ValueError if there is none, or one without "{}"."""
    if not isinstance(templates, Sequence) or isinstance(templates, str) or not templates:
        raise ValueError(f"{source}: expected a list of at least one template, found {templates!r}")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f'{source}: {template!r} has no "{{}}" for the class name')
    return list(templates)


def load_templates(value: Any, source: str = "eval.templates") -> list[str]:
    """Templates from a set's name, a text file (one per line), or a list. `source`: who gave it, for messages.

    Raises ValueError or FileNotFoundError that names the value and the choices.
    """
    if not isinstance(value, (str, Path)):
        return check_templates(value, source)
    value = str(value)
    if value in TEMPLATE_SETS:
        return TEMPLATE_SETS[value]()
    if not Path(value).is_file():
        raise FileNotFoundError(f"{source}={value!r}: no such file, nor one of {', '.join(TEMPLATE_SETS)}")
    return check_templates(_lines(Path(value)), value)


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list. Raises ValueError if there is none, or one that is empty or no text."""
    names = list(class_names) if isinstance(class_names, Iterable) else []
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if isinstance(class_names, str) or not names or wrong:
        found = f"{wrong[0]!r} among them" if wrong else repr(class_names)
        raise ValueError(f"class_names: expected a list of at least one name, none of them empty; found {found}")
    return names


def load_class_names(value: Any, folders: Sequence[str] = (), source: str = "eval.class_names") -> list[str]:
    """One class name per class folder, in the order of `folders`.

    value: "folders" (the folder names, underscores as spaces), "imagenet" (open_clip's 1000), a list, a .txt file
    (one per line), or a .json file or dict with a list, or with a name (or "name, synonym, ...") for each folder.
    Without folders a dict's own order counts.

    Raises ValueError when the number differs from the folders', FileNotFoundError for a missing file.
    """
    source = f"{source}={value!r}" if isinstance(value, str) else source
    names = value
    if value == "folders":
        names = [folder.replace("_", " ") for folder in folders]
    elif value == "imagenet":
        names = list(IMAGENET_CLASSNAMES)
    elif isinstance(value, str):
        names = _read_names(Path(value), source)
    if isinstance(names, dict) and not folders:
        names = [n.split(",")[0] if isinstance(n, str) else n for n in names.values()]
    elif isinstance(names, dict):
        absent = [folder for folder in folders if folder not in names]
        if absent:
            raise ValueError(f"{source}: no name for the class folder {absent[0]!r} ({len(absent)} in all)")
        names = [n.split(",")[0] if isinstance(n := names[folder], str) else n for folder in folders]
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"{source}: expected a list of names, or a name for each class folder; found {names!r}")
    strange = [name for name in names if not isinstance(name, (str, int)) or isinstance(name, bool)]
    if strange:  # YAML reads no and null as something else
        raise ValueError(f"{source}: {strange[0]!r} is no name; put it in quotes")
    names = [str(name).strip() for name in names]
    if not names or not all(names):
        raise ValueError(f"{source}: expected names, found {'an empty one' if names else 'none'}")
    if folders and len(names) != len(folders):
        raise ValueError(f"{source}: {len(names)} class names for {len(folders)} class folders")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:  # ImageNet has such
        log.warning("%s: several classes have one name, so nothing tells them apart: %s", source, ", ".join(twice))
    return names


def class_names_of(value: str, source: str = "--classes") -> list[str]:
    """The names that a command is given: a file as in `load_class_names`, imagenet, or names such as cat,dog.

    Raises ValueError or FileNotFoundError that names the value.
    """
    if value == "imagenet" or (Path(value).exists() and not Path(value).is_dir()):
        return load_class_names(value, source=source)
    if "," not in value:
        raise FileNotFoundError(f"{source}={value!r}: no such file; names are given as cat,dog (one alone as cat,)")
    return load_class_names([name for name in value.split(",") if name.strip()], source=source)


def _read_names(path: Path, source: str) -> Any:
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"{source}: no such file, nor 'imagenet' or 'folders'")
    if path.suffix != ".json":
        return _lines(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
