"""The optimizer: AdamW, and the learning rate of each step."""

import math

import torch
from torch import nn

from clipn.config.schema import TrainConfig


def build_optimizer(trained: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on tensors of two or more dimensions: none on norms, biases and scalars."""
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type != "mps" for p in parameters)  # not every PyTorch has it there
    return torch.optim.AdamW(groups, lr=train.lr, betas=tuple(train.betas), eps=train.eps, fused=fused)


def restride(optimizer: torch.optim.AdamW) -> None:
    """Give loaded moments the memory format of their parameters, which the fused AdamW takes for granted."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def learning_rate(step: int, total: int, train: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from train.lr to 0."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))
