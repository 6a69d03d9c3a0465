"""Evaluate checkpoints on ID and OOD image sets: one feature pass per set, every score from the same features."""

import glob
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from clipn.config.evaluation import EvalConfig
from clipn.config.schema import Config
from clipn.data.image_sets import ImageSet, check_readable, open_image_sets
from clipn.data.prompts import load_class_names, load_templates
from clipn.evaluation.results import RESULT_COLUMNS, Evaluation, SetScores, decision_rows, result_rows
from clipn.features.image_sets import image_set_features
from clipn.methods.from_features import Score
from clipn.methods.from_images import constants
from clipn.methods.registry import MethodInputs, check_methods, make_methods, methods_that_need, methods_that_take
from clipn.methods.scoring import ClassifierScores
from clipn.methods.taggers import check_tagger
from clipn.methods.tokens import tag_scores, training_tokens
from clipn.model.base import get_tokenizer
from clipn.model.checkpoint import last_checkpoint, no_weights, read_checkpoint
from clipn.model.clipn import CLIPN, check_no_tower, configured_model, load_model
from clipn.model.hashing import tensor_hash, weights_hash
from clipn.model.head import Head, build_head
from clipn.model.weights import find_weights
from clipn.runtime.console import shortened
from clipn.runtime.distributed import choose_device
from clipn.scores import COMPARED, DECISIONS, SCORES

log = logging.getLogger(__name__)

_ROWS = 1024  # images scored at once


class Sets(NamedTuple):
    """The ID set, the OOD sets, and the set of ID training images, if there is one."""

    id: ImageSet
    ood: list[ImageSet]
    train: ImageSet | None


def evaluate(config: Config, sets: Sets | None = None, unused: Collection[Path] = ()) -> Evaluation:
    """Evaluate the checkpoints on the image sets that `config.eval` names; writes only features and mined words.

    sets: other image sets. unused: training images from which no method learns.

    Under many ranks each encodes a share of the images, and all return the same result. Raises ValueError or
    FileNotFoundError for image sets, names, templates, methods or checkpoints that do not exist or do not fit.
    """
    settings = config.eval
    _check_methods(config)
    templates = load_templates(settings.templates)
    id_set, ood_sets, train_set = sets or open_sets(settings, seed=config.run.seed)
    class_names = load_class_names(settings.class_names, id_set.classes)
    results, decisions, weights, first = [], [], [], {}
    for model, seed in open_models(config):
        head = build_head(model, get_tokenizer(model.architecture), class_names, templates)
        inputs = MethodInputs(model, head, class_names, settings.scale, words=settings.words, folder=config.run.dir)
        inputs.probe, inputs.probe_folder = config.probe, Path(config.features.dir) / "probes"
        inputs.tagood, inputs.tagood_folder = config.tagood, Path(config.features.dir) / "tagood"
        if train_set and methods_that_need("train", settings.methods):
            _add_training_images(config, inputs, train_set, unused)
        set_scores = _score_sets(config, [id_set, *ood_sets], inputs)
        first = first or set_scores
        results += result_rows(set_scores, seed)
        decisions += decision_rows(set_scores, seed)
        weights.append(weights_hash(model))
    tables = pd.DataFrame(results, columns=RESULT_COLUMNS), pd.DataFrame(decisions)
    return Evaluation(*tables, first, class_names, tuple(weights))


def check_evaluation(config: Config, world_made: bool = True) -> None:
    """Raise what `evaluate` would raise for bad settings, before the hours of a training.

    It opens templates, words, image sets, an image of each, and class names. Before the world is made, the image sets
    in world.root are left out. Without eval.id it checks methods, words and templates alone.
    """
    settings = config.eval
    _check_methods(config)
    load_templates(settings.templates)
    if settings.id is None:
        return
    if world_made or config.world.name is None:
        load_class_names(settings.class_names, open_sets(settings).id.classes)
        return
    for key in ("id", "ood", "train"):
        entries = _outside(config.world.root, getattr(settings, key))
        if entries:
            _open(entries, f"eval.{key}")
    if settings.class_names != "folders":
        load_class_names(settings.class_names)


def check_checkpoints(config: Config) -> None:
    """Read the files of eval.checkpoints before a training, without those in run.dir, which the training writes.

    Raises FileNotFoundError for a name that matches nothing, ValueError for what is no checkpoint.
    """
    if config.eval.id is not None:
        for path in matching_files(_outside(config.run.dir, config.eval.checkpoints)):
            read_checkpoint(path)


@torch.no_grad()
def score_features(
    head: Head,
    images: ImageSet,
    features: Tensor,
    methods: Sequence[str],
    scale: float = 100.0,
    feature_methods: dict[str, Score] | None = None,
) -> SetScores:
    """Every score and decision from the [N, D] features of a set, a block of images at a time.

    feature_methods: the methods that are functions of features; the others are in COMPARED.
    """
    feature_methods = feature_methods or {}
    scores, says_ood, top_class = [], [], []
    for block in features.split(_ROWS):
        block = block.to(head.weight_yes.device)
        logits = head(block, scale)
        made = {name: score(block) for name, score in feature_methods.items()}
        scores.append({name: made[name] if name in made else COMPARED[name](*logits, scale) for name in methods})
        says_ood.append({name: decide(*logits) for name, decide in DECISIONS.items()})
        top_class.append({"predicted": logits[0].argmax(dim=1), "p_yes": SCORES["CTW"](*logits, scale)})
    scores, says_ood, top_class = (
        {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        for parts in (scores, says_ood, top_class)
    )
    return SetScores(images, scores, says_ood, **top_class)


def _add_training_images(config: Config, inputs: MethodInputs, images: ImageSet, unused: Collection[Path]) -> None:
    """Give the methods the features, the tower's outputs and the labels of ID training images."""
    tower = bool(methods_that_need("tower", config.eval.methods))
    images, features, columns = next(image_set_features(config, inputs.model, [images], tower=tower))
    inputs.train, inputs.train_tower = features, columns.get("tower")
    inputs.labels = torch.tensor(images.labels) if images.labels else None
    if methods_that_need("tokens", config.eval.methods):
        inputs.tokens = training_tokens(config, inputs.tagger, images)
    if unused:
        inputs.use_only(torch.tensor([number for number, path in enumerate(images.paths) if path not in unused]))
    if config.eval.train_filter:
        inputs.use_kept_by(config.eval.train_filter)


def _score_sets(config: Config, image_sets: Sequence[ImageSet], inputs: MethodInputs) -> dict[str, SetScores]:
    """The scores of one model for each image set, by the name of the set."""
    settings, set_scores = config.eval, {}
    image_methods, feature_methods = (make_methods(kind, settings.methods, inputs) for kind in ("images", "features"))
    depends_on = f"{tensor_hash(inputs.head.weight_yes)} {settings.scale} {constants()}"
    score_classifiers = ClassifierScores(settings.methods, inputs)
    score_tags = make_methods("tags", settings.methods, inputs)
    others = [name for name in settings.methods if name in SCORES or name in feature_methods]
    tower = bool(methods_that_need("tower", settings.methods))
    sets = image_set_features(config, inputs.model, image_sets, image_methods, depends_on, tower)
    for images, features, columns in sets:
        if images.left_out:
            log.warning("%s: %d images are unreadable and left out", images.name, len(images.left_out))
        scored = score_features(inputs.head, images, features, others, settings.scale, feature_methods)
        scores, predictions = score_classifiers(features, columns.pop("tower", None))
        scores |= scored.scores | {name: values.numpy() for name, values in columns.items()}
        places = None
        if score_tags:
            tag_values, places = tag_scores(config, inputs.tagger, images, score_tags)
            scores |= tag_values
        scores = {name: scores[name] for name in settings.methods}
        set_scores[images.name] = replace(scored, scores=scores, predictions=predictions, places=places)
    return set_scores


def _check_methods(config: Config) -> None:
    check_methods(config.eval)
    if methods_that_take("tags", config.eval.methods):
        check_tagger(config.tagood)


def matching_files(names: str | Sequence[str] | None) -> list[str]:
    """The files of eval.checkpoints, each once: files, globs, run folders, shared folders, "hf://user/repo"."""
    paths: list[str] = []
    for name in [names] if isinstance(names, str) else names or []:
        file = find_weights(name)
        matches = [str(file)] if file else sorted(glob.glob(str(name)))
        if not matches:
            raise FileNotFoundError(f"eval.checkpoints={name!r}: no such file")
        paths += matches
    return list({Path(path).resolve(): path for path in paths}.values())


def open_models(config: Config) -> Iterator[tuple[CLIPN, int]]:
    """Each checkpoint's model, ready on the device, and the seed that it was trained with.

    Without eval.checkpoints it is this run's own checkpoint, else model.pretrained: a file or an open_clip tag. Those
    must be of the config's model.no_tower and model.bias; raises ValueError otherwise.
    """
    settings, device, last = config.model, choose_device(config.run.device), last_checkpoint(config.run.dir)
    own = [name for name in (str(last), settings.pretrained) if name and Path(name).is_file()]
    paths = matching_files(config.eval.checkpoints) or own[:1]
    if not paths:
        if not settings.pretrained:
            raise FileNotFoundError(f"nothing to evaluate: no {last}; name a checkpoint in eval.checkpoints")
        log.info("evaluating %s, %s", settings.name, settings.pretrained)
        yield configured_model(settings, device), config.run.seed
    for path in paths:
        log.info("evaluating %s", path)
        content = read_checkpoint(path)
        if not content.get("preprocess") and settings.image_mean is None:
            log.warning("%s does not have its image statistics: CLIP's are used (see model.image_mean)", path)
        base = settings.pretrained if settings.pretrained != path else None  # for a shared file, the no tower alone
        model = load_model(content, path, content.get("architecture") or settings.name, settings, base)
        if not config.eval.checkpoints and no_weights(content["state_dict"]):
            check_no_tower(model, settings, path)
        model.set_statistics(settings.image_mean, settings.image_std)
        trained_with = (content.get("config") or {}).get("run") or {}
        yield model.to(device).eval(), trained_with.get("seed", config.run.seed)


def open_sets(settings: EvalConfig, train: bool = False, seed: int = 0) -> Sets:
    """The image sets that `eval` names. Raises ValueError or FileNotFoundError for sets that do not fit.

    train: also the training images if no method needs them. seed: of the draw of eval.train_shots.
    """
    id_sets, ood_sets = _open(settings.id, "eval.id"), _open(settings.ood, "eval.ood")
    train = train or bool(methods_that_need("train", settings.methods))
    train_sets = _open(settings.train, "eval.train") if train else []
    for key, sets in (("eval.id", id_sets), ("eval.train", train_sets)):
        if len(sets) > 1:
            raise ValueError(f"{key}: expected one image set, found {', '.join(s.name for s in sets)}")
    id_set, train_set = id_sets[0], train_sets[0] if train_sets else None
    if id_set.name in [s.name for s in ood_sets]:
        raise ValueError(f"eval.ood: {id_set.name!r} is the name of the ID set; give one of them another")
    if train_set and train_set.classes and id_set.classes and train_set.classes != id_set.classes:
        own, others = (shortened(s.classes, 5) for s in (train_set, id_set))
        raise ValueError(f"eval.train: its class folders ({own}) are not those of eval.id ({others})")
    if train_set and settings.train_shots:
        if not train_set.classes:
            raise ValueError(f"eval.train_shots={settings.train_shots}: {train_set.root} has no class folders")
        train_set = train_set.draw(settings.train_shots, seed)
    for method in methods_that_need("labels", settings.methods):
        if train_set and not train_set.classes:
            raise ValueError(f"eval.train: {method} needs class folders, but {train_set.root} has none")
    least = max(2, len(id_set.classes))
    for method in methods_that_need("probe", settings.methods):
        if train_set and len(train_set) < least:
            counts = f"{least} training images or more, as many as classes"
            raise ValueError(f"eval.train: {method} needs {counts}, but {train_set.root} holds {len(train_set)}")
    return Sets(id_set, ood_sets, train_set)


def _open(value: Any, key: str) -> list[ImageSet]:
    """`open_image_sets`; raises ValueError for a set without a readable image too."""
    image_sets = open_image_sets(value, key)
    for images in image_sets:
        check_readable(images)
    return image_sets


def _outside(folder: str, entries: Any) -> Any:
    """The image sets of a config, or the paths, that are not in a folder."""

    def is_outside(entry: Any) -> bool:
        path = entry.get("path") if isinstance(entry, dict) else entry
        return not isinstance(path, str) or Path(folder).resolve() not in Path(path).resolve().parents

    if isinstance(entries, dict):
        return {name: entry for name, entry in entries.items() if is_outside(entry)}
    if isinstance(entries, (list, tuple)):
        return [entry for entry in entries if is_outside(entry)]
    return entries if is_outside(entries) else None
