"""Adversarial OOD images: OOD images moved until the image tower takes them for ID images (arXiv 2303.05828)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def perturb(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    steps: int = 250,
    lr: float = 1e-3,
    smoothness: float = 5000.0,
    seed: int = 0,
) -> Tensor:
    """OOD images [B, 3, H, W] in 0..1 -> images of the same shape whose features are near the targets, in 0..1.

    encode: pixels in 0..1 -> features [B, D], differentiable; they need not be normalised.
    targets: [B, D], the features of an ID image for each image.
    steps, lr: of Adam, on `objective`. It starts at normal noise of deviation 1e-3, and pixels are clamped after each
        step; nothing else bounds the change.
    smoothness: the weight of the differences of neighbouring pixels' changes. The paper's 5000 is for 224 pixels; 0
        lets every pixel change alone.
    seed: of the noise, which is the same on every device.

    Float64 stays float64; other floats are computed, and returned, as float32. Gradients and requires_grad of the
    model's parameters stay as they are. Raises ValueError for values out of range, and for shapes that do not fit.
    """
    _check(images, targets, steps, lr, smoothness, seed)
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.detach().to(torch.promote_types(images.dtype, torch.float32), copy=True)
        targets = targets.detach().to(pixels, copy=True)
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=pixels.dtype)
        delta = (1e-3 * noise).to(pixels.device).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=lr)
        for _ in range(steps):
            (delta.grad,) = torch.autograd.grad(objective(encode, pixels, delta, targets, smoothness), delta)
            optimizer.step()
            with torch.no_grad():
                delta.copy_((pixels + delta).clamp(0, 1) - pixels)
    perturbed = (pixels + delta).detach().clamp(0, 1)  # the sum may round to a number above 1
    if not perturbed.isfinite().all():
        raise ValueError("perturb: the gradient is not finite: encode returns NaN or infinity, or lr is too large")
    return perturbed


def objective(
    encode: Callable[[Tensor], Tensor], images: Tensor, delta: Tensor, targets: Tensor, smoothness: float
) -> Tensor:
    """What `perturb` minimises: -mean cosine of images + delta to the targets, plus smoothness * `roughness`.

    Raises ValueError for features of another shape than the targets.
    """
    features = encode(images + delta)
    if features.shape != targets.shape:
        shapes = f"{list(features.shape)}, and the targets {list(targets.shape)}"
        raise ValueError(f"perturb: encode returns {shapes}: expected one target for each image, of the same length")
    return smoothness * roughness(delta) - F.cosine_similarity(features, targets.to(features.dtype)).mean()


def roughness(delta: Tensor) -> Tensor:
    """The mean square of the vertical differences of [B, C, H, W], plus that of the horizontal ones.

    A difference is that to the next row or column. The last ones have none: they count as 0, and count in the means.
    """
    return (delta.diff(dim=2).square().sum() + delta.diff(dim=3).square().sum()) / delta.numel()


def _check(images: Tensor, targets: Tensor, steps: int, lr: float, smoothness: float, seed: int) -> None:
    shape = list(images.shape)
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"perturb: images of shape {shape}: expected [B, 3, H, W]")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):  # false for NaN
        raise ValueError(f"perturb: images of {images.dtype}: expected floats, all of them in 0..1")
    if targets.ndim != 2 or len(targets) != len(images):
        expected = f"[{len(images)}, D], one for each image"
        raise ValueError(f"perturb: targets of shape {list(targets.shape)}: expected {expected}")
    if not targets.is_floating_point() or not targets.isfinite().all():
        raise ValueError(f"perturb: targets of {targets.dtype}: expected floats without NaN and infinity")
    for name, value, least in (("steps", steps, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"perturb: {name}={value!r}: expected an integer, {least} or more")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"perturb: lr={lr!r}: expected a positive number")
    if not (math.isfinite(smoothness) and smoothness >= 0):
        raise ValueError(f"perturb: smoothness={smoothness!r}: expected 0 or more")
