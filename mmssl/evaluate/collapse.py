"""Label-free signs of collapse."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Exponential of the entropy of the normalised singular values, 1..min(N, D).

    Args:
        features: (N, D), not centred.
    Source: arXiv:2210.02885, Eq. 1-2.
    """
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp(min=eps) + eps
    return float((-(share * share.log()).sum()).exp())


@torch.no_grad()
def dimension_std(features: Tensor) -> float:
    """Standard deviation of each dimension over samples, averaged. features: (N, D)."""
    return float(features.float().std(0).mean())
