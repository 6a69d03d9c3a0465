"""What says no: a text tower with learnable prompts, or an adapter on the "yes" feature, with or without a bias."""

import copy

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from clipn.model.packed_text import compile_text, is_standard, text_features, token_embedding


class NoTextTower(nn.Module):
    """The "no" text tower: a full copy of a text tower, and P prompts that are added to its input embeddings.

    prompts: [P, context_length, width], zero at the start (CLIPN, section 3.2), or None for P = 0.
    bias: the scalar b in d = s (f . n - f . g) + b, zero at the start, or None.
    """

    def __init__(self, text: nn.Module, num_prompts: int, context_length: int, bias: bool = False) -> None:
        super().__init__()
        self.tower = copy.deepcopy(text).requires_grad_(True)
        width = token_embedding(self.tower).embedding_dim
        prompts = nn.Parameter(torch.zeros(num_prompts, context_length, width)) if num_prompts else None
        self.register_parameter("prompts", prompts)
        self.register_parameter("bias", nn.Parameter(torch.zeros(())) if bias else None)

    def forward(self, tokens: Tensor, choice: Tensor | None = None) -> Tensor:
        """Token ids [B, L] -> features [B, D], float32, L2-normalised.

        choice: [B] integers in 0..P, each caption's prompt; P is the mean prompt, and None is P for all.
        """
        prompts = self.prompts
        if prompts is not None:
            mean = prompts.mean(dim=0, keepdim=True)
            prompts = mean if choice is None else torch.cat([prompts, mean])
        return text_features(self.tower, tokens, prompts, choice)

    def recompute_activations(self) -> None:
        """Trade time for memory: keep only each block's input. Raises ValueError for a tower that cannot."""
        if isinstance(self.tower, TextTransformer) and not is_standard(self.tower):
            raise ValueError("train.grad_checkpointing: open_clip cannot recompute this text tower's blocks")
        self.tower.set_grad_checkpointing(True)

    def compile_parts(self) -> None:
        """Apply torch.compile to the parts that become faster."""
        compile_text(self.tower)


class NoAdapter(nn.Module):
    """An adapter in the tower's place: n = normalize(g + MLP(g)) on the frozen "yes" feature g.

    The MLP has one hidden layer of `width` units and GELU, as the blocks of CLIP's towers. Its last layer is zero at
    the start, so that n = g. bias: as in `NoTextTower`.
    """

    prompts = None

    def __init__(self, dim: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        for parameter in self.adapter[2].parameters():
            nn.init.zeros_(parameter)
        self.register_parameter("bias", nn.Parameter(torch.zeros(())) if bias else None)

    def forward(self, yes: Tensor) -> Tensor:
        """Yes features [B, D] -> no features [B, D], both float32 and L2-normalised."""
        added = self.adapter(yes.to(self.adapter[0].weight.dtype))  # a model in half precision
        return F.normalize(yes + added.float(), dim=-1)

    def recompute_activations(self) -> None:
        """Do nothing: the activations of one hidden layer are small."""

    def compile_parts(self) -> None:
        """Apply torch.compile to the MLP."""
        self.adapter.compile()
