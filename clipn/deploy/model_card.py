"""The facts that a shared file states about its run, and its model card: README.md from model_card.md.j2."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from open_clip.pretrained import get_pretrained_cfg

from clipn.evaluation.record import RECORD, read_record
from clipn.model.checkpoint import checkpoint_folder
from clipn.report.tables import accuracy_varies, decisions_table, markdown, results_table

log = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("model_card.md.j2")

# The settings that describe training and evaluation to others. Only those of _PATHS hold paths.
_PUBLIC = {
    "run": "seed",
    "model": "num_prompts no_tower bias image_mean image_std",
    "data": "source shards num_pairs caption_templates crop_scale flip color_jitter erase",
    "features": "views dtype seed",
    "train": "objective epochs batch_size lr betas eps weight_decay warmup_steps "
    "itbo_weight tso_weight tso_kind precision",
    "eval": "class_names templates methods scale precision",
}
_PATHS = ("shards", "class_names", "templates")


def run_facts(content: dict[str, Any], file: Path, weights_sha256: str) -> dict[str, Any]:
    """What a checkpoint and its run folder state about training and evaluation, as JSON values; None for the rest.

    weights_sha256: of the checkpoint's model; results of other weights are left out.
    """
    folder, training = file.parent.parent, content.get("training") or {}
    record = _record(folder, weights_sha256) if file.parent == checkpoint_folder(folder) else {}
    config = (content.get("config") or {}) | {"eval": record.get("eval")}
    return {
        "name": str(content.get("name") or file.stem),
        "epoch": content.get("epoch"),
        "steps": training.get("step", content.get("steps")),
        "pairs": training.get("pairs", content.get("pairs")),
        "config": _public(config) | ({"base": _public(config["base"])} if config.get("base") else {}),
        "class_names": record.get("class_names"),
        "results": _rows(folder / "results.csv") if record else [],
        "decisions": _rows(folder / "decisions.csv") if record else [],
    }


def model_card(facts: dict[str, Any], repo: str | None = None) -> str:
    """The README.md of a shared folder; facts: the header of the shared file, repo: its user/repo on the hub."""
    texts = {"facts": facts, "repo": repo, "title": repo.rpartition("/")[2] if repo else facts["name"]}
    texts["accuracy"] = facts["results"] and not accuracy_varies(pd.DataFrame(facts["results"]))
    texts["example_names"] = json.dumps((facts["class_names"] or ["cat", "dog", "bird"])[:3], ensure_ascii=False)
    for key, to_table in (("results", results_table), ("decisions", decisions_table)):
        texts[f"{key}_table"] = facts[key] and markdown(to_table(pd.DataFrame(facts[key])))
    return str(ModelCard.from_template(_metadata(facts, texts["title"]), str(_TEMPLATE), **texts))


def _metadata(facts: dict[str, Any], title: str) -> ModelCardData:
    """The hub's own fields. Without a license the hub shows none."""
    hub = get_pretrained_cfg(facts["model_name"], facts["pretrained"]).get("hf_hub") if facts["pretrained"] else None
    task = "zero-shot-image-classification"
    results = [
        EvalResult(
            task_type=task,
            task_name="Out-of-distribution detection",
            dataset_type="image-folder",
            dataset_config=row["ood_set"],
            dataset_name=f"{row['id_set']} (ID), {row['ood_set']} (OOD)",
            metric_type=metric.lower(),
            metric_name=f"{metric} of {row['method']}",
            metric_value=round(100 * row[metric], 2),
        )
        for row in facts["results"]
        for metric in ("AUROC", "FPR95")
    ]
    return ModelCardData(
        license=facts["license"],
        library_name="clipn",
        pipeline_tag=task,
        tags=["clipn", "clip", "open_clip", "out-of-distribution-detection"],
        base_model="/".join(hub.split("/")[:2]) if hub else None,
        base_model_relation="adapter" if hub else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """The public settings of a config, without the folders of paths."""
    if (config.get("data") or {}).get("source") != "features":
        config = config | {"features": {}}
    public = {}
    for section, keys in _PUBLIC.items():
        for key, value in (config.get(section) or {}).items():
            if key in keys.split():
                public.setdefault(section, {})[key] = _without_folders(value, key)
    return public


def _without_folders(value: Any, key: str) -> Any:
    """A path or URL without its folders and query, which may hold a user name or a key; lists of texts stay."""
    if key == "shards" and isinstance(value, list):
        return [_without_folders(item, key) for item in value]
    is_path = key in _PATHS and isinstance(value, str)
    return re.split(r"[/\\]", value.partition("?")[0])[-1] if is_path else value


def _record(folder: Path, weights_sha256: str) -> dict[str, Any]:
    """The record of a run folder's evaluation if it is of these weights alone, else {}."""
    if not (folder / "results.csv").is_file():
        return {}
    record = read_record(folder)
    if record.get("weights_sha256") == [weights_sha256]:
        return record
    reason = f"of other or several checkpoints, by {RECORD}" if record else f"without {RECORD}; evaluate again"
    log.warning("%s is left out of the model card: it is %s", folder / "results.csv", reason)
    return {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table as JSON values; no rows if the file is absent."""
    return json.loads(pd.read_csv(path).to_json(orient="records", double_precision=15)) if path.is_file() else []
