"""`clipn ablate`: train and evaluate every combination of settings.

A word `key=v1,v2` varies a setting; a word with one value (brackets hold commas together) is the same for all; a NAME
is an entry of configs/ablations/paper.yaml. Each combination is a run in run.dir/ablations; the table is
run.dir/ablations.md and .csv. Worlds, bases and trainings that combinations share are made once. The same command
resumes. With data.val_shards the table has the figures of the held-out pairs; with eval.id=null it has no others.
"""

import hashlib
import itertools
import json
import re
from pathlib import Path

import pandas as pd
import yaml

from clipn.config.loading import base_config, load_config, to_dict
from clipn.evaluation.evaluate import check_evaluation
from clipn.model.checkpoint import last_checkpoint
from clipn.pipeline import each_seed, evaluate_all, train_one
from clipn.report.tables import ablations_table, markdown
from clipn.runtime.console import start_log
from clipn.runtime.distributed import choose_device, is_main, process_group
from clipn.toy.world import make_world
from clipn.training.loop import train
from clipn.training.run_log import metrics_file

NAMED = Path(__file__).with_name("configs") / "ablations" / "paper.yaml"
# Settings that a base CLIP's training does not depend on.
NOT_OF_THE_BASE = (
    *("eval.", "probe.", "tagood.", "features."),
    *("model.num_prompts", "model.no_tower", "model.adapter_width", "model.bias"),
    *("train.itbo_", "train.tso_", "data.source", "data.val_shards"),
)
# Settings that change the stored features.
OF_THE_FEATURES = ("world.", "base", "model.name", "model.pretrained", "data.", "features.")


def run_ablation(path: str, words: list[str]) -> None:
    """Train and evaluate every combination that the words name; see the module. Raises what training raises."""
    fixed, variants = parse(words)
    config = load_config(path, fixed)
    if config.eval.id is None and not config.data.val_shards:
        raise ValueError(f"{path}: eval.id names no image set, and data.val_shards no pairs, to compare ablations on")
    folder = Path(config.run.dir) / "ablations"
    plans = [[*fixed, *variant, f"run.dir={folder / folder_name(variant)}"] for variant in variants]
    for plan in plans:  # an error in the last one is reported before the first is trained
        for run in each_seed(path, plan):
            check_evaluation(run, world_made=False)
    results, trained = [], {}
    with process_group(choose_device(config.run.device)):
        shared = make_shared(path, fixed, variants, folder)
        for variant, plan in zip(variants, plans, strict=True):
            results.append(run_combination(path, [*plan, *shared], trained).assign(setting=" ".join(variant)))
        if is_main():
            table = pd.concat(results, ignore_index=True)
            table.to_csv(f"{folder}.csv", index=False)
            text = markdown(ablations_table(table))
            Path(f"{folder}.md").write_text(text, encoding="utf-8")
            print(text)
            print(f"done: table in {folder}.md, runs in {folder}/")


def parse(words: list[str]) -> tuple[list[str], list[list[str]]]:
    """Command-line words -> those that are the same for all, and every combination of the others."""
    named = yaml.safe_load(NAMED.read_text(encoding="utf-8"))
    fixed, axes = [], []
    for word in words:
        key, _, values = word.partition("=")
        choices = split(values)
        if values and len(choices) == 1:
            fixed.append(word)
        elif values:
            axes.append([[f"{key}={choice}"] for choice in choices])
        elif word in named:
            axes.append([line.split() for line in named[word]])
        else:
            raise ValueError(f"no ablation {word!r}: expected key=v1,v2, or one of {', '.join(named)}")
    if not axes:
        raise ValueError(f"nothing varies in {words}: expected a key=v1,v2, or one of {', '.join(named)}")
    keys = [key for axis in axes for key in keys_of(axis)]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{' '.join(words)}: one setting is varied twice; run one ablation after the other")
    return fixed, [list(itertools.chain(*combination)) for combination in itertools.product(*axes)]


def split(values: str) -> list[str]:
    """The parts of a text between the commas that stand outside of brackets."""
    text, depth = "", 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        text += "\0" if letter == "," and depth == 0 else letter
    return text.split("\0")


def keys_of(variants: list[list[str]]) -> set[str]:
    """The settings that these combinations change."""
    return {word.partition("=")[0] for word in itertools.chain(*variants)}


def folder_name(variant: list[str]) -> str:
    """The folder name of a combination, with a hash where characters had to be replaced."""
    words = "+".join(variant)
    name = re.sub(r"[^\w.=+-]", "_", words)
    return name if name == words else f"{name}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def make_shared(path: str, fixed: list[str], variants: list[list[str]], folder: Path) -> list[str]:
    """Make the worlds and bases that all combinations share; returns the overrides that point to them."""
    config, place = load_config(path, fixed), f"{folder}/common/seed_${{run.seed}}"
    varied, shared = keys_of(variants), []

    def is_inside(path: str) -> bool:  # a folder outside of run.dir is shared as it is
        return Path(config.run.dir) in Path(path).parents

    other_features = any(key.startswith(OF_THE_FEATURES) for key in varied) or ["model.num_prompts=0"] in variants
    if not other_features and is_inside(config.features.dir):
        shared.append(f"features.dir={place}/features")
    share_world = config.world.name and not any(key.startswith("world.") for key in varied)
    share_base = config.base and all(key.startswith(NOT_OF_THE_BASE) for key in varied)
    if share_world and is_inside(config.world.root):
        shared.append(f"world.root={place}/world")
    for seed in (config.run.seeds or [config.run.seed]) if share_world or share_base else ():
        overrides = [f"run.seed={seed}", "run.seeds=[]", f"run.dir={folder}/common/seed_{seed}"]
        seed_config = load_config(path, [*fixed, *shared, *overrides])
        start_log(seed_config.run.dir)
        make_world(seed_config.world)
        for variant in variants:  # an error in the last one is reported before anything is trained
            check_evaluation(load_config(path, [*fixed, *variant, *shared, *overrides]))
        if share_base:
            train(base_config(seed_config))
    return [*shared, f"model.pretrained={place}/base/checkpoints/last.pt", "base={}"] if share_base else shared


def run_combination(path: str, plan: list[str], trained: dict[str, str]) -> pd.DataFrame:
    """Train one combination, unless `trained` has the same training (settings -> checkpoint); returns its results.

    They have a row per seed, OOD set and method, or per seed without eval.id, and the figures of held-out pairs.
    """
    configs = each_seed(path, plan)
    for config in configs:
        # what the training depends on: not the evaluation, nor the folder
        settings = str(to_dict(config) | {"eval": None, "probe": None, "tagood": None}).replace(config.run.dir, "*")
        if settings not in trained:
            train_one(config)
            trained[settings] = str(last_checkpoint(config.run.dir))
        config.eval.checkpoints = trained[settings]
    evaluation = evaluate_all(load_config(path, plan), configs)
    held_out = pd.DataFrame([{"seed": c.run.seed} | held_out_figures(c.eval.checkpoints) for c in configs])
    return evaluation.results.merge(held_out, on="seed", how="left") if evaluation else held_out


def held_out_figures(checkpoint: str) -> dict[str, float]:
    """The last figures of held-out pairs in the log of a checkpoint's run, none if it has no such pairs."""
    line = metrics_file(Path(checkpoint).parents[1]).read_text(encoding="utf-8").splitlines()[-1]
    return {name: value for name, value in json.loads(line).items() if name.startswith("val_")}
