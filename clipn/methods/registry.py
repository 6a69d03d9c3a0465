"""Every score by name, and what each needs beside the logits: training images, words, or the image itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from clipn.config.schema import EvalConfig
from clipn.methods.from_features import FEATURE_SCORES
from clipn.methods.from_images import IMAGE_SCORES
from clipn.methods.negatives import POOLS, mine, neglabel, neglabel_clipn, read_words, save_negatives
from clipn.model.base import get_tokenizer
from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.runtime.distributed import is_main
from clipn.scores import SCORES

Score = Callable[[Tensor], Tensor]  # image features [B, D] -> [B]

WITH_CLIPN = "+CLIPN"  # after a word score's name: times p_yes
WORD_SCORES = (*POOLS, *(name + WITH_CLIPN for name in POOLS))
METHODS = (*SCORES, *WORD_SCORES, *FEATURE_SCORES, *IMAGE_SCORES)


def check_methods(settings: EvalConfig) -> None:
    """Raises ValueError for a score that is unknown, or that needs eval.train or eval.words where there is none."""
    if len(set(settings.methods)) < len(settings.methods):
        raise ValueError(f"eval.methods={settings.methods}: one is named twice")
    for method in settings.methods:
        if method not in METHODS:
            raise ValueError(f"eval.methods: unknown score {method!r}; the scores are: {', '.join(METHODS)}")
        if method in FEATURE_SCORES and not settings.train:
            raise ValueError(f"eval.methods: {method} needs in-distribution training images: name them in eval.train")
        if method in WORD_SCORES and not settings.words:
            raise ValueError(f"eval.methods: {method} needs candidate words: a list or WordNet folder in eval.words")
        if method in WORD_SCORES and not Path(settings.words).exists():
            raise FileNotFoundError(f"eval.words={settings.words!r}: no such word list or WordNet folder")


def feature_methods(
    settings: EvalConfig,
    model: CLIPN,
    head: Head,
    class_names: Sequence[str],
    train: tuple[Tensor, list[int]] | None,
    folder: Path,
) -> dict[str, Score]:
    """The scores that look at image features, each a function [B, D] -> [B], in the order of eval.methods.

    train: features [M, D] and labels [M] of in-distribution training images. Mined words are written in `folder`.
    Raises ValueError as the scores' fits and `read_words` do.
    """
    made: dict[str, Score] = {}
    for method in settings.methods:
        if method in FEATURE_SCORES:
            features, labels = train
            known = torch.tensor(labels, device=features.device) if labels else None
            made[method] = FEATURE_SCORES[method](features, known, head, settings.scale)
        elif method in WORD_SCORES and method not in made:
            pool = method.removesuffix(WITH_CLIPN)
            words = read_words(settings.words, POOLS[pool].left_out)
            negatives = mine(model, get_tokenizer(model.architecture), words, class_names, POOLS[pool])
            if is_main():
                save_negatives(negatives, folder / f"negatives_{pool}.tsv")
            made[pool] = partial(neglabel, negatives=negatives, scale=settings.scale)
            made[pool + WITH_CLIPN] = partial(neglabel_clipn, negatives=negatives, head=head, scale=settings.scale)
    return {method: made[method] for method in settings.methods if method in made}


def image_methods(settings: EvalConfig, model: CLIPN, head: Head) -> dict[str, Score]:
    """The scores that look at the image itself, each a function [B, 3, H, W] -> [B]."""
    wanted = [method for method in settings.methods if method in IMAGE_SCORES]
    return {method: partial(IMAGE_SCORES[method], model, head, scale=settings.scale) for method in wanted}
