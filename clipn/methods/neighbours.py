"""Nearest training images by cosine, and a classifier of their labels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipn.features.columns import Rows

_BANK = 65_536  # training images that images are compared with at once


def nearest(images: Tensor, train: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines [B, k] of images [B, D] to training images [M, D], in falling order, and their numbers.

    Both may have any length. k is at most M.
    """
    images = F.normalize(images.float(), dim=1)
    cosines, numbers = images.new_empty(len(images), 0), torch.empty(len(images), 0, dtype=torch.long)
    numbers = numbers.to(images.device)
    for start in range(0, len(train), _BANK):
        bank = F.normalize(train[start : start + _BANK].float(), dim=1)
        best = (images @ bank.T).topk(min(k, len(bank)), dim=1)
        cosines, numbers = torch.cat([cosines, best.values], dim=1), torch.cat([numbers, start + best.indices], dim=1)
        cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
        numbers = numbers.gather(1, order)
    return cosines, numbers


def knn_classifier(
    train: Rows, labels: Tensor, num_classes: int, k: int = 20, temperature: float = 0.02
) -> Callable[[Tensor], Tensor]:
    """Images [B, D] -> classes [B]: the largest sum of exp(cosine / temperature) over the k nearest training images.

    labels: of the training images, [M]. Of fewer than k training images, all vote.
    """
    labels = labels.to(train.device).long()

    def classify(images: Tensor) -> Tensor:
        cosines, numbers = nearest(images.to(train.device), train, min(k, len(train)))
        weights = (cosines.double() / temperature).exp()
        votes = weights.new_zeros(len(images), num_classes).scatter_add_(1, labels[numbers], weights)
        return votes.argmax(dim=1)

    return classify
