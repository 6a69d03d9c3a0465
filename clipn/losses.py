"""CLIPN's two losses (CLIPN, ICCV 2023, section 3.3), in float32 and numerically stable for any margin."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def itbo_loss(
    image: Tensor,
    yes: Tensor,
    no: Tensor,
    logit_scale: Tensor | float,
    first: int = 0,
    block: int = 2**22,
    bias: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Image-text binary-opposite loss (ITBO): returns its matched and its unmatched term, two scalars.

    With d[i, j] = s (f_i . n_j - f_i . g_j) + b, the terms are the means over the texts j of softplus(d[j, j]) and of
    softplus(-d[i, j]) over the other B - 1 images i. If each rank has equally many texts, the mean of the terms over
    ranks is that of the joined batch, so ranks exchange only `image`.

    image: f [B, D], the whole batch. yes, no: g and n [b, D], the texts of the images first .. first + b - 1 (b = B in
        a single process). All are L2-normalised.
    logit_scale: the temperature s, not its log.
    block: the largest number of margins in memory; a larger matrix is computed in blocks, and again in the backward
        pass.
    bias: b, which the paper does not have.

    Raises ValueError for fewer than two images.
    """
    if len(image) < 2:
        raise ValueError(f"itbo_loss: a batch of {len(image)} pair has no unmatched texts; at least 2 are needed")
    with torch.autocast(image.device.type, enabled=False):
        image, difference = image.float(), no.float() - yes.float()
        texts = len(difference)
        own = (image[first : first + texts] * difference).sum(dim=1)
        matched = F.softplus(logit_scale * own + bias).mean()
        width = max(1, block // len(image))
        recompute = width < texts and torch.is_grad_enabled()
        unmatched = difference.new_zeros(())
        for start in range(0, texts, width):
            part = (image, difference[start : start + width], logit_scale, bias, first + start)
            unmatched = unmatched + (
                checkpoint(_unmatched_sum, *part, use_reentrant=False) if recompute else _unmatched_sum(*part)
            )
        return matched, unmatched / (texts * (len(image) - 1))


def _unmatched_sum(
    image: Tensor, difference: Tensor, logit_scale: Tensor | float, bias: Tensor | float, first: int
) -> Tensor:
    """The sum of softplus(-d[i, j]) over texts j and all images i but each text's own, first + j."""
    negative = (-(logit_scale * image) @ difference.T).sub_(bias)  # -d: [B, b]
    columns = torch.arange(len(difference), device=image.device)
    negative.detach()[columns + first, columns] = -torch.inf  # softplus and its gradient are 0 there
    return F.softplus(negative).sum()


def tso_loss(yes: Tensor, no: Tensor, kind: str = "l2") -> Tensor:
    """Text semantic-opposite loss (TSO): a scalar, the smaller the farther a text's yes and no features are apart.

    yes, no: g and n [b, D], L2-normalised. kind: "l2" is mean(2 - sqrt(||g - n||^2 + 1e-4)), "cosine" is
    mean(1 + g . n). Raises ValueError for another kind.
    """
    with torch.autocast(yes.device.type, enabled=False):
        yes, no = yes.float(), no.float()
        if kind == "l2":
            # ||g - n||^2 equals 2 - 2 g.n, which would lose its digits where training starts, at n = g.
            return (2 - ((yes - no).square().sum(dim=-1) + 1e-4).sqrt()).mean()
        if kind == "cosine":
            return (1 + (yes * no).sum(dim=-1)).mean()
    raise ValueError(f"tso_loss: kind={kind!r}: expected 'l2' or 'cosine'")
