"""Weighted reconstruction, latents with a prior, and a critic of what was made up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmssl.losses.masking import difference
from mmssl.losses.numerics import at_least_fp32, same_shape


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error with a weight for each value, the loss of denoising autoencoders and context encoders.

    Args:
        prediction: (M*B, ...), the M rows of a sample adjacent.
        target: (B, ...), shared by a sample's M rows; held constant.
        weight: at least 0, of the shape of `prediction` or one that expands to it.
    Returns: () sum of weighted squares over the number of this rank's values whose weight is not 0; 0 if there are none.
    Raises: ValueError if the shapes do not fit.
    Source: Vincent et al. 2010, JMLR 11, section 5.1; arXiv:1604.07379, Eq. 1.
    """
    square = difference(prediction, target).square()
    weight = weight.to(square.dtype).expand_as(square)
    return (weight * square).sum() / (weight > 0).sum().clamp(min=1)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence of independent normal distributions from standard ones.

    Args:
        mean, log_variance: (B, D).
    Returns: () summed over D, mean over this rank's samples, in nats.
    Raises: ValueError if the shapes differ.
    Source: arXiv:1312.6114, Appendix B.
    """
    same_shape(mean=mean, log_variance=log_variance)
    mean, log_variance = at_least_fp32(mean), at_least_fp32(log_variance)
    return (mean.square() + log_variance.expm1() - log_variance).sum(1).mean() / 2


def critic(real: Tensor, fake: Tensor) -> Tensor:
    """Cross entropy of telling real from made-up images, which a critic lowers and who makes them raises.

    Args:
        real, fake: (B,) logits, high for what the critic takes for real.
    Returns: () sum of the means over this rank's images of both kinds, in nats; 2 log 2 for a critic without an opinion.
    Source: arXiv:1406.2661, Eq. 1.
    """
    return F.softplus(-at_least_fp32(real)).mean() + F.softplus(at_least_fp32(fake)).mean()
