"""The zero-shot head: class names and templates -> one yes weight and one no weight per class."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipn.data.prompts import check_class_names, check_templates, fill, negate
from clipn.model.clipn import CLIPN
from clipn.runtime.distributed import is_main

Tokenizer = Callable[[list[str]], Tensor]  # texts -> token ids [B, L]

_BATCH = 512  # texts encoded at once


class Head(nn.Module):
    """Class weights, L2-normalised: weight_yes and weight_no, each [C, D]. bias: `CLIPN.cosine_bias`."""

    weight_yes: Tensor
    weight_no: Tensor

    def __init__(self, weight_yes: Tensor, weight_no: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = bias
        self.register_buffer("weight_yes", weight_yes)
        self.register_buffer("weight_no", weight_no)

    def forward(self, image_features: Tensor, scale: float = 100.0) -> tuple[Tensor, Tensor]:
        """L2-normalised features [B, D] -> logits_yes, logits_no, each [B, C]: scale * cosine.

        The paper's code uses scale = 100 for any logit_scale. logits_no include the bias, scale * bias, so that
        logits_no - logits_yes is d, and no score has to add it.
        """
        logits_no = scale * image_features @ self.weight_no.T + scale * self.bias
        return scale * image_features @ self.weight_yes.T, logits_no


@torch.no_grad()
def build_head(model: CLIPN, tokenizer: Tokenizer, class_names: Sequence[str], templates: Sequence[str]) -> Head:
    """Encode every class name in every template with both text towers (CLIPN, section 3.4).

    Per class and tower: encode, normalise, sum over templates, normalise. A no tower without prompts reads negated
    templates. templates: texts with "{}".

    Raises ValueError for no class names, an empty class name, or a template without "{}".
    """
    templates, class_names = check_templates(templates), check_class_names(class_names)
    no_templates = [negate(template) for template in templates] if model.reads_negated else templates
    was_training = model.training
    model.eval()
    weight_yes = class_weights(model.encode_text, tokenizer, class_names, templates)
    weight_no = class_weights(model.encode_no_text, tokenizer, class_names, no_templates)
    model.train(was_training)
    return Head(weight_yes, weight_no, model.cosine_bias)


def class_weights(
    encode: Callable[[Tensor], Tensor], tokenizer: Tokenizer, class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """[C, D], encoded in batches of whole classes, so that memory does not grow with the number of classes."""
    step = max(1, _BATCH // len(templates))
    weights = []
    disable = None if is_main() else True  # None: where there is no terminal
    with tqdm(total=len(class_names), unit="class", desc="class names", disable=disable, delay=2, leave=False) as bar:
        for start in range(0, len(class_names), step):
            names = class_names[start : start + step]
            tokens = tokenizer([fill(template, name) for name in names for template in templates])
            features = torch.cat([encode(part) for part in tokens.split(_BATCH)])
            weights.append(F.normalize(features.unflatten(0, (len(names), len(templates))).sum(dim=1), dim=-1))
            bar.update(len(names))
    return torch.cat(weights)
