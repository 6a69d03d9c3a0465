"""What a training run optimises: CLIPN's no tower, or the base CLIP itself, and its loss on a batch."""

import logging
import math

import torch
from open_clip import ClipLoss
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipn.config.schema import Config
from clipn.data.images import pixel_input
from clipn.losses import itbo_loss, tso_loss
from clipn.model.base import build_base
from clipn.model.checkpoint import load_weights, published_state
from clipn.model.clipn import configured_model
from clipn.model.packed_text import compile_text, text_features
from clipn.model.precision import autocast
from clipn.runtime.distributed import gather_rows, rank, world_size
from clipn.runtime.random import stream

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class ClipnObjective:
    """The no tower and its prompts, or the adapter, and the bias learn from ITBO and TSO; the base is frozen.

    The losses are those of CLIPN, section 3.3.

    `trained` holds every parameter that learns.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = configured_model(config.model, device).train()
        self.trained = sync_batch_norm(self.model.no_text, device)
        self.preprocess, self.architecture = self.model.preprocess, self.model.architecture
        self.to_input = pixel_input(self.preprocess, device)
        if config.train.grad_checkpointing:
            self.trained.recompute_activations()
        if config.train.compile:
            self.model.compile_towers()

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Compute on the device what this rank's share of a batch needs once, without a gradient.

        "yes" holds its yes features [b, D]. With an adapter, which reads them, no caption is read here.
        """
        if "image_features" in batch:
            image, yes = (batch[name].to(self.device).float() for name in ("image_features", "yes_features"))
        else:
            image, yes = self._frozen(batch["image"], batch["tokens"])
        prepared = {"all_images": gather_rows(image), "yes": yes}
        if self.model.no_tower == "adapter":
            return prepared
        prepared["tokens"], choice = batch.get("no_tokens", batch["tokens"]), self._choice(len(yes), step)
        return prepared if choice is None else prepared | {"choice": choice}

    def loss(self, trained: nn.Module, batch: Batch, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of these rows of a prepared batch in the loss and in its logged terms.

        `trained` is self.trained, wrapped for many ranks or not. The loss is the sum over rows, averaged over ranks.
        """
        train, share = self.config.train, len(batch["yes"])
        images, yes = batch["all_images"], batch["yes"][rows]
        with autocast(self.device, train.precision):
            no = trained(*([batch[name][rows] for name in ("tokens", "choice") if name in batch] or [yes]))
        scale = self.model.logit_scale.exp().reshape(())  # some models have it of shape [1]
        first, bias = rank() * share + rows.start, self.model.no_text.bias
        bias = yes.new_zeros(()) if bias is None else bias
        itbo_yes, itbo_no = itbo_loss(images, yes, no, scale, first=first, bias=bias)
        tso = tso_loss(yes, no, train.tso_kind)
        part = len(yes) / share
        loss = 0.5 * part * (train.itbo_weight * (itbo_yes + itbo_no) + train.tso_weight * tso)
        terms = {"itbo_yes": itbo_yes, "itbo_no": itbo_no, "tso": tso}
        for name, texts, added in (("yes", yes, 0.0), ("no", no.detach(), bias.detach())):
            logits = _mean_logits(images, texts, scale, first)
            terms |= {f"logit_{name}_{kind}": logit + added for kind, logit in logits.items()}
        return loss, {name: part * value for name, value in terms.items()}

    def _frozen(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 3, H, W] in uint8 and [b, L] -> image and yes features, a micro-batch at a time."""
        size = self.config.train.micro_batch_size or len(tokens)
        with torch.inference_mode(), autocast(self.device, self.config.train.precision):
            image = torch.cat([self.model.encode_image(self.to_input(part)) for part in images.split(size)])
            yes = torch.cat([self.model.encode_text(part) for part in tokens.split(size)])
        return image.clone(), yes.clone()  # an inference tensor itself cannot take part in a gradient

    def after_step(self) -> None:
        pass

    def log_values(self) -> dict[str, float]:
        """What to log besides the loss and its terms; reading it waits for the device."""
        prompts, bias = self.model.no_text.prompts, self.model.no_text.bias
        values = {} if prompts is None else {"prompt_norm": float(prompts.detach().mean(dim=0).norm())}
        return values if bias is None else values | {"bias": float(bias.detach())}

    def published_state(self) -> dict[str, Tensor]:
        return self.model.published_state()

    def load(self, state: dict[str, Tensor], source: str) -> None:
        load_weights(self.model, state, source)

    def _choice(self, share: int, step: int) -> Tensor | None:
        """Each caption's prompt, 0..P with P the mean. Drawn for the global batch, so alike on any number of ranks."""
        if not self.model.num_prompts:
            return None
        draws = stream("prompts", self.config.run.seed, step)
        choice = draws.integers(self.model.num_prompts + 1, size=share * world_size())
        return torch.from_numpy(choice[rank() * share : (rank() + 1) * share]).to(self.device, non_blocking=True)


def _mean_logits(images: Tensor, texts: Tensor, scale: Tensor, first: int) -> dict[str, Tensor]:
    """The mean logits of texts [b, D] with the image of their own pair, number `first` on, and with all the others."""
    own = images[first : first + len(texts)]
    others = (images.sum(dim=0) - own) / (len(images) - 1)
    pairs = (("matched", own), ("unmatched", others))
    return {kind: scale * (texts * part).sum(dim=1).mean() for kind, part in pairs}


class ClipObjective:
    """The base CLIP learns from the ordinary contrastive loss (Radford et al., ICML 2021); methods as above."""

    def __init__(self, config: Config, device: torch.device) -> None:
        settings = config.model
        self.config, self.device = config, device
        base, self.architecture = build_base(settings.name, settings.pretrained)
        for key, value in (("mean", settings.image_mean), ("std", settings.image_std)):
            if value is not None:
                base.visual.preprocess_cfg[key] = tuple(value)
        self.preprocess = base.visual.preprocess_cfg
        self.to_input = pixel_input(self.preprocess, device)
        base.visual.to(memory_format=torch.channels_last)  # convolutions are faster in it, above all on a CPU
        self.base = sync_batch_norm(base.to(device).train(), device)
        # A logit bias cancels in the softmax, and a caption decoder has no part in this loss.
        base.requires_grad_(False)
        for part in (base.visual, base.text, base.logit_scale):
            part.requires_grad_(True)
        if config.train.grad_checkpointing:
            base.set_grad_checkpointing(True)
        if config.train.compile:
            base.visual.compile()
            compile_text(base.text)
        self.trained = _Towers(base)
        self.contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())

    def prepare(self, batch: Batch, step: int) -> Batch:
        return {"image": self.to_input(batch["image"]), "tokens": batch["tokens"]}

    def loss(self, trained: nn.Module, batch: Batch, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows == slice(0, len(batch["tokens"])), "the contrastive loss compares every text of a batch"
        with autocast(self.device, self.config.train.precision):
            image, text, scale = trained(batch["image"], batch["tokens"])
        return self.contrastive(image.float(), text.float(), scale), {}

    def after_step(self) -> None:
        with torch.no_grad():
            self.base.logit_scale.clamp_(0, math.log(100))  # as CLIP's own training does

    def log_values(self) -> dict[str, float]:
        return {"logit_scale": float(self.base.logit_scale.detach().exp())}

    def published_state(self) -> dict[str, Tensor]:
        return published_state(self.base)

    def load(self, state: dict[str, Tensor], source: str) -> None:
        load_weights(self.base, state, source)


class _Towers(nn.Module):
    """Both towers in one forward call, which DistributedDataParallel needs."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.base.encode_image(images, normalize=True), text_features(self.base.text, tokens)
        return image, text, self.base.logit_scale.exp()


def sync_batch_norm(trained: nn.Module, device: torch.device) -> nn.Module:
    """The module with batch statistics over all ranks, where PyTorch has that (CUDA); elsewhere it warns, once."""
    if world_size() == 1 or not any(isinstance(module, _BatchNorm) for module in trained.modules()):
        return trained
    if device.type == "cuda":
        return convert_sync_batchnorm(trained)
    log.warning(
        f"the model has BatchNorm layers, and on the {device.type} each of the {world_size()} ranks normalises by its "
        "own share of a batch: the result depends on the number of ranks"
    )
    return trained


Objective = ClipnObjective | ClipObjective
OBJECTIVES: dict[str, type[Objective]] = {"clipn": ClipnObjective, "clip": ClipObjective}
