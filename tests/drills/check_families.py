"""Build one model of each open_clip family with random weights, take a training step, and load its checkpoint back.

    python tests/drills/check_families.py [MODEL ...]

open_clip's own towers are cut to one block to save time; timm towers are complete. Families whose text tower or
configuration would have to be downloaded are listed with that reason.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clipn.losses import itbo_loss, tso_loss
from clipn.model.base import Architecture, context_length, find_architecture
from clipn.model.checkpoint import write_checkpoint
from clipn.model.clipn import create_model_and_transforms

FAMILIES = """
ViT-B-32 ViT-B-16-quickgelu ViT-M-16-alt ViT-L-14-CLIPA ViT-bigG-14 RN50 RN50x4-quickgelu convnext_base convnext_base_w
swin_base_patch4_window7_224 vit_medium_patch16_gap_256 vit_relpos_medium_patch16_cls_224 EVA02-B-16 EVA01-g-14
ViTamin-S MobileCLIP-S1 MobileCLIP-B MobileCLIP2-S0 PE-Core-T-16-384 ViT-B-16-SigLIP ViT-B-32-SigLIP2-256 coca_ViT-B-32
coca_roberta-ViT-B-32 roberta-ViT-B-32 xlm-roberta-base-ViT-B-32 mt5-base-ViT-B-32 nllb-clip-base ViT-H-14-worldwide
"""


def main(names: list[str]) -> None:
    """Check each model and print a row of the table."""
    print("| model | image tower | text tower | result |\n| --- | --- | --- | --- |")
    for name in names:
        architecture = find_architecture(name)
        vision, text = architecture["vision_cfg"], architecture["text_cfg"]
        kinds = (vision.get("timm_model_name") or "open_clip", text.get("hf_model_name") or "open_clip")
        try:
            result = check(one_block(architecture))
        except Exception as error:  # the table continues with the next family
            lines = str(error).strip().splitlines() or [type(error).__name__]
            result = f"not supported: {lines[0][:160]}"
        print(f"| {name} | {' | '.join(kinds)} | {result} |", flush=True)


def check(architecture: Architecture) -> str:
    """Take a training step, load the checkpoint back, and return a summary. Raises any error of these."""
    torch.manual_seed(0)
    model, _, _ = create_model_and_transforms(architecture, num_prompts=2)
    size = model.preprocess["size"]
    images = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    tokens = torch.randint(1, 1000, (2, context_length(architecture)))
    model.train()
    image, yes, no = model.encode_image(images), model.encode_text(tokens), model.encode_no_text(tokens)
    loss = sum(itbo_loss(image, yes, no, model.logit_scale.exp())) + tso_loss(yes, no)
    loss.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained), "a parameter has no gradient"
    torch.optim.AdamW(trained, lr=1e-3).step()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.encode_image_with_tower(images)[0], model.encode_image(images)), "the tower differs"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "epoch_1.pt"
        write_checkpoint({"state_dict": model.published_state()}, path)
        loaded, _, _ = create_model_and_transforms(architecture, path)
        for name, inputs in (("encode_image", images), ("encode_text", tokens), ("encode_no_text", tokens)):
            assert torch.equal(getattr(model, name)(inputs), getattr(loaded, name)(inputs)), f"{name} differs"
    total = sum(p.numel() for p in model.parameters()) / 1e6
    return f"works ({total:.0f} M parameters, loss {float(loss.detach()):.2f})"


def one_block(architecture: Architecture) -> Architecture:
    """The architecture with open_clip's own towers cut to one block per stage."""
    for tower in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        layers = architecture.get(tower, {}).get("layers")
        if layers:
            architecture[tower]["layers"] = [1] * len(layers) if isinstance(layers, list) else 1
    if architecture["vision_cfg"].get("timm_model_name") is None:
        architecture["vision_cfg"].setdefault("layers", 1)
    architecture["text_cfg"].setdefault("layers", 1)
    return architecture


if __name__ == "__main__":
    main(sys.argv[1:] or FAMILIES.split())
