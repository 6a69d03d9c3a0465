"""A YAML file and `key=value` words -> one checked Config; shipped configs are found by name."""

from __future__ import annotations

import difflib
import math
import reprlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from clipn.config.schema import Config, FeaturesConfig, ModelConfig, TrainConfig, require
from clipn.runtime.files import atomic_write

_PACKAGE = Path(__file__).resolve().parents[1]


def find_config(path: Path) -> Path:
    """This file, or the shipped config of this name (toy, toy.yaml, configs/toy.yaml).

    Raises FileNotFoundError that lists the shipped ones.
    """
    if path.is_file():
        return path
    shipped = sorted(_PACKAGE.glob("configs/*.yaml"))
    if path.parent in (Path(), Path("configs")):
        for file in shipped:
            if file.stem == path.name.removesuffix(".yaml"):
                return file
    raise FileNotFoundError(f"{path}: no such config file; those shipped are: {', '.join(p.stem for p in shipped)}")


def find_file(value: Any) -> Any:
    """A relative path to a .json or .txt file that is not here, but comes with the package; all else as it is.

    Shipped configs name such files from the folder above configs/, wherever the command is run.
    """
    if not isinstance(value, str) or not value.endswith((".json", ".txt")) or Path(value).is_file():
        return value
    return str(_PACKAGE / value) if (_PACKAGE / value).is_file() else value


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, or a shipped config's name (toy, cc3m_vit_b16), and `key=value` words into a checked Config.

    Raises FileNotFoundError for a missing file; ValueError, one line that names the file (or the command line), the
    key and the choices, for an unknown key, a wrong type or an impossible value.
    """
    path = find_config(Path(path))
    try:
        content = OmegaConf.load(path)
    except OSError as error:  # OmegaConf's word for a file that holds one bare value
        raise ValueError(f"{path}: expected sections ({_choices('')}), found a single value") from error
    except Exception as error:  # values that do not suit their YAML tag raise many kinds
        raise ValueError(f"{path}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: expected sections ({_choices('')}), found {reprlib.repr(content)}")
    tree = _merge(OmegaConf.structured(Config), content, str(path))
    for word in overrides:
        tree = _merge(tree, _parse_override(word), f"command line, {word}")
    config = _build(tree, str(path), overrides)
    config.model.name, config.eval.class_names = find_file(config.model.name), find_file(config.eval.class_names)
    return config


def base_config(config: Config) -> Config | None:
    """The settings of the base CLIP's own run, in run.dir/base, or None if `base` is empty.

    Raises ValueError as `load_config` does.
    """
    if not config.base:
        return None
    tree = OmegaConf.structured(Config)
    own = OmegaConf.create(to_dict(config) | {"base": {}, "eval": {}})
    if config.train.resume != "never":
        own.train.resume = "auto"  # a path is meant for the run itself
    # What only CLIPN's own training reads: a base serves runs that differ in it.
    own.data.source, own.train.micro_batch_size = "pairs", None
    own.features, own.model.num_prompts = FeaturesConfig(), ModelConfig().num_prompts
    for key in ("itbo_weight", "tso_weight", "tso_kind"):
        own.train[key] = getattr(TrainConfig(), key)
    tree = _merge(tree, own, "base")
    tree = _merge(tree, OmegaConf.create(config.base), "base")
    tree.run.dir, tree.run.seeds = str(Path(config.run.dir) / "base"), []
    return _build(tree, "base")


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved settings as plain dicts, lists, numbers and texts."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved settings as YAML that `load_config` reads back."""
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))).encode())


def _merge(tree: DictConfig, content: DictConfig, source: str) -> DictConfig:
    for section in content:
        value = content._get_node(section)
        if str(section) in _choices("").split(", ") and not isinstance(value, DictConfig):
            message = f"{source}: {section}: expected its keys ({_choices(section)}), found {reprlib.repr(value)}"
            raise ValueError(_one_line(message))
    if "base" in content and not content.base:  # merging with nothing would keep what is there
        tree = OmegaConf.merge(tree)
        tree.base = {}
    try:
        return OmegaConf.merge(tree, content)
    except Exception as error:  # OmegaConf's own errors, and a TypeError for a path into a list
        raise ValueError(_explain(error, source)) from error


def _build(tree: DictConfig, source: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    try:
        config = OmegaConf.to_object(tree)
        _check_finite(to_dict(config))
        base_config(config)  # an error in `base` is told before any work starts
    except OmegaConfBaseException as error:
        message = f"{error.full_key}: {_first_line(error)}"
    except ValueError as error:
        message = str(error)
    else:
        return config
    words = [word.partition("=")[0] for word in overrides]
    key = message.replace("base: ", "base.", 1)
    if any(key.startswith((f"{word}=", f"{word}:")) for word in words):
        source = "command line"
    raise ValueError(_one_line(message if message.startswith(f"{source}: ") else f"{source}: {message}"))


def _check_finite(tree: dict[str, Any], prefix: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            require(math.isfinite(value), prefix + key, value, "a finite number")


def _parse_override(word: str) -> DictConfig:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"command line, {word!r}: expected key=value, such as train.lr=1e-4")
    try:
        if not _is_text(key) or text in ("", "null") or text[0] in "'\"":
            return OmegaConf.from_dotlist([word])
        raise ValueError
    except (
        Exception
    ):  # a text as it stands: 2024_11_21 is no number then; or not YAML, such as a glob that starts with *
        tree = OmegaConf.create()
        try:
            OmegaConf.update(tree, key, text)
        except Exception as error:
            raise ValueError(_explain(error, f"command line, {word!r}")) from error
        return tree


def _is_text(key: str) -> bool:
    """Whether a setting is typed as a text."""
    section, _, name = key.partition(".")
    settings = getattr(Config(), section, None)
    return is_dataclass(settings) and any(f.name == name and f.type.startswith("str") for f in fields(settings))


def _explain(error: Exception, source: str) -> str:
    """One line for what OmegaConf found: the source, the key, and what could stand there."""
    key = str(getattr(error, "full_key", None) or getattr(error, "key", None) or "")
    if isinstance(error, ConfigKeyError):
        section, _, name = key.rpartition(".")
        choices = _choices(section)
        near = difflib.get_close_matches(name, choices.split(", "), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return _one_line(f"{source}: {key}: unknown key{hint}; the keys here are: {choices}")
    return _one_line(f"{source}: {key}: {_first_line(error)}" if key else f"{source}: {_first_line(error)}")


def _choices(section: str) -> str:
    node: Any = Config()
    for name in filter(None, section.split(".")):
        node = getattr(node, name, None)
    return ", ".join(f.name for f in fields(node)) if is_dataclass(node) else ""


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1})" if mark else ""
    return (str(error).strip().splitlines() or [type(error).__name__])[0] + place


def _one_line(text: str) -> str:
    return " ".join(text.split())
