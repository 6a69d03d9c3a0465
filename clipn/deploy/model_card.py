"""What a run says of itself to others, and the model card made of it: nothing that the run does not say."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from open_clip.pretrained import get_pretrained_cfg

from clipn.data.image_sets import open_image_sets
from clipn.data.prompts import load_class_names
from clipn.model.checkpoint import last_checkpoint
from clipn.report.tables import Table, decisions_table, percent, results_table, run_number

log = logging.getLogger(__name__)

_COPYING = 60  # seconds by which a copied run's files may lie apart, in any order

# The settings that say to others what was trained and judged, and how: none but _FILES holds a path.
_TOLD = {
    "run": "seed",
    "model": "num_prompts image_mean image_std",
    "data": "source shards num_pairs caption_templates crop_scale flip color_jitter erase",
    "features": "views dtype seed",
    "train": "objective epochs batch_size lr betas eps weight_decay warmup_steps "
    "itbo_weight tso_weight tso_kind precision",
    "eval": "class_names templates methods scale precision",
}
_FILES = ("shards", "class_names", "templates")

_SHOWN = {  # in the card
    "epochs": "epochs",
    "batch_size": "pairs in a batch",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "warmup_steps": "steps of warm-up",
    "tso_kind": "TSO",
    "precision": "precision",
}

_CITATION = """@inproceedings{wang2023clipn,
  title     = {CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No},
  author    = {Wang, Hualiang and Li, Yi and Yao, Huifeng and Li, Xiaomeng},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023},
  pages     = {1802--1812}
}"""


def run_facts(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """What a checkpoint and its run's folder say of its training and evaluation, as JSON values; null for the rest."""
    config, training = content.get("config") or {}, content.get("training") or {}
    results, decisions = (_rows(file, name) for name in ("results.csv", "decisions.csv"))
    settings = config.get("eval") or {}
    if not settings.get("id") or {row["method"] for row in results} != set(settings.get("methods") or ()):
        settings = {}  # the results are of another evaluation than the run's own
    config = config | {"eval": settings}
    return {
        "name": str(content.get("name") or file.stem),
        "epoch": content.get("epoch"),
        "steps": training.get("step", content.get("steps")),
        "pairs": training.get("pairs", content.get("pairs")),
        "config": _told(config) | ({"base": _told(config["base"])} if config.get("base") else {}),
        "class_names": _class_names(settings),
        "results": results,
        "decisions": decisions,
    }


def model_card(facts: dict[str, Any], repo: str | None = None) -> str:
    """The README.md of a shared folder, in Markdown with the hub's YAML on top.

    facts: what a shared file's header tells. repo: its user/repo on the hub.
    """
    sections = {
        "Use": _use(facts, repo),
        "Base": _base(facts),
        "Training": _training(facts),
        "Results": _results(facts),
        "Limits": _limits(facts),
        "License": facts["license"] and f"These weights: {facts['license']}. The base has a license of its own.",
        "Citation": f"```bibtex\n{_CITATION}\n```",
    }
    sections["License"] = sections["License"] or "Whoever shared these weights has not stated their license."
    parts = [f"## {heading}\n\n{text}\n" for heading, text in sections.items() if text]
    return "\n".join([f"---\n{_front_matter(facts)}---\n", _opening(facts, repo), *parts])


def _front_matter(facts: dict[str, Any]) -> str:
    """The hub's own fields. Without a license the hub shows none."""
    hub = get_pretrained_cfg(facts["model_name"], facts["pretrained"]).get("hf_hub") if facts["pretrained"] else None
    fields = {
        "license": facts["license"],
        "library_name": "clipn",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clipn", "clip", "open_clip", "out-of-distribution-detection"],
        "base_model": "/".join(hub.split("/")[:2]) if hub else None,
        "base_model_relation": "adapter" if hub else None,
    }
    return yaml.safe_dump({key: value for key, value in fields.items() if value}, sort_keys=False, allow_unicode=True)


def _opening(facts: dict[str, Any], repo: str | None) -> str:
    name = repo.rpartition("/")[2] if repo else facts["name"]
    prompts = (facts["config"].get("model") or {}).get("num_prompts")
    with_prompts = f" and its {prompts} prompts" if prompts else ""
    return f"""# {name}: a "no" text tower for {_base_name(facts)}

[CLIPN](https://arxiv.org/abs/2308.12213) gives a frozen CLIP a second, "no" text tower. From class names alone it says
for any image which class it shows, or that it shows none of them: zero-shot out-of-distribution (OOD) detection.
`clipn.safetensors` holds the no tower{with_prompts} alone: {facts["parameters"]:,} numbers in {facts["dtype"]}.
"""


def _use(facts: dict[str, Any], repo: str | None) -> str:
    names = json.dumps((facts["class_names"] or ["cat", "dog", "bird"])[:3], ensure_ascii=False)
    base = "" if facts["pretrained"] else '    base="path/to/the/base.pt",\n'
    return f"""With the Python package `clipn-ood`:

```python
import clipn

detector = clipn.Detector.from_pretrained(
    "hf://{repo or "USER/REPO"}",
    class_names={names},
{base})
for result in detector.predict(["a.jpg", "b.jpg"]):
    print(result.label, result.is_ood, result.score)
```

A path of this folder does as well as `hf://`. A higher score means in-distribution."""


def _base(facts: dict[str, Any]) -> str:
    found = "open_clip fetches it" if facts["pretrained"] else "Its checkpoint is to be given as `base`"
    text = f"Frozen: {_base_name(facts)}. {found}; loading checks its weights' SHA-256, `{facts['base_sha256']}`."
    preprocess = facts["preprocess"]
    if not preprocess:
        return text
    size = preprocess["size"]
    size = " x ".join(map(str, [size, size] if isinstance(size, int) else size))
    mean, std = (", ".join(f"{value:.4g}" for value in preprocess[key]) for key in ("mean", "std"))
    return f"{text} Images are {size} pixels, normalised with mean {mean} and deviation {std}."


def _training(facts: dict[str, Any]) -> str:
    """A list of what is known, perhaps nothing."""
    train, data = facts["config"].get("train") or {}, facts["config"].get("data") or {}
    shards = data.get("shards")
    shards = ", ".join([shards] if isinstance(shards, str) else shards or [])
    pairs = data.get("num_pairs") or facts["pairs"]
    told = {
        "data": facts["data"],
        "files": shards and f"`{shards}`",
        "image-caption pairs": pairs and f"{pairs:,}",
        "steps": facts["steps"] and f"{facts['steps']:,}",
        **{words: train.get(key) for key, words in _SHOWN.items()},
        "seed": (facts["config"].get("run") or {}).get("seed"),
    }
    return "\n".join(f"- {words}: {value}" for words, value in told.items() if value not in (None, ""))


def _results(facts: dict[str, Any]) -> str:
    if not facts["results"]:
        return ""
    results, settings = pd.DataFrame(facts["results"]), facts["config"].get("eval") or {}
    accuracy = results["id_accuracy"].dropna()
    known = f", accuracy {percent(accuracy[:1])}" if len(accuracy) else ""
    text = f"ID: {results['id_set'].iloc[0]}{known}. AUROC (higher is better) and FPR95 (lower) in percent."
    how = "ID is the positive class; FPR95 is the share of OOD images let through where 95 % of ID are kept."
    if settings:
        templates = settings["templates"] if isinstance(settings["templates"], str) else "the run's own"
        how += f" Prompts: {templates}; cosines times {settings['scale']:g}."
    if facts["class_names"] and len(facts["class_names"]) <= 100:
        how += f" ID classes: {', '.join(facts['class_names'])}."
    parts = [text, _markdown(results_table(results)), how]
    if facts["decisions"]:
        parts += ["Threshold-free decisions, in percent:", _markdown(decisions_table(pd.DataFrame(facts["decisions"])))]
    return "\n\n".join(parts)


def _limits(facts: dict[str, Any]) -> str:
    judged = "on the image sets above alone" if facts["results"] else "on no image set that is known here"
    return f"""- The no tower means nothing beside another base than its own.
- It was judged {judged}; on other images and classes it may do better or worse, so try it on yours.
- CTW and ATD decide by themselves; a threshold of your own comes from `detector.calibrate(your images)`.
- What the base has learned, its biases too, is in the result."""


def _base_name(facts: dict[str, Any]) -> str:
    name = facts["model_name"] or "a CLIP of its own"
    return f"{name} ({facts['pretrained']})" if facts["pretrained"] else name


def _markdown(table: Table) -> str:
    return table.markdown().rstrip()


def _told(config: dict[str, Any]) -> dict[str, Any]:
    if (config.get("data") or {}).get("source") != "features":
        config = config | {"features": {}}
    told = {}
    for section, keys in _TOLD.items():
        known = {key: value for key, value in (config.get(section) or {}).items() if key in keys.split()}
        told[section] = {key: _without_folders(value, key) if key in _FILES else value for key, value in known.items()}
    return {section: settings for section, settings in told.items() if settings}


def _without_folders(value: Any, key: str) -> Any:
    """A path or address without its folders and query, which may hold a name or a key; a list of texts as it is."""
    if isinstance(value, list):
        return [_without_folders(one, key) for one in value] if key == "shards" else value
    return re.split(r"[/\\]", value.partition("?")[0])[-1] if isinstance(value, str) else value


def _class_names(settings: dict[str, Any]) -> list[str] | None:
    """The class names that a run was judged with, if its ID images are still there."""
    try:
        id_set = open_image_sets(settings["id"], "eval.id")[0]
        return load_class_names(settings["class_names"], id_set.classes)
    except (KeyError, ValueError, OSError):
        return None


def _rows(file: Path, name: str) -> list[dict[str, Any]]:
    """A table of the run's folder as rows, if it is of this very checkpoint alone."""
    path = file.parent.parent / name
    last = last_checkpoint(path.parent)
    if not path.is_file() or not last.is_file() or not last.samefile(file):
        return []
    table = pd.read_csv(path)
    if path.stat().st_mtime < last.stat().st_mtime - _COPYING or run_number(table).any():
        log.warning("%s is older than %s, or of several checkpoints: left out", path, last)
        return []
    return json.loads(table.to_json(orient="records", double_precision=15))
