"""Texts: prompt templates, their negations, and class names."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

log = logging.getLogger(__name__)

# The published evaluation drops OpenAI's templates with these words; its template number 34 has a comma at the end.
_DROPPED = "embroidered|plastic|origami|toy|cartoon|plushie|hard to see|itap of my|art of the"
_STRAY_COMMA = 34


def openai_templates() -> list[str]:
    """OpenAI's 80 templates for ImageNet, as strings with "{}"."""
    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def simple_templates() -> list[str]:
    """OpenAI's 7 best templates for ImageNet, as strings with "{}"."""
    return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]


def clipn_release_templates() -> list[str]:
    """The 128 templates of CLIPN's published results, with the quotes and the comma that were encoded too."""
    quoted = [f"'{text}'" for text in openai_templates() if not re.search(_DROPPED, text)]
    quoted[_STRAY_COMMA] += ","
    video = "in a video game"
    second = [text.replace(" of ", " with ", 1).replace(video, f"appearing {video}") for text in quoted]
    return quoted + second


TEMPLATE_SETS = {"clipn-release": clipn_release_templates, "openai": openai_templates, "simple": simple_templates}

# The class name with its determiner, if any, and up to three words between: "a hard to see {}".
_NOUN_PHRASE = re.compile(r"(?:\b(?:a|an|the|my|one|many)\s+)?((?:(?<=\s)(?!(?:a|an|the|of)\s)[\w-]+\s+){0,3})\{\}")


def negate(template: str) -> str:
    """The negation of a template by the published rule: "of a clean {}." -> "of no clean {}.", "with" -> "without"."""
    if " with " in template:
        return template.replace(" with ", " without ", 1)
    return _NOUN_PHRASE.sub(r"no \1{}", template, count=1)


def caption_labeller(names: Sequence[str]) -> Callable[[str], int | None]:
    """A function of a caption: the number of the class whose name is in it, or None if no name or several are.

    Names are whole words, in any case. Of names within each other the longest counts: "truck" is not in "pickup truck".
    """
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    longest_first = sorted(numbers, key=len, reverse=True)
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")

    def label(caption: str) -> int | None:
        found = {numbers[name] for name in pattern.findall(caption.casefold()) if name}
        return found.pop() if len(found) == 1 else None

    return label


def fill(template: str, text: str) -> str:
    """The template with `text` for each "{}"; other braces stay."""
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
    """Templates from a set's name, a text with "{}", a text file (one per line), or a list.

    Raises ValueError or FileNotFoundError.
    """
    if not isinstance(value, (str, Path)):
        return check_templates(value, source)
    value = str(value)
    if value in TEMPLATE_SETS:
        return TEMPLATE_SETS[value]()
    if "{}" in value:
        return [value]
    if not Path(value).is_file():
        expected = f"no such file, no text with {{}}, nor one of {', '.join(TEMPLATE_SETS)}"
        raise FileNotFoundError(f"{source}={value!r}: {expected}")
    return check_templates(read_lines(Path(value)), value)


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list. Raises ValueError if there is none, or one that is empty or no string."""
    names = list(class_names) if isinstance(class_names, Iterable) else []
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if isinstance(class_names, str) or not names or wrong:
        value = f"{wrong[0]!r} among them" if wrong else repr(class_names)
        raise ValueError(f"class_names: expected a list of at least one name, none of them empty; found {value}")
    return names


def load_class_names(value: Any, folders: Sequence[str] = (), source: str = "eval.class_names") -> list[str]:
    """One class name per class folder, in the order of `folders`.

    value: "folders" (the folder names, underscores as spaces), "imagenet" (open_clip's 1000), a list, a .txt file
    (one per line), or a .json file or dict with a list, or with a name (or "name, synonym, ...") for each folder.
    Without folders, the order of the dict counts. Raises ValueError or FileNotFoundError for names that do not fit;
    warns of names that classes share.
    """
    names = _class_names(value, folders, source)
    warn_of_shared_names(names, f"{source}={value!r}" if isinstance(value, str) else source)
    return names


def warn_of_shared_names(names: Sequence[str], source: str = "class_names") -> None:
    """Warn if several classes have the same name, as in ImageNet, and name some."""
    shared = sorted(name for name, count in Counter(names).items() if count > 1)
    if shared:
        first = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
        log.warning("%s: several classes have the same name, so they cannot be distinguished: %s", source, first)


def class_names_of(value: str, source: str = "--classes") -> list[str]:
    """The class names of a command-line option: a file as in `load_class_names`, imagenet, or cat,dog.

    The Detector that they are for warns of names that classes share.
    """
    if value == "imagenet" or (Path(value).exists() and not Path(value).is_dir()):
        return _class_names(value, (), source)
    if "," not in value:
        raise FileNotFoundError(f"{source}={value!r}: no such file; names are given as cat,dog (one alone as cat,)")
    return _class_names([name for name in value.split(",") if name.strip()], (), source)


def _class_names(value: Any, folders: Sequence[str], source: str) -> list[str]:
    source = f"{source}={value!r}" if isinstance(value, str) else source
    names = value
    if value == "folders":
        names = [folder.replace("_", " ") for folder in folders]
    elif value == "imagenet":
        names = list(IMAGENET_CLASSNAMES)
    elif isinstance(value, str):
        names = _read_names(Path(value), source)
    if isinstance(names, dict):
        if missing := [folder for folder in folders if folder not in names]:
            raise ValueError(f"{source}: no name for the class folder {missing[0]!r} ({len(missing)} in all)")
        synonyms = [names[folder] for folder in folders or names]
        names = [name.split(",")[0] if isinstance(name, str) else name for name in synonyms]
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"{source}: expected a list of names, or a name for each class folder; found {names!r}")
    if wrong := [name for name in names if not isinstance(name, (str, int)) or isinstance(name, bool)]:
        raise ValueError(f"{source}: {wrong[0]!r} is no name; put it in quotes")  # YAML reads no and null otherwise
    names = [str(name).strip() for name in names]
    if not names or not all(names):
        raise ValueError(f"{source}: expected names, found {'an empty one' if names else 'none'}")
    if folders and len(names) != len(folders):
        raise ValueError(f"{source}: {len(names)} class names for {len(folders)} class folders")
    return names


def _read_names(path: Path, source: str) -> Any:
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"{source}: no such file, nor 'imagenet' or 'folders'")
    if path.suffix != ".json":
        return read_lines(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises ValueError for one that is not in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
