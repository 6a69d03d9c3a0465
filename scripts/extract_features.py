"""Encode pairs for data.source=features: python scripts/extract_features.py CONFIG.yaml [key=value ...]

Training makes what is missing by itself; this is for making them beforehand, on another machine or on more GPUs (under
torchrun every rank takes a share). Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.base import get_tokenizer
from clipn.command import fail_in_one_line, start_log
from clipn.config import load_config
from clipn.distributed import choose_device, is_main, process_group
from clipn.features import pair_features
from clipn.model import create_model_and_transforms
from clipn.pairs import open_pairs


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text. Raises what opening pairs and writing features raise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/cc3m_vit_b16.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as features.dir=/data/features")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    device = choose_device(config.run.device)
    with process_group(device):
        start_log(config.run.dir)
        pairs = open_pairs(config.data)
        settings = config.model
        model, _, _ = create_model_and_transforms(
            settings.name, settings.pretrained, settings.num_prompts, device, settings.image_mean, settings.image_std
        )
        pair_features(config, model, get_tokenizer(model.architecture), pairs)
        main_rank = is_main()
    if main_rank:
        print(f"done: features in {config.features.dir}/pairs; train with data.source=features")


if __name__ == "__main__":
    fail_in_one_line(main)
