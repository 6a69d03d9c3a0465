"""How well what says no tells held-out pairs from images with the captions of others."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clipn.config.schema import Config
from clipn.data.pairs import Tokenizer, open_pairs
from clipn.features.pairs import pair_features
from clipn.losses import itbo_loss
from clipn.model.clipn import CLIPN
from clipn.model.precision import autocast

_TEXTS = 256  # encoded, or compared with all images, at once


class Validation:
    """The pairs of data.val_shards, encoded once as training pairs are, one view each, into features.dir/val.

    Raises what `open_pairs` and `pair_features` raise, and ValueError for fewer than two pairs.
    """

    def __init__(self, config: Config, model: CLIPN, tokenizer: Tokenizer) -> None:
        data = replace(config.data, shards=config.data.val_shards)
        features = replace(config.features, dir=str(Path(config.features.dir) / "val"), views=1)
        pairs = pair_features(replace(config, data=data, features=features), model, tokenizer, open_pairs(data))
        if len(pairs) < 2:
            raise ValueError(f"data.val_shards={data.shards!r}: only {len(pairs)} readable pair; 2 or more are needed")
        batch = pairs.batch([(0, row) for row in range(len(pairs))])
        self.image, self.yes = batch["image_features"].float(), batch["yes_features"].float()
        self.inputs = batch.get("no_tokens", batch.get("tokens", self.yes))  # an adapter reads the yes features
        self.model, self.precision = model, config.train.precision

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`margin_figures` of the model as it is now, each name with "val_" before it."""
        model, device = self.model.eval(), self.model.logit_scale.device
        with autocast(device, self.precision):
            no = torch.cat([model.no_text(part.to(device)).float() for part in self.inputs.split(_TEXTS)])
        model.train()
        scale, bias = float(model.logit_scale.exp()), model.no_text.bias
        bias = 0.0 if bias is None else float(bias)
        figures = margin_figures(self.image.to(device), self.yes.to(device), no, scale, bias)
        return {f"val_{name}": value for name, value in figures.items()}


def margin_figures(image: Tensor, yes: Tensor, no: Tensor, scale: float, bias: float = 0.0) -> dict[str, float]:
    """ITBO, accuracy and AUROC of the margins d of N pairs, each text compared with all N images.

    itbo: the sum of the loss's two terms. accuracy: the mean of the shares of matched pairs with d < 0 and of
    unmatched pairs with d > 0. auroc: the share of (matched, unmatched) pairs whose matched one has the lower d.

    image, yes, no: f, g and n [N, D], L2-normalised, N >= 2. scale, bias: s and b in d = s (f . n - f . g) + b.
    """
    difference, count = no - yes, len(yes) * (len(yes) - 1)
    own = scale * (image * difference).sum(dim=1) + bias
    ranked, above_zero, above_own = own.sort().values, 0, 0
    for start in range(0, len(yes), _TEXTS):
        part = difference[start : start + _TEXTS]
        margins = scale * (part @ image.T) + bias  # [texts, images]
        others = torch.ones_like(margins, dtype=torch.bool)
        others.diagonal(start).fill_(False)
        unmatched = margins[others]
        above_zero += int((unmatched > 0).sum())
        above_own += sum(int(torch.searchsorted(ranked, unmatched, right=right).sum()) for right in (False, True))
    return {
        "itbo": float(sum(itbo_loss(image, yes, no, scale, bias=bias))),
        "accuracy": (float((own < 0).float().mean()) + above_zero / count) / 2,
        "auroc": above_own / (2 * count * len(yes)),  # ties count half
    }
