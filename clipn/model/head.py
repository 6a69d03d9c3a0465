"""The zero-shot head: class names and templates -> one yes and one no weight per class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipn.data.prompts import check_class_names, check_templates, fill, negate
from clipn.model.clipn import CLIPN
from clipn.runtime.distributed import is_main


class Head(nn.Module):
    """weight_yes, weight_no: [C, D], L2-normalised."""

    weight_yes: Tensor
    weight_no: Tensor

    def __init__(self, weight_yes: Tensor, weight_no: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight_yes", weight_yes)
        self.register_buffer("weight_no", weight_no)

    def forward(self, image_features: Tensor, scale: float = 100.0) -> tuple[Tensor, Tensor]:
        """[B, D] L2-normalised -> logits_yes, logits_no, each [B, C]. The paper's code uses 100 for any logit_scale."""
        return scale * image_features @ self.weight_yes.T, scale * image_features @ self.weight_no.T


def build_head(
    model: CLIPN,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 512,
) -> Head:
    """Encode every class name in every template with both towers (CLIPN, section 3.4).

    Per class and tower: encode, normalise, sum over templates, normalise. A model without prompts reads the negated
    templates in its no tower. templates: texts with "{}".

    Raises ValueError for no class names, an empty one, or a template without "{}".
    """
    templates = check_templates(templates)
    class_names = check_class_names(class_names)
    no_templates = templates if model.num_prompts else [negate(template) for template in templates]
    weight_yes = _class_weights(model.encode_text, tokenizer, class_names, templates, model, batch_size)
    weight_no = _class_weights(model.encode_no_text, tokenizer, class_names, no_templates, model, batch_size)
    return Head(weight_yes, weight_no)


@torch.no_grad()
def _class_weights(
    encode: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
    model: CLIPN,
    batch_size: int,
) -> Tensor:
    was_training = model.training
    model.eval()
    at_once = max(1, batch_size // len(templates))  # whole classes: a thousand of them need no more memory than one
    weights = []
    hidden = None if is_main() else True
    with tqdm(total=len(class_names), unit="class", desc="class names", disable=hidden, delay=2, leave=False) as bar:
        for start in range(0, len(class_names), at_once):
            names = class_names[start : start + at_once]
            texts = [fill(template, name) for name in names for template in templates]
            features = torch.cat([encode(tokenizer(part)) for part in _parts(texts, batch_size)])
            weights.append(F.normalize(features.unflatten(0, (len(names), len(templates))).sum(dim=1), dim=-1))
            bar.update(len(names))
    model.train(was_training)
    return torch.cat(weights)


def _parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
