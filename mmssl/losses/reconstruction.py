"""Reconstruction: what was hidden or altered, as it was."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal

from mmssl.losses.masking import difference, masked_mean, shared
from mmssl.losses.numerics import at_least_fp32, unit_rows
from mmssl.types import Mask


def patch_normalise(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """The values of each patch to mean 0 and unbiased variance 1; a constant patch becomes 0.

    Args:
        patches: (..., n), n at least 2.  eps: added to the variance.
    Returns: (..., n), fp32 or higher.
    Source: arXiv:2111.06377, section 3; unbiased as in the authors' code.
    """
    patches = at_least_fp32(patches)
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) * (variance + eps).rsqrt()


def masked_patch_mse(
    prediction: Tensor, target: Tensor, mask: Mask | Tensor | None, normalise: bool = False, eps: float = 1e-6
) -> Tensor:
    """Squared error of masked patches, the loss of MAE.

    Args:
        prediction: (M*B, L, n), the M rows of a sample adjacent; or of those patches only which `mask` is about.
        target: (B, L, n) values of each patch, shared by a sample's M rows; held constant.
        mask: rows (M*B, L), or bool of that shape, True = masked. All patches count if None, as in a denoising autoencoder.
        normalise: `target` by `patch_normalise` with `eps`.
    Returns: () mean over this rank's masked patches and their values, 0 if there are none. A zero prediction of normalised
        patches scores (n - 1) / n.
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2111.06377, section 3.
    """
    target = patch_normalise(target, eps) if normalise else target
    return masked_mean(difference(prediction, target).square().mean(-1), mask)


def masked_pixel_l1(prediction: Tensor, target: Tensor, mask: Mask | Tensor | None) -> Tensor:
    """Absolute error of masked patches, the loss of SimMIM. Arguments as in `masked_patch_mse`.

    Returns: () mean over this rank's masked patches and their values, 0 if there are none. The authors' code adds 1e-5 to the
        number of pixels instead.
    Source: arXiv:2111.09886, Eq. 1.
    """
    return masked_mean(difference(prediction, target).abs().mean(-1), mask)


def masked_l1(prediction: Tensor, target: Tensor, altered: Tensor) -> Tensor:
    """Absolute error of single values that were altered, the loss of TERA, GMML and SiT.

    Args:
        prediction: (M*B, ...), the M rows of a sample adjacent.
        target: (B, ...) what was there before, shared by a sample's M rows; held constant.
        altered: bool, True = counts, of the shape of `prediction` or one that expands to it.
    Returns: () mean over this rank's altered values, 0 if there are none.
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2007.06028; arXiv:2205.14986; arXiv:2104.03602.
    """
    error = difference(prediction, target).abs()
    return masked_mean(error, altered.expand_as(error))


def scaled_cosine(prediction: Tensor, target: Tensor, mask: Mask | Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """(1 - cos)^gamma, the loss of GraphMAE; with gamma 1 that of seq-JEPA.

    Args:
        prediction: (M*B, L, D), the M rows of a sample adjacent, or (B, D).
        target: (B, L, D) or (B, D), held constant. Both are normalised here.
        mask: tokens that count, rows (M*B, L), or bool, True = masked; all of them if None.
        gamma: at least 1; the higher, the less easy tokens count.
    Returns: () mean over this rank's masked tokens, in [0, 2^gamma]; 0 if there are none.
    Raises: ValueError if the shapes do not fit, or if gamma is below 1.
    Source: arXiv:2205.10803, section 3.2.
    """
    if not gamma >= 1:
        raise ValueError(f"gamma: {gamma}, must be at least 1")
    cosine = (unit_rows(prediction) * shared(unit_rows(target.detach()), prediction)).sum(-1)
    return masked_mean((1 - cosine).clamp(min=0) ** gamma, mask)  # rounding may leave 1 - cos below 0, which has no root


def gaussian_log_likelihood(mean: Tensor, target: Tensor, log_scale: Tensor | float = 0.0) -> Tensor:
    """Log density of an image under independent normal distributions, whose negative AASAE minimises.

    Args:
        mean: (B, ...) the decoder's output.  target: (B, ...), held constant.
        log_scale: twice the log of the standard deviation, to which 1e-6 is added; a number or () tensor.
    Returns: () summed over values, mean over this rank's samples, in nats.
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2107.12329; the scale as in the authors' code.
    """
    error = difference(mean, target)
    doubled = log_scale.to(error.dtype) if isinstance(log_scale, Tensor) else error.new_full((), log_scale)
    scale = (doubled / 2).exp() + 1e-6
    density = Normal(torch.zeros_like(scale), scale, validate_args=False).log_prob(error)  # checks would wait for the device
    return density.flatten(1).sum(1).mean()


def chamfer(prediction: Tensor, target: Tensor, squared: bool = True) -> Tensor:
    """How far two sets of points are from each other: each point looks for the nearest of the other set.

    Args:
        prediction: (..., n, d) points.  target: (..., m, d), held constant; as many sets.
        squared: distances squared and both ways added, Point-MAE's loss; else plain ones, both ways averaged.
    Returns: () mean over the points of each side and over the sets.
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2203.06604, section 3.3; without squares as in its authors' code.
    """
    if prediction.shape[:-2] != target.shape[:-2] or prediction.shape[-1] != target.shape[-1]:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} do not fit")
    prediction, target = at_least_fp32(prediction), at_least_fp32(target.detach())
    apart = (prediction.unsqueeze(-2) - target.unsqueeze(-3)).square().sum(-1)  # (..., n, m)
    nearest = apart.amin(-1), apart.amin(-2)
    if squared:
        return nearest[0].mean() + nearest[1].mean()
    tiny = torch.finfo(apart.dtype).tiny  # the root of 0 has no gradient
    return (nearest[0].clamp(min=tiny).sqrt().mean() + nearest[1].clamp(min=tiny).sqrt().mean()) / 2
