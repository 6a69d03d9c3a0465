"""Evaluate checkpoints on ID and OOD image sets: one feature pass per set, every score from the same features."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clipn.config.schema import Config
from clipn.data.image_sets import ImageSet, open_image_sets
from clipn.data.prompts import load_class_names, load_templates
from clipn.evaluation.results import RESULT_COLUMNS, Evaluation, SetScores, decision_rows, result_rows
from clipn.features.image_sets import image_set_features
from clipn.methods.from_features import FEATURE_SCORES
from clipn.methods.registry import Score, check_methods, feature_methods, image_methods
from clipn.model.base import get_tokenizer
from clipn.model.checkpoint import last_checkpoint, read_checkpoint
from clipn.model.clipn import CLIPN, create_model_and_transforms, load_model
from clipn.model.hashing import tensor_hash
from clipn.model.head import Head, build_head
from clipn.model.weights import find_weights
from clipn.runtime.distributed import choose_device
from clipn.scores import DECISIONS, SCORES

log = logging.getLogger(__name__)


def evaluate(config: Config) -> Evaluation:
    """Evaluate the checkpoints on the image sets that `config.eval` names.

    Under many ranks each encodes a share of the images, and all return the same result.

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
        rows += result_rows(id_set, ood_sets, found, methods, seed)
        decisions += decision_rows(id_set, ood_sets, found, seed)
    return Evaluation(pd.DataFrame(rows, columns=RESULT_COLUMNS), pd.DataFrame(decisions), first, class_names)


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
