"""Label-free signs of collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.losses.prediction import at_least_fp32


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Exponential of the entropy of the normalised singular values, 1..min(N, D).

    Args:
        features: (N, D), not centred.
    Source: arXiv:2210.02885, Eq. 1-2.
    """
    values = torch.linalg.svdvals(at_least_fp32(features))
    share = values / values.sum().clamp(min=eps) + eps
    return float((-(share * share.log()).sum()).exp())


@torch.no_grad()
def alpha_req(features: Tensor, eps: float = 1e-6) -> float:
    """How fast the eigenvalues of the covariance fall: the exponent of index**-alpha that fits them best; near 1 is good.

    Args:
        features: (N, D), at least three samples that span two dimensions.
        eps: eigenvalues below this share of the largest are rounding errors, and left out.
    Returns: minus the least-squares slope of log eigenvalue against log index; NaN if fewer than two are left.
    Source: alpha-ReQ, Agrawal et al., NeurIPS 2022.
    """
    x = at_least_fp32(features)
    eigenvalues = torch.linalg.svdvals(x - x.mean(0)).square()  # times N - 1, which moves the line but not its slope
    kept = eigenvalues[eigenvalues > eps * eigenvalues[0]].log()
    index = torch.arange(1, len(kept) + 1, device=kept.device).to(kept).log()
    index, kept = index - index.mean(), kept - kept.mean()
    return float(-(index * kept).sum() / index.square().sum())


@torch.no_grad()
def dimension_std(features: Tensor) -> float:
    """Standard deviation of each dimension over samples, averaged. features: (N, D)."""
    return float(features.float().std(0).mean())
