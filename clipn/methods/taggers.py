"""Taggers: which tokens of an image show an ID class. TagOOD scores the tokens that they keep.

A tagger is a callable with three attributes, see `Tagger`. "clip" is the base itself: its patch features are the
tokens, and class names the tags. "ram" and "ram++" are the models of the package recognize-anything. "MODULE:FUNCTION"
calls FUNCTION(settings, model, head, class_names, scale), which returns a tagger.
"""

import difflib
import importlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from torch import Tensor, nn

from clipn.config.evaluation import TagoodConfig
from clipn.data.prompts import read_lines
from clipn.methods.from_images import local_features
from clipn.model.clipn import CLIPN
from clipn.model.hashing import tensor_hash, weights_hash
from clipn.model.head import Head
from clipn.runtime.console import shortened

_CONSTANT = 1e-5  # attention that varies less, relative to its largest value, counts as constant
_GRADIENT_IMAGES = 16  # in one pass backward: ViT-B-16 keeps 75 MB an image
_RAM_IMAGES = 16  # tagged at once: RAM's attention takes 10 MB an image and layer
_RAM_SIZE, _RAM_DIM = 384, 512
_RAM_FILES = {
    "ram": "ram_swin_large_14m.pth from huggingface.co/spaces/xinyu1205/Recognize_Anything-Tag2Text",
    "ram++": "ram_plus_swin_large_14m.pth from huggingface.co/xinyu1205/recognize-anything-plus-model",
}
_RAM_PACKAGE = "git+https://github.com/xinyu1205/recognize-anything.git"


class Tags(NamedTuple):
    """What a tagger says of B images. tokens[:, 0] is that of the whole image."""

    tokens: Tensor  # [B, P, D]
    attention: Tensor  # [B, P], 0..1: how much a token shows a tag of the image
    confidence: Tensor  # [B], 0..1: of the image's best tag
    tagged: Tensor  # [B] bool; an image without a tag has the attention and the confidence of its best one


class Tagger(Protocol):
    """Normalised images [B, 3, H, W] -> Tags."""

    identity: str  # all that the tags depend on, for the key of kept tokens
    dim: int  # D
    preprocess: dict[str, Any]  # of images, in open_clip's words: size, mean, std, interpolation, resize_mode

    def __call__(self, pixels: Tensor) -> Tags: ...


def select_tokens(tokens: Tensor, attention: Tensor, threshold: float, max_tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens [B, n, D] in raster order, and a mask [B, n] of those with more attention than the threshold.

    At most max_tokens of an image, those of most attention, the first of equal ones. An image keeps one at least.
    """
    numbers = attention.argsort(dim=1, descending=True, stable=True)[:, :max_tokens]
    mask = attention.gather(1, numbers) > threshold
    mask[:, 0] = True
    numbers, order = numbers.sort(dim=1)
    return tokens.gather(1, numbers[..., None].expand(-1, -1, tokens.shape[2])), mask.gather(1, order)


def kept_places(attention: Tensor, threshold: float, max_tokens: int) -> Tensor:
    """Where the tokens are that `select_tokens` keeps: [B, P] bool, from attention [B, P]."""
    places = torch.arange(attention.shape[1], device=attention.device).expand_as(attention)[..., None]
    places, mask = select_tokens(places, attention, threshold, max_tokens)
    return torch.zeros_like(attention, dtype=torch.bool).scatter_(1, places[..., 0], mask)


def check_tagger(settings: TagoodConfig) -> None:
    """Raise ValueError or FileNotFoundError, one line, for a tagger that is not installed or lacks a file."""
    if settings.tagger.startswith("ram"):
        _ram_module(settings)
    elif settings.tagger != "clip":
        _own_function(settings.tagger)


def make_tagger(settings: TagoodConfig, model: CLIPN, head: Head, class_names: Sequence[str], scale: float) -> Tagger:
    """The tagger that the settings name, on the model's device.

    Raises ValueError or FileNotFoundError for one that is not installed, and for class names that are no tags of it.
    """
    if settings.tagger == "clip":
        return ClipTagger(settings, model, head, scale)
    if settings.tagger.startswith("ram"):
        return RamTagger(settings, class_names, model.logit_scale.device)
    tagger = _own_function(settings.tagger)(settings, model, head, class_names, scale)
    kinds = {"identity": str, "dim": int, "preprocess": dict, "__call__": Callable}
    missing = [name for name, kind in kinds.items() if not isinstance(getattr(tagger, name, None), kind)]
    if missing:
        problem = f"has no {missing[0]}, or one of another type"
        raise ValueError(f"tagood.tagger={settings.tagger}: the {type(tagger).__name__} it makes {problem}")
    return tagger


def tag(tagger: Tagger, pixels: Tensor) -> Tags:
    """What the tagger says of images [B, 3, H, W], checked. Raises ValueError for what is not as `Tags` says."""
    tags = tagger(pixels)
    if not isinstance(tags, Tags) or not all(isinstance(part, Tensor) for part in tags):
        raise ValueError(f"tagger {tagger.identity}: expected Tags of tensors, got {type(tags).__name__}")
    count, places = len(pixels), max([*tags.attention.shape[1:], 1])
    shapes = [(count, places, tagger.dim), (count, places), (count,), (count,)]
    if [tuple(part.shape) for part in tags] != shapes or tags.tagged.dtype != torch.bool:
        expected = f"tokens [{count}, P, {tagger.dim}], attention [{count}, P], confidence and tagged [{count}]"
        found = ", ".join(f"{name} {[*part.shape]}" for name, part in tags._asdict().items())
        raise ValueError(f"tagger {tagger.identity}: expected {expected}, a bool; got {found}")
    shares = torch.cat([tags.attention.flatten(), tags.confidence])
    if not (tags.tokens.isfinite().all() and ((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(f"tagger {tagger.identity}: tokens not finite, or attention or confidence outside 0..1")
    return tags


class ClipTagger:
    """The base itself: an ID class is a tag if its probability is at least tag_threshold times the largest.

    The attention to a tag is the cosine of a patch and the class name, or for all tags the length of the gradient of
    the best class's cosine at the pixels of a patch, for bases whose patch features do not name what they show.
    tags=clipn also asks p_yes > 0.5, so that an image may have no tag, and multiplies the confidence by p_yes.

    Raises ValueError for a base without patch features, and gradients without a square grid of patches.
    """

    def __init__(self, settings: TagoodConfig, model: CLIPN, head: Head, scale: float) -> None:
        self.model, self.head, self.scale = model, head, scale
        self.threshold, self.veto = settings.tag_threshold, settings.tags == "clipn"
        self.gradient = settings.attention == "gradient"
        self.dim, self.preprocess = head.weight_yes.shape[1], model.preprocess
        weights = [tensor_hash(head.weight_yes)]
        if self.veto:
            weights += [tensor_hash(head.weight_no), *([head.bias] if head.bias else [])]
        parts = ["clip", model.architecture, weights_hash(model.base.visual), *weights, scale, self.threshold]
        self.identity = json.dumps(parts + ["gradient"] * self.gradient, sort_keys=True)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tags:
        features, patches = local_features(self.model, pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            logits_yes, logits_no = self.head(features, self.scale)
            confidence = logits_yes.softmax(dim=1)
            chosen = confidence >= self.threshold * confidence.amax(dim=1, keepdim=True)
            if self.veto:
                p_yes = torch.sigmoid(logits_yes - logits_no)
                chosen, confidence = chosen & (p_yes > 0.5), confidence * p_yes
            attention, confidence, tagged = _combine(confidence, chosen, self._attention(pixels, patches))
        attention = torch.cat([torch.ones_like(attention[:, :1]), attention], dim=1)  # the image is always a token
        return Tags(torch.cat([features[:, None], patches], dim=1), attention, confidence, tagged)

    def _attention(self, pixels: Tensor, patches: Tensor) -> Callable[[Tensor], Tensor]:
        """A function of tag numbers [t] -> the attention [B, P, t] of the patches to these."""
        weights = self.head.weight_yes
        if not self.gradient:
            return lambda used: patches @ weights[used].T
        places = patches.shape[1]
        side = math.isqrt(places)
        if side**2 != places:
            raise ValueError(f"tagood.attention=gradient: {places} patches are no square grid; use cosine")
        gradient = torch.cat([self._gradient(part) for part in pixels.split(_GRADIENT_IMAGES)])
        squares = F.adaptive_avg_pool2d(gradient.float().square().sum(dim=1, keepdim=True), side)
        return lambda used: squares.sqrt().flatten(2).mT.expand(-1, -1, len(used))

    def _gradient(self, pixels: Tensor) -> Tensor:
        """The gradient of each image's largest cosine to a class, [b, 3, H, W]."""
        with torch.inference_mode(False), torch.enable_grad():
            pixels, weights = pixels.detach().clone().requires_grad_(), self.head.weight_yes.clone()
            best = (self.model.encode_image(pixels).float() @ weights.T).amax(dim=1)
            (gradient,) = torch.autograd.grad(best.sum(), pixels)
        return gradient


class RamTagger:
    """RAM or RAM++: a tag for each class, from a list of 4585; the attention is that of the last layer, over its heads.

    Tokens are the projected features of a Swin-L at 384 px: their mean, and 144 places.
    """

    def __init__(self, settings: TagoodConfig, class_names: Sequence[str], device: torch.device) -> None:
        module = _ram_module(settings)
        make = module.ram if settings.tagger == "ram" else module.ram_plus
        self.model: nn.Module = make(pretrained=settings.weights, image_size=_RAM_SIZE, vit="swin_l").eval().to(device)
        self.model.tagging_head.config.output_attentions = True
        self.threshold, self.dim = settings.tag_threshold, _RAM_DIM
        self.preprocess = {"size": _RAM_SIZE, "interpolation": "bilinear", "resize_mode": "squash"}
        self.preprocess |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        tags = class_names if settings.tags == "classes" else _read_tags(settings.tags, class_names)
        self.tags = torch.tensor(_numbers(tags, [str(name) for name in self.model.tag_list], settings), device=device)
        parts = [settings.tagger, weights_hash(self.model), self.tags.tolist(), self.threshold]
        self.identity = json.dumps(parts)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tags:
        return Tags(*map(torch.cat, zip(*map(self._tag, pixels.split(_RAM_IMAGES)), strict=True)))

    def _tag(self, pixels: Tensor) -> Tags:
        seen: dict[str, Any] = {}
        hooks = [
            self.model.tagging_head.register_forward_hook(
                lambda module, arguments, named, outputs: seen.update(named, attentions=outputs[2]), with_kwargs=True
            ),
            self.model.fc.register_forward_hook(lambda module, arguments, logits: seen.update(logits=logits)),
        ]
        try:
            self.model.generate_tag(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        confidence = seen["logits"].squeeze(-1).float().sigmoid()[:, self.tags]
        heads = seen["attentions"][-1]  # [B, heads, tags, 145]
        attention, confidence, tagged = _combine(
            confidence, confidence > self.threshold, lambda used: heads[:, :, self.tags[used]].float().mean(1).mT
        )
        return Tags(seen["encoder_hidden_states"].float(), attention, confidence, tagged)


def _combine(
    confidence: Tensor, chosen: Tensor, attention_to: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence [B, T] and chosen tags [B, T] -> the attention [B, P], confidence [B] and tagged [B] of `Tags`.

    attention_to: tag numbers [t] -> the attention [B, P, t] to these. It is scaled to 0..1 over the places for each
    tag, constant attention to 1; the largest over the tags of an image counts.
    """
    tagged = chosen.any(dim=1)
    best = torch.zeros_like(chosen).scatter_(1, confidence.argmax(dim=1, keepdim=True), True)
    chosen = torch.where(tagged[:, None], chosen, best)
    used = chosen.any(dim=0).nonzero()[:, 0]
    attention = attention_to(used)
    low, high = attention.amin(dim=1, keepdim=True), attention.amax(dim=1, keepdim=True)
    varies = high - low > _CONSTANT * torch.maximum(high.abs(), low.abs())
    scaled = torch.where(varies, (attention - low) / (high - low), 1.0)
    scaled = scaled.masked_fill(~chosen[:, None, used], 0).amax(dim=2)
    return scaled, confidence.masked_fill(~chosen, 0).amax(dim=1), tagged


def _ram_module(settings: TagoodConfig) -> Any:
    place, fetch = f"tagood.tagger={settings.tagger}", f"fetch {_RAM_FILES[settings.tagger]}"
    try:
        module = importlib.import_module("ram.models")
    except ImportError as error:
        message = f"the package recognize-anything is missing ({error}): pip install {_RAM_PACKAGE}, and {fetch}"
        raise ValueError(f"{place}: {message}, for tagood.weights") from error
    if not Path(settings.weights or "").is_file():
        raise FileNotFoundError(f"{place}: tagood.weights={settings.weights!r} is no such file; {fetch}")
    return module


def _own_function(name: str) -> Callable[..., Tagger]:
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)
        inspect.signature(made).bind("settings", "model", "head", "class_names", "scale")
        return made
    except Exception as error:  # a module may raise anything
        expected = "a function(settings, model, head, class_names, scale) in a module on PYTHONPATH"
        raise ValueError(f"tagood.tagger={name}: {error}; expected {expected}") from error


def _read_tags(path: str, class_names: Sequence[str]) -> list[str]:
    """The lines of a file with a tag for each class."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"tagood.tags={path!r}: no such file")
    tags = read_lines(Path(path))
    if len(tags) != len(class_names):
        raise ValueError(
            f"tagood.tags={path!r}: {len(tags)} lines; expected one for each of {len(class_names)} classes"
        )
    return tags


def _numbers(tags: Sequence[str], known: Sequence[str], settings: TagoodConfig) -> list[int]:
    """The numbers of the tags in RAM's list. Raises ValueError for tags that are not in it, with near ones."""
    numbers = {name.lower(): number for number, name in reversed(list(enumerate(known)))}
    unknown = [name for name in tags if name.lower() not in numbers]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f" (near: {', '.join(near)})" if near else ""
        problem = f"{len(unknown)} of {len(tags)} are no tag of {settings.tagger}: {shortened(unknown, 5)}{hint}"
        raise ValueError(f"tagood.tags={settings.tags}: {problem}; name a tag for each class in a .txt file")
    return [numbers[name.lower()] for name in tags]
