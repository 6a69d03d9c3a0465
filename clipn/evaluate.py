"""Judge checkpoints on ID and OOD image sets: one feature pass per set, every score from the same features."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .base import get_tokenizer
from .checkpoint import read_checkpoint
from .config import Config
from .distributed import choose_device, is_main
from .feature_scores import FEATURE_SCORES
from .features import image_set_features, tensor_hash
from .head import Head, build_head
from .image_sets import ImageSet, open_image_sets
from .methods import Score, check_methods, feature_methods, image_methods
from .metrics import ood_metrics
from .model import CLIPN, create_model_and_transforms, load_model
from .prompts import load_class_names, load_templates
from .report import write_report
from .run_folder import last_checkpoint
from .scores import DECISIONS, SCORES
from .share import find_weights

log = logging.getLogger(__name__)

RESULT_COLUMNS = ["id_set", "ood_set", "method", "AUROC", "FPR95", "AUPR_IN", "AUPR_OUT", "id_accuracy", "seed"]


@dataclass(frozen=True)
class SetScores:
    """What one model says of the N readable images of one image set."""

    images: ImageSet
    scores: dict[str, np.ndarray]  # by method: [N], higher means ID
    says_ood: dict[str, np.ndarray]  # by threshold-free decision: [N] bool
    predicted: np.ndarray  # [N] class indices
    p_yes: np.ndarray  # [N], of the predicted class


class Evaluation(NamedTuple):
    """What an evaluation found. The tables hold fractions: one row per OOD set, method or decision, and checkpoint."""

    results: pd.DataFrame  # RESULT_COLUMNS
    decisions: pd.DataFrame
    found: dict[str, SetScores]  # by set, the ID set first, of the first checkpoint
    class_names: list[str]


def evaluate(config: Config) -> Evaluation:
    """Evaluate as `config.eval` says and write results.csv, decisions.csv, results.md and figures/ in run.dir.

    Under many ranks each encodes a share of the images, all know the result, and rank 0 writes it.

    Raises ValueError or FileNotFoundError for image sets, names, templates, methods or checkpoints that are not there
    or do not fit.
    """
    settings = config.eval
    methods, templates = check_texts(config)
    id_set, ood_sets, train_set = _open_sets(config)
    class_names = load_class_names(settings.class_names, id_set.classes)
    rows, decisions, first = [], [], None
    for model, seed in _models(config):
        head = build_head(model, get_tokenizer(model.architecture), class_names, templates)
        fitted = train_set and any(method in FEATURE_SCORES for method in methods)  # else nothing looks at them
        train = next(image_set_features(config, model, [train_set])) if fitted else None
        known = (train[1], train[0].labels) if train else None
        more = feature_methods(settings, model, head, class_names, known, Path(config.run.dir))
        found = _judge(config, model, head, [id_set, *ood_sets], more)
        first = first or found
        rows += _result_rows(id_set, ood_sets, found, methods, seed)
        decisions += _decision_rows(id_set, ood_sets, found, seed)
    evaluation = Evaluation(
        pd.DataFrame(rows, columns=RESULT_COLUMNS),
        pd.DataFrame(decisions),
        first,
        class_names,
    )
    if is_main():
        write_report(Path(config.run.dir), *evaluation, bootstrap=settings.bootstrap)
    return evaluation


def join(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several runs' evaluations as one; the pictures are of the first."""
    results, decisions = (pd.concat([e[part] for e in evaluations], ignore_index=True) for part in (0, 1))
    return evaluations[0]._replace(results=results, decisions=decisions)


def check_texts(config: Config) -> tuple[list[str], list[str]]:
    """The scores and templates that `config.eval` names: what can be checked before a training.

    Raises ValueError or FileNotFoundError that names an unknown one and the choices.
    """
    check_methods(config.eval)
    return config.eval.methods, load_templates(config.eval.templates)


@torch.no_grad()
def score_features(
    head: Head,
    images: ImageSet,
    features: Tensor,
    methods: Sequence[str],
    scale: float = 100.0,
    block: int = 1024,
    more: dict[str, Score] | None = None,
    taken: dict[str, Tensor] | None = None,
) -> SetScores:
    """A set's [N, D] image features -> every score and decision, a block of images at a time.

    more: the methods that look at features rather than logits; taken: those that were taken of the images, [N] each.
    """
    more, taken = more or {}, taken or {}
    scores = {name: taken.get(name, torch.empty(len(features))) for name in methods}
    says_ood = {name: torch.empty(len(features), dtype=torch.bool) for name in DECISIONS}
    predicted, p_yes = torch.empty(len(features), dtype=torch.long), torch.empty(len(features))
    for start in range(0, len(features), block):
        rows = slice(start, start + block)
        part = features[rows].to(head.weight_yes.device)
        logits_yes, logits_no = head(part, scale)
        for name in methods:
            if name not in taken:
                scores[name][rows] = more[name](part) if name in more else SCORES[name](logits_yes, logits_no, scale)
        for name, decide in DECISIONS.items():
            says_ood[name][rows] = decide(logits_yes, logits_no)
        predicted[rows] = logits_yes.argmax(dim=1)
        p_yes[rows] = SCORES["CTW"](logits_yes, logits_no, scale)
    scores, says_ood = ({name: value.numpy() for name, value in found.items()} for found in (scores, says_ood))
    return SetScores(images, scores, says_ood, predicted.numpy(), p_yes.numpy())


def find_checkpoints(config: Config) -> list[str]:
    """The checkpoints that eval.checkpoints, this run's own folder, or model.pretrained name, in that order.

    eval.checkpoints: files, globs of them, runs' or shared folders, "hf://user/repo". Raises FileNotFoundError for one
    that matches nothing. An open_clip tag in model.pretrained gives [].
    """
    asked: Any = config.eval.checkpoints
    if not asked:
        own, given = last_checkpoint(config.run.dir), config.model.pretrained
        return [str(own)] if own.is_file() else [given] if given and Path(given).is_file() else []
    paths = []
    for pattern in [asked] if isinstance(asked, str) else asked:
        file = find_weights(pattern)
        found = [str(file)] if file else sorted(glob.glob(str(pattern)))
        if not found:
            raise FileNotFoundError(f"eval.checkpoints={pattern!r}: no such file")
        paths += found
    return list({Path(path).resolve(): path for path in paths}.values())  # each once


def _models(config: Config) -> Any:
    """Each checkpoint's model, ready on the device, and the seed that it was trained with."""
    settings, device = config.model, choose_device(config.run.device)
    statistics = (settings.image_mean, settings.image_std)
    paths = find_checkpoints(config)
    if not paths and not settings.pretrained:
        last = last_checkpoint(config.run.dir)
        raise FileNotFoundError(f"nothing to evaluate: no {last}; name a checkpoint in eval.checkpoints")
    for path in paths:
        log.info("evaluating %s", path)
        content = read_checkpoint(path)
        if not content.get("preprocess") and settings.image_mean is None:
            log.warning("%s does not say its images' statistics: CLIP's are used (see model.image_mean)", path)
        architecture, base = content.get("architecture") or settings.name, settings.pretrained
        base = None if base == path else base  # of a shared file, which holds the no tower alone
        model = load_model(content, path, architecture, settings.num_prompts, base)
        model.set_statistics(*statistics)
        yield model.to(device).eval(), _seed_of(content, config.run.seed)
    if not paths:
        log.info("evaluating %s, %s", settings.name, settings.pretrained)
        tagged = create_model_and_transforms(
            settings.name, settings.pretrained, settings.num_prompts, device, *statistics
        )
        yield tagged[0], config.run.seed


def _seed_of(content: dict[str, Any], default: int) -> int:
    return ((content.get("config") or {}).get("run") or {}).get("seed", default)


def _open_sets(config: Config) -> tuple[ImageSet, list[ImageSet], ImageSet | None]:
    """The ID set, the OOD sets, and the ID training images if there are any."""
    settings = config.eval
    id_sets, ood_sets = open_image_sets(settings.id, "eval.id"), open_image_sets(settings.ood, "eval.ood")
    train_sets = open_image_sets(settings.train, "eval.train") if settings.train else []
    for key, sets in (("eval.id", id_sets), ("eval.train", train_sets)):
        if len(sets) > 1:
            raise ValueError(f"{key}: expected one image set, found {', '.join(s.name for s in sets)}")
    id_set, train_set = id_sets[0], train_sets[0] if train_sets else None
    if id_set.name in [s.name for s in ood_sets]:
        raise ValueError(f"eval.ood: {id_set.name!r} is the name of the ID set; give one of them another")
    if train_set and train_set.classes and id_set.classes and train_set.classes != id_set.classes:
        raise ValueError(
            f"eval.train: its class folders ({', '.join(train_set.classes[:5])}, ...) are not those of eval.id "
            f"({', '.join(id_set.classes[:5])}, ...)"
        )
    return id_set, ood_sets, train_set


def _judge(
    config: Config, model: CLIPN, head: Head, image_sets: Sequence[ImageSet], more: dict[str, Score]
) -> dict[str, SetScores]:
    settings, found = config.eval, {}
    of_images = image_methods(settings, model, head)
    depends_on = f"{tensor_hash(head.weight_yes)} {settings.scale}"
    for images, features, taken in image_set_features(config, model, image_sets, of_images, depends_on):
        if images.left_out:
            log.warning("%s: %d images are unreadable and left out", images.name, len(images.left_out))
        found[images.name] = score_features(
            head, images, features, settings.methods, settings.scale, more=more, taken=taken
        )
    return found


def _result_rows(
    id_set: ImageSet, ood_sets: Sequence[ImageSet], found: dict[str, SetScores], methods: Sequence[str], seed: int
) -> list[dict]:
    inside = found[id_set.name]
    labels = inside.images.labels
    accuracy = float((inside.predicted == labels).mean()) if labels else float("nan")
    rows = []
    for ood in ood_sets:
        for method in methods:
            try:
                found_metrics = ood_metrics(inside.scores[method], found[ood.name].scores[method])
            except ValueError as error:
                raise ValueError(f"{method} of {id_set.name} and {ood.name}: {error}") from error
            names = {"id_set": id_set.name, "ood_set": ood.name, "method": method}
            rows.append(names | {"id_accuracy": accuracy, "seed": seed} | found_metrics)
    return rows


def _decision_rows(
    id_set: ImageSet, ood_sets: Sequence[ImageSet], found: dict[str, SetScores], seed: int
) -> list[dict]:
    """The threshold-free decisions: shares of ID kept and lost, of OOD found and missed, and of both judged rightly.

    open_accuracy is that of the classes and "none of them" as C + 1 answers.
    """
    rows, inside = [], found[id_set.name]
    labels = np.array(inside.images.labels or [-1] * len(inside.images))
    for ood in ood_sets:
        for name in DECISIONS:
            kept, told = ~inside.says_ood[name], found[ood.name].says_ood[name]
            shares = {
                "id_kept": kept.mean(),
                "ood_found": told.mean(),
                "id_lost": 1 - kept.mean(),
                "ood_missed": 1 - told.mean(),
                "accuracy": np.concatenate([kept, told]).mean(),
                "open_accuracy": np.concatenate([kept & (inside.predicted == labels), told]).mean(),
            }
            if not inside.images.labels:
                shares["open_accuracy"] = float("nan")
            shares = {key: float(value) for key, value in shares.items()}
            rows.append({"id_set": id_set.name, "ood_set": ood.name, "decision": name, **shares, "seed": seed})
    return rows
