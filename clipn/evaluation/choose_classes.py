"""`clipn classes`: the class folders that a base CLIP classifies best on held-out pairs.

A held-out pair belongs to the class that its caption names, see `clipn.data.prompts.caption_labeller`.
"""

from pathlib import Path

import pandas as pd
import torch

from clipn.data.images import open_image, val_transform
from clipn.data.prompts import caption_labeller, load_templates
from clipn.data.shards import ShardPairs
from clipn.data.storage import expand_patterns
from clipn.model.base import get_tokenizer
from clipn.model.head import build_head
from clipn.model.weights import open_model


def run_choice(checkpoint: str, pairs: str, classes: str, templates: str, number: int) -> None:
    """Print the accuracy of every class folder below `classes`, best first, and the `number` best as YAML."""
    if not Path(classes).is_dir():
        raise FileNotFoundError(f"--classes={classes!r}: no such folder")
    folders = sorted(entry.name for entry in Path(classes).iterdir() if entry.is_dir())
    templates = load_templates(templates, "--templates")
    accuracy = class_accuracy(checkpoint, ShardPairs(expand_patterns(pairs)), folders, templates)
    print(accuracy.to_string())
    print(f"over all: {(accuracy['accuracy'] * accuracy['pairs']).sum() / accuracy['pairs'].sum():.4f}")
    print(f"classes: [{', '.join(sorted(accuracy.index[:number]))}]")


@torch.inference_mode()
def class_accuracy(checkpoint: str, pairs: ShardPairs, folders: list[str], templates: list[str]) -> pd.DataFrame:
    """Accuracy and number of held-out pairs of each class folder, best first."""
    model = open_model(checkpoint).eval()
    names = [folder.replace("_", " ") for folder in folders]
    head = build_head(model, get_tokenizer(model.architecture), names, templates)
    transform = val_transform(model.preprocess)
    label_of, rows = caption_labeller(names), []
    for number in range(len(pairs)):
        pair = pairs[number]
        label = label_of(pair.caption)
        if label is not None:
            logits, _ = head(model.encode_image(transform(open_image(pair.image))[None]))
            rows.append((folders[label], float(logits.argmax() == label)))
    table = pd.DataFrame(rows, columns=["class", "accuracy"]).groupby("class")["accuracy"].agg(["mean", "size"])
    table.columns = ["accuracy", "pairs"]
    return table.sort_values(["accuracy", "pairs"], ascending=False)
