"""A YAML file and `key=value` words -> one checked Config; shipped configs are found by name."""

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from clipn.config.checks import require
from clipn.config.schema import Config, FeaturesConfig, ModelConfig, TrainConfig
from clipn.runtime.files import atomic_write

_PACKAGE = Path(__file__).resolve().parents[1]


def find_config(path: Path) -> Path:
    """This file, or the shipped config of this name (toy, toy.yaml, configs/toy.yaml)."""
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_PACKAGE.glob("configs/*.yaml"))}
    name = path.name.removesuffix(".yaml")
    if path.parent in (Path(), Path("configs")) and name in shipped:
        return shipped[name]
    raise FileNotFoundError(f"{path}: no such config file; the shipped configs are: {', '.join(shipped)}")


def find_file(value: Any) -> Any:
    """The path of a .json or .txt file in the package, as shipped configs name them; any other value as it is."""
    absent = isinstance(value, str) and value.endswith((".json", ".txt")) and not Path(value).is_file()
    return str(_PACKAGE / value) if absent and (_PACKAGE / value).is_file() else value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or a shipped config's name (toy, cc3m_vit_b16), and `key=value` words into a checked Config.

    Raises FileNotFoundError for a missing file that lists the shipped ones; ValueError, one line that names the file
    (or the command line), the key and the choices, for an unknown key, a wrong type or an impossible value.
    """
    path = find_config(Path(path))
    expected = f"expected sections ({_choices('')})"
    try:
        content = OmegaConf.load(path)
    except OSError as error:  # OmegaConf's error for a file that holds a single value
        raise ValueError(f"{path}: {expected}, found a single value") from error
    except Exception as error:  # values that do not fit their YAML tag raise many kinds
        raise ValueError(f"{path}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: {expected}, found {reprlib.repr(content)}")
    tree = _merge(OmegaConf.structured(Config), content, str(path))
    for word in overrides:
        key = word.partition("=")[0]
        if key in ("eval.id", "eval.ood", "eval.train"):  # replaced as a whole, also by a value of another kind
            OmegaConf.update(tree, key, None)
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
    own = OmegaConf.create(to_dict(config) | {"base": {}, "eval": {}, "probe": {}, "tagood": {}, "adversarial": {}})
    if config.train.resume != "never":
        own.train.resume = "auto"  # a path is meant for the run itself
    # Settings that only CLIPN's own training reads have their defaults, so that runs which differ in them share a base.
    own.data.source, own.data.val_shards, own.train.micro_batch_size = "pairs", "", None
    own.features = FeaturesConfig()
    for key in ("num_prompts", "no_tower", "adapter_width", "bias"):
        own.model[key] = getattr(ModelConfig(), key)
    for key in ("itbo_weight", "tso_weight", "tso_kind"):
        own.train[key] = getattr(TrainConfig(), key)
    tree = _merge(_merge(OmegaConf.structured(Config), own, "base"), OmegaConf.create(config.base), "base")
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
        if section in _fields("") and not isinstance(value, DictConfig):
            raise _error(source, f"{section}: expected its keys ({_choices(section)}), found {reprlib.repr(value)}")
    if "base" in content and not content.base:  # a merge with an empty mapping would keep what is there
        tree = OmegaConf.merge(tree)
        tree.base = {}
    try:
        return OmegaConf.merge(tree, content)
    except Exception as error:  # OmegaConf's own errors, and a TypeError for a path into a list
        raise _error(source, _explain(error)) from error


def _build(tree: DictConfig, source: str, overrides: Sequence[str] = ()) -> Config:
    try:
        config = OmegaConf.to_object(tree)
        _check_finite(to_dict(config))
        base_config(config)  # an error in `base` is reported before any work starts
        return config
    except OmegaConfBaseException as error:
        message = f"{error.full_key}: {_first_line(error)}"
    except ValueError as error:
        message = str(error).removeprefix(f"{source}: ")
    key = message.replace("base: ", "base.", 1)
    names = [word.partition("=")[0] for word in overrides]
    if any(key.startswith((f"{name}=", f"{name}:")) for name in names):
        source = "command line"
    raise _error(source, message)


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
    section, _, name = key.partition(".")
    is_text = _fields(section).get(name, "").startswith("str")
    if not is_text or text in ("", "null") or text[0] in "'\"":
        try:
            return OmegaConf.from_dotlist([word])
        except Exception:  # not YAML, such as a glob that starts with *
            pass
    try:  # a text as it is typed: 2024_11_21 is not a number
        tree = OmegaConf.create()
        OmegaConf.update(tree, key, text)
        return tree
    except Exception as error:
        raise _error(f"command line, {word!r}", _explain(error)) from error


def _explain(error: Exception) -> str:
    """The key and the reason of OmegaConf's error, and the choices for an unknown key."""
    key = str(getattr(error, "full_key", None) or getattr(error, "key", None) or "")
    if isinstance(error, ConfigKeyError):
        section, _, name = key.rpartition(".")
        near = difflib.get_close_matches(name, _fields(section), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: unknown key{hint}; the keys here are: {_choices(section)}"
    return f"{key}: {_first_line(error)}" if key else _first_line(error)


def _fields(section: str) -> dict[str, str]:
    """The settings of a section, or the sections of the config for "": names and types."""
    settings: Any = Config()
    for name in filter(None, section.split(".")):
        settings = getattr(settings, name, None)
    return {f.name: str(f.type) for f in dataclasses.fields(settings)} if dataclasses.is_dataclass(settings) else {}


def _choices(section: str) -> str:
    return ", ".join(_fields(section))


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1})" if mark else ""
    return (str(error).strip().splitlines() or [type(error).__name__])[0] + place


def _error(source: str, message: str) -> ValueError:
    """A ValueError of one line that starts with the source of the wrong setting."""
    return ValueError(" ".join(f"{source}: {message}".split()))
