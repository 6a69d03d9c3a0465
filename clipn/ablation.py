"""`clipn ablate`: train and evaluate every combination of settings.

A word `key=v1,v2` varies a setting; a word with one value (brackets hold commas together) is the same for all; a NAME
is one of configs/ablations/paper.yaml. Each combination is a run in run.dir/ablations; the table is
run.dir/ablations.md and .csv. Worlds, bases and trainings that combinations share are made once. The same command
resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path

import pandas as pd
import yaml

from clipn.config.loading import base_config, load_config, to_dict
from clipn.config.schema import Config
from clipn.evaluation.evaluate import check_texts
from clipn.model.checkpoint import last_checkpoint
from clipn.pipeline import each_seed, evaluate_all, train_one
from clipn.report.write import ablation_table
from clipn.runtime.console import start_log
from clipn.runtime.distributed import choose_device, is_main, process_group
from clipn.toy.world import make_world
from clipn.training.loop import train

NAMED = Path(__file__).with_name("configs") / "ablations" / "paper.yaml"
# Settings that a base CLIP's training does not depend on.
NOT_OF_THE_BASE = ("eval.", "features.", "model.num_prompts", "train.itbo_", "train.tso_", "data.source")
# Settings that make other features.
OF_THE_FEATURES = ("world.", "base", "model.name", "model.pretrained", "data.", "features.")


def run_ablation(path: str, words: list[str]) -> None:
    """Train and evaluate every combination that the words name; see the module. Raises what training raises."""
    fixed, variants = parse(words)
    config = load_config(path, fixed)
    if config.eval.id is None:
        raise ValueError(f"{path}: eval.id: names no image set to judge the ablations on")
    folder = Path(config.run.dir) / "ablations"
    plans = [[*fixed, *variant, f"run.dir={folder / name_of(variant)}"] for variant in variants]
    for plan in plans:  # a mistake in the last one is told before the first is trained
        for one in each_seed(path, plan):
            check_texts(one)
    rows, trained = [], {}
    with process_group(choose_device(config.run.device)):
        common = prepare(path, fixed, variants, folder)
        for variant, plan in zip(variants, plans, strict=True):
            rows.append(run(path, [*plan, *common], trained).assign(setting=" ".join(variant)))
        if is_main():
            results = pd.concat(rows, ignore_index=True)
            results.to_csv(f"{folder}.csv", index=False)
            Path(f"{folder}.md").write_text(ablation_table(results), encoding="utf-8")
            print(ablation_table(results))
            print(f"done: table in {folder}.md, runs in {folder}/")


def prepare(path: str, fixed: list[str], variants: list[list[str]], folder: Path) -> list[str]:
    """Make the worlds and bases that all combinations have in common; returns the words that say where they are."""
    config, place = load_config(path, fixed), f"{folder}/common/seed_${{run.seed}}"
    varied = {word.partition("=")[0] for variant in variants for word in variant}
    common = []
    # A folder that does not lie in run.dir is one for all as it is.
    own_features, own_world = (
        Path(config.run.dir) in Path(path).parents for path in (config.features.dir, config.world.root)
    )
    other_features = any(key.startswith(OF_THE_FEATURES) for key in varied) or ["model.num_prompts=0"] in variants
    if own_features and not other_features:
        common.append(f"features.dir={place}/features")
    if config.world.name and own_world and not any(key.startswith("world.") for key in varied):
        common.append(f"world.root={place}/world")
    if not config.base or not all(key.startswith(NOT_OF_THE_BASE) for key in varied):
        return common
    for seed in config.run.seeds or [config.run.seed]:
        own = [f"run.seed={seed}", "run.seeds=[]", f"run.dir={folder}/common/seed_{seed}"]
        one = load_config(path, [*fixed, *common, *own])
        start_log(one.run.dir)
        make_world(one.world)
        train(base_config(one))
    return [*common, f"model.pretrained={place}/base/checkpoints/last.pt", "base={}"]


def run(path: str, plan: list[str], trained: dict[str, str]) -> pd.DataFrame:
    """One combination, trained unless the same training was done before; returns its results."""
    configs = each_seed(path, plan)
    for config in configs:
        what = str(without_place(config))
        if what not in trained:
            train_one(config)
            trained[what] = str(last_checkpoint(config.run.dir))
        config.eval.checkpoints = trained[what]
    return evaluate_all(load_config(path, plan), configs).results


def without_place(config: Config) -> dict:
    """The settings of a training, whatever folder it is in."""

    def opened(value: object) -> object:
        if isinstance(value, dict):
            return {key: opened(part) for key, part in value.items()}
        return value.replace(config.run.dir, "*") if isinstance(value, str) else value

    return opened(to_dict(config) | {"eval": None})


def parse(words: list[str]) -> tuple[list[str], list[list[str]]]:
    """Command-line words -> those that are the same for all, and every combination of the others."""
    fixed, axes = [], []
    for word in words:
        key, _, values = word.partition("=")
        if not values:
            axes.append(named(word))
            continue
        choices = split(values)
        if len(choices) == 1:
            fixed.append(word)
        else:
            axes.append([[f"{key}={choice}"] for choice in choices])
    keys = [{word.partition("=")[0] for variant in axis for word in variant} for axis in axes]
    if len(set().union(*keys)) < sum(map(len, keys)):
        raise ValueError(f"{' '.join(words)}: one setting is varied twice; ask for one after the other")
    if not axes:
        raise ValueError(f"nothing varies in {words}: expected a key=v1,v2, or one of {', '.join(ablations())}")
    return fixed, [list(itertools.chain(*combination)) for combination in itertools.product(*axes)]


def split(values: str) -> list[str]:
    """A text at the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def named(name: str) -> list[list[str]]:
    """The combinations of one of configs/ablations/paper.yaml. Raises ValueError that names the choices."""
    if name not in ablations():
        raise ValueError(f"no ablation {name!r}: expected key=v1,v2, or one of {', '.join(ablations())}")
    return [line.split() for line in ablations()[name]]


def ablations() -> dict[str, list[str]]:
    return yaml.safe_load(NAMED.read_text(encoding="utf-8"))


def name_of(variant: list[str]) -> str:
    """A folder's name for a combination."""
    words = "+".join(variant)
    told = re.sub(r"[^\w.=+-]", "_", words)
    return told if told == words else f"{told}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
