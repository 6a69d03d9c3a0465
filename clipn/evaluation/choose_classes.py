"""`clipn classes`: the class folders that a base CLIP classifies best on held-out pairs.

A held-out pair counts for a class if its caption holds the name of that class and of no other.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import torch

from clipn.data.images import open_image, val_transform
from clipn.data.prompts import simple_templates
from clipn.data.shards import ShardPairs
from clipn.data.storage import expand_patterns
from clipn.model.base import get_tokenizer
from clipn.model.checkpoint import read_checkpoint
from clipn.model.clipn import load_model
from clipn.model.head import build_head


def run_choice(checkpoint: str, pairs: str, classes: str, number: int) -> None:
    """Print the accuracy of every class folder below `classes`, best first, and the `number` best as YAML."""
    folders = sorted(entry.name for entry in Path(classes).iterdir() if entry.is_dir())
    accuracy = class_accuracy(checkpoint, ShardPairs(expand_patterns(pairs)), folders)
    print(accuracy.to_string())
    print(f"over all: {(accuracy['accuracy'] * accuracy['pairs']).sum() / accuracy['pairs'].sum():.4f}")
    print(f"classes: [{', '.join(sorted(accuracy.index[:number]))}]")


@torch.inference_mode()
def class_accuracy(checkpoint: str, pairs: ShardPairs, folders: list[str]) -> pd.DataFrame:
    """Per class folder: the share of its held-out pairs that is put into it, and how many there are; best first."""
    content = read_checkpoint(checkpoint)
    model = load_model(content, checkpoint, content["architecture"]).eval()
    names = [folder.replace("_", " ") for folder in folders]
    head = build_head(model, get_tokenizer(model.architecture), names, simple_templates())
    transform = val_transform(model.preprocess)
    patterns = [re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in names]
    rows = []
    for number in range(len(pairs)):
        named = [label for label, pattern in enumerate(patterns) if pattern.search(pairs[number].caption)]
        if len(named) == 1:
            logits, _ = head(model.encode_image(transform(open_image(pairs[number].image))[None]))
            rows.append((folders[named[0]], float(logits.argmax() == named[0])))
    table = pd.DataFrame(rows, columns=["class", "accuracy"]).groupby("class")["accuracy"].agg(["mean", "size"])
    table.columns = ["accuracy", "pairs"]
    return table.sort_values(["accuracy", "pairs"], ascending=False)
