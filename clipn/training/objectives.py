"""What a training run trains, and its loss on a batch: CLIPN's no tower, or the base CLIP itself."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from open_clip import ClipLoss
from torch import Tensor, nn

from clipn.config.schema import Config
from clipn.features.store import autocast
from clipn.losses import itbo_loss, tso_loss
from clipn.model.base import Architecture, build_base, load_base
from clipn.model.checkpoint import load_weights, published_name
from clipn.model.clipn import create_model_and_transforms
from clipn.model.packed_text import compile_text, text_features
from clipn.runtime.distributed import gather_rows, rank, world_size

Batch = dict[str, Tensor]


class Objective(Protocol):
    """A training run's model. `trained` holds every parameter that learns."""

    trained: nn.Module
    preprocess: dict
    architecture: Architecture

    def prepare(self, batch: Batch, step: int) -> Batch:
        """What of this rank's share of a global batch is computed once and without a gradient, on the device."""

    def loss(self, trained: nn.Module, batch: Batch, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """A prepared batch -> what these rows of it add to the loss to descend, and to its terms.

        `trained` is self.trained, wrapped for many ranks or not; summed over rows, the mean over ranks is the loss of
        the whole global batch.
        """

    def after_step(self) -> dict[str, float]:
        """Called after each optimizer step; returns what else to log."""

    def published_state(self) -> dict[str, Tensor]:
        """The weights in the published layout."""

    def load(self, state: dict[str, Tensor], source: str) -> None:
        """Take weights in the published layout, all of them."""


class ClipnObjective:
    """The no tower and its prompts learn from ITBO and TSO; the base stays as it is (CLIPN, section 3.3)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        settings = config.model
        self.config, self.device = config, device
        self.model, _, _ = create_model_and_transforms(
            settings.name, settings.pretrained, settings.num_prompts, device, settings.image_mean, settings.image_std
        )
        self.model.train()
        self.trained = self.model.no_text
        self.preprocess, self.architecture = self.model.preprocess, self.model.architecture
        if config.train.grad_checkpointing:
            self.trained.recompute_activations()
        if config.train.compile:
            self.model.compile_towers()

    def prepare(self, batch: Batch, step: int) -> Batch:
        tokens = batch["tokens"]
        if "image_features" in batch:
            features = (batch[name].to(self.device).float() for name in ("image_features", "yes_features"))
        else:
            features = self._frozen(batch["image"], tokens)
        image, yes = features
        prepared = {"everyone": gather_rows(image), "yes": yes, "tokens": batch.get("no_tokens", tokens)}
        choice = self._choice(len(tokens), step)
        return prepared if choice is None else prepared | {"choice": choice}

    def loss(self, trained: nn.Module, batch: Batch, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        train, share = self.config.train, len(batch["tokens"])
        yes, tokens = batch["yes"][rows], batch["tokens"][rows]
        with autocast(self.device, train.precision):
            no = trained(tokens, batch["choice"][rows] if "choice" in batch else None)
        scale = self.model.logit_scale.exp()
        itbo_yes, itbo_no = itbo_loss(batch["everyone"], yes, no, scale, first=rank() * share + rows.start)
        tso = tso_loss(yes, no, train.tso_kind)
        part = len(tokens) / share
        loss = 0.5 * part * (train.itbo_weight * (itbo_yes + itbo_no) + train.tso_weight * tso)
        terms = {"itbo_yes": itbo_yes, "itbo_no": itbo_no, "tso": tso}
        for name, texts in (("yes", yes), ("no", no.detach())):
            terms |= _mean_logits(batch["everyone"], texts, scale, rank() * share + rows.start, name)
        return loss, {name: part * value for name, value in terms.items()}

    def _frozen(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 3, H, W] and [b, L] -> image and yes features, a micro-batch at a time."""
        size = self.config.train.micro_batch_size or len(tokens)
        with torch.inference_mode(), autocast(self.device, self.config.train.precision):
            images = images.to(self.device, non_blocking=True)
            image = torch.cat([self.model.encode_image(part) for part in images.split(size)])
            yes = torch.cat([self.model.encode_text(part) for part in tokens.split(size)])
        return image.clone(), yes.clone()  # an inference tensor itself cannot take part in a gradient

    def after_step(self) -> dict[str, float]:
        prompts = self.model.no_text.prompts
        return {} if prompts is None else {"prompt_norm": float(prompts.detach().mean(dim=0).norm())}

    def published_state(self) -> dict[str, Tensor]:
        return self.model.published_state()

    def load(self, state: dict[str, Tensor], source: str) -> None:
        load_weights(self.model, state, self.model.published_names(), source)

    def _choice(self, share: int, step: int) -> Tensor | None:
        """Each caption's prompt, 0..P with P the mean: drawn for the global batch, so alike on any number of ranks."""
        if not self.model.num_prompts:
            return None
        draws = np.random.default_rng([self.config.run.seed, step])
        choice = draws.integers(self.model.num_prompts + 1, size=share * world_size())
        return torch.from_numpy(choice[rank() * share : (rank() + 1) * share]).to(self.device, non_blocking=True)


def _mean_logits(images: Tensor, texts: Tensor, scale: Tensor, first: int, name: str) -> dict[str, Tensor]:
    """The mean logits of texts [b, D] with the image of their own pair, number `first` on, and with all the others."""
    own = images[first : first + len(texts)]
    others = (images.sum(dim=0) - own) / (len(images) - 1)
    pairs = (("matched", own), ("unmatched", others))
    return {f"logit_{name}_{kind}": scale * (texts * part).sum(dim=1).mean() for kind, part in pairs}


class ClipObjective:
    """The base CLIP learns by the ordinary contrastive loss (Radford et al., ICML 2021)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        settings = config.model
        self.config, self.device = config, device
        base, self.architecture = build_base(settings.name, settings.pretrained)
        for key, value in (("mean", settings.image_mean), ("std", settings.image_std)):
            if value is not None:
                base.visual.preprocess_cfg[key] = tuple(value)
        self.base = base.to(device).train()
        self.preprocess = base.visual.preprocess_cfg
        # A logit bias cancels in the softmax, and a caption decoder has no part in this loss.
        base.requires_grad_(False)
        for part in (base.visual, base.text):
            part.requires_grad_(True)
        base.logit_scale.requires_grad_(True)
        if config.train.grad_checkpointing:
            base.set_grad_checkpointing(True)
        if config.train.compile:
            base.visual.compile()
            compile_text(base.text)
        self.trained = _Towers(base)
        self.contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())

    def prepare(self, batch: Batch, step: int) -> Batch:
        return {"image": batch["image"].to(self.device, non_blocking=True), "tokens": batch["tokens"]}

    def loss(self, trained: nn.Module, batch: Batch, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows == slice(0, len(batch["tokens"])), "the contrastive loss compares every text of a batch"
        with autocast(self.device, self.config.train.precision):
            image, text, scale = trained(batch["image"], batch["tokens"])
        return self.contrastive(image.float(), text.float(), scale), {}

    def after_step(self) -> dict[str, float]:
        with torch.no_grad():
            self.base.logit_scale.clamp_(0, math.log(100))  # as CLIP's own training does
        return {"logit_scale": float(self.base.logit_scale.detach().exp())}

    def published_state(self) -> dict[str, Tensor]:
        return {published_name(name): value for name, value in self.base.state_dict().items()}

    def load(self, state: dict[str, Tensor], source: str) -> None:
        load_base(self.base, state, source)


class _Towers(nn.Module):
    """Both towers in one forward call, which many-rank training needs."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = self.base.encode_image(images, normalize=True)
        text = text_features(self.base.text, tokens)
        return image, text, self.base.logit_scale.exp()


OBJECTIVES: dict[str, Any] = {"clipn": ClipnObjective, "clip": ClipObjective}
