"""Choose ID classes by held-out pairs alone: the class folders whose name a base CLIP reads best.

    python scripts/choose_classes.py --checkpoint runs/photos/base/checkpoints/last.pt \\
        --pairs ../shared/data/photos/pairs-00011.tar --classes runs/photos/world/cifar100_test --number 20

A held-out pair counts for a class when its caption holds that class's name and no other's. Prints the accuracy of
every class among all of them, best first, and the chosen names as YAML.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.base import get_tokenizer
from clipn.checkpoint import read_checkpoint
from clipn.command import fail_in_one_line
from clipn.head import build_head
from clipn.images import open_image, val_transform
from clipn.model import load_model
from clipn.pairs import ShardPairs, expand_patterns
from clipn.prompts import simple_templates


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint written by a training run")
    parser.add_argument("--pairs", required=True, help="held-out shards")
    parser.add_argument("--classes", required=True, help="a folder of class folders")
    parser.add_argument("--number", type=int, default=20)
    arguments = parser.parse_args(argv)
    folders = sorted(entry.name for entry in Path(arguments.classes).iterdir() if entry.is_dir())
    accuracy = class_accuracy(arguments.checkpoint, ShardPairs(expand_patterns(arguments.pairs)), folders)
    print(accuracy.to_string())
    print(f"over all: {(accuracy['accuracy'] * accuracy['pairs']).sum() / accuracy['pairs'].sum():.4f}")
    print(f"classes: [{', '.join(sorted(accuracy.index[: arguments.number]))}]")


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


if __name__ == "__main__":
    fail_in_one_line(main)
