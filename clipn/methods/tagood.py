"""TagOOD: a projector of object tokens and class centres (ACM MM 2024, arXiv 2408.15566). Higher means in-distribution.

A tagger keeps the tokens of an image's objects. The projector, a small transformer, makes one feature f of them and is
trained to classify the ID training images, and to bring f near the centre of the class. The score is the cosine to the
nearest centre. Centres [C, groups, width / groups] are compared group by group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """A small transformer from a set of tokens to one feature: torchvision's ViT encoder, of CLS and the tokens.

    dim: of a token. max_tokens: of a set at most, the CLS token included. dropout: also of the attention.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        width: int = 512,
        layers: int = 2,
        heads: int = 8,
        max_tokens: int = 146,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.empty(max_tokens, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, "gelu", 1e-6, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, num_classes)
        for block in self.blocks:  # torchvision's initial values
            for linear in (block.linear1, block.linear2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B, n, dim] and a mask [B, n], True for real ones -> features [B, width], float32.

        Padding may be anywhere: a token's position is its rank among the real ones, and CLS has position 0.
        Raises ValueError for a set without tokens or with more than max_tokens - 1, and for shapes that do not fit.
        """
        dim, most = self.project.in_features, len(self.positions) - 1
        ok = tokens.ndim == 3 and len(tokens) and tokens.shape[2] == dim
        if not ok or mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
            found = f"{[*tokens.shape]} and {[*mask.shape]} {mask.dtype}"
            raise ValueError(f"projector: expected tokens [B, n, {dim}] and a boolean mask [B, n], got {found}")
        rank = mask.cumsum(dim=1)
        counts = rank.amax(dim=1) if mask.shape[1] else rank.new_zeros(len(mask))
        if not 1 <= int(counts.min()) <= int(counts.max()) <= most:
            wrong = int(((counts < 1) | (counts > most)).nonzero()[0])
            raise ValueError(f"projector: image {wrong} has {int(counts[wrong])} tokens; expected 1 to {most}")
        hidden = self.project(tokens.to(self.project.weight.dtype)) + self.positions[rank]
        hidden = self.dropout(torch.cat([self.positions[:1].expand(len(tokens), 1, -1), hidden], dim=1))  # CLS is zeros
        padding = F.pad(~mask, (1, 0), value=False)
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=padding)
        return self.norm(hidden[:, 0]).float()

    def classify(self, features: Tensor) -> Tensor:
        """Features [B, width] -> logits [B, C]."""
        return self.classifier(features)


class MeanToken(nn.Module):
    """The mean of an image's tokens: an encoder without training."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B, n, D] and a mask [B, n] -> [B, D], float32."""
        weights = mask[..., None].float()
        return (tokens.float() * weights).sum(dim=1) / weights.sum(dim=1)


def centre_loss(features: Tensor, centres: Tensor, labels: Tensor) -> Tensor:
    """The mean over a batch of |f - c_y|^2, as a sum over groups of the mean over a group; equation 5 of the paper.

    features: [B, W]. centres: [C, groups, W / groups]. labels: [B].
    """
    differences = features.unflatten(1, centres.shape[1:]) - centres[labels]
    return differences.square().mean(dim=2).sum(dim=1).mean()


@torch.no_grad()
def update_centres(centres: Tensor, features: Tensor, labels: Tensor, decay: float = 0.999) -> Tensor:
    """Move, in place, the centre of each class in a batch: decay * centre + (1 - decay) * the mean of its features.

    centres: [C, groups, W / groups]. features: [B, W]. labels: [B]. Returns the centres.
    """
    present, position = labels.unique(return_inverse=True)
    sums = features.new_zeros(len(present), features.shape[1]).index_add_(0, position, features)
    means = (sums / position.bincount()[:, None]).unflatten(1, centres.shape[1:]).to(centres.dtype)
    centres[present] = decay * centres[present] + (1 - decay) * means
    return centres


def centre_score(features: Tensor, centres: Tensor) -> Tensor:
    """The largest over classes of the mean over groups of cos(feature, centre): [B, W], [C, groups, W / groups] -> [B].

    Give the centres of classes with training images alone.
    """
    groups = centres.shape[1]
    features = F.normalize(features.unflatten(1, centres.shape[1:]), dim=2).flatten(1)
    return (features @ F.normalize(centres, dim=2).flatten(1).T).amax(dim=1) / groups
