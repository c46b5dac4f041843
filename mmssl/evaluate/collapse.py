"""Label-free signs of collapse: what a set of embeddings shows by itself. All are (N, D) of all ranks together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.losses.numerics import at_least_fp32, unit_rows


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
    return float(at_least_fp32(features).std(0).mean())


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of centred features, 1..min(N - 1, D); 0 if all are alike.

    Args:
        features: (N, D).
    Source: Roy and Vetterli, EUSIPCO 2007; centred here, so that a common offset is no direction.
    """
    x = at_least_fp32(features)
    values = torch.linalg.svdvals(x - x.mean(0))
    if not values[0] > torch.finfo(x.dtype).eps * at_least_fp32(features).abs().max() * len(x):
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


@torch.no_grad()
def lidar(features: Tensor, delta: float = 1e-4) -> float:
    """Effective rank of how samples differ, measured by how much views of one sample do; 1..min(n - 1, D).

    Args:
        features: (n, q, D), q >= 2 views of each of n samples.
        delta: added to the variances within samples.
    Returns: exponential of the entropy of the normalised eigenvalues of W^-1/2 B W^-1/2, where B is the covariance of the means
        of samples and W the mean covariance of the views of one, plus delta.
    Raises: ValueError if there are fewer than two samples or views.
    Source: arXiv:2312.04000.
    """
    x = at_least_fp32(features)
    samples, views, dim = x.shape
    if samples < 2 or views < 2:
        raise ValueError(f"lidar: {samples} samples of {views} views, at least 2 of 2 are needed")
    means = x.mean(1)
    between = torch.cov(means.T).reshape(dim, dim)
    apart = (x - means[:, None]).flatten(0, 1)
    within = apart.T @ apart / (samples * (views - 1)) + delta * torch.eye(dim, dtype=x.dtype, device=x.device)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.sqrt()  # W^-1/2 up to a rotation, which changes no eigenvalue
    found = torch.linalg.eigvalsh(whiten.T @ between @ whiten).clamp(min=0)
    return float(torch.special.entr(found / found.sum().clamp(min=torch.finfo(x.dtype).tiny)).sum().exp())


class Channels(NamedTuple):
    """How dimensions relate to each other, each 0..1."""

    correlation: float  # mean absolute correlation of two of them
    redundant: float  # share of pairs that correlate above 0.9
    dead: float  # share of those that hardly vary


@torch.no_grad()
def channels(features: Tensor, above: float = 0.9, below: float = 1e-3) -> Channels:
    """Whether dimensions say the same, or nothing.

    Args:
        features: (N, D).
        above: absolute correlation from which on two are redundant.
        below: share of the largest standard deviation under which a dimension is dead. Dead ones are left out of the pairs.
    """
    x = at_least_fp32(features)
    x = x - x.mean(0)
    std = x.square().mean(0).sqrt()
    alive = std > below * std.max()
    if not std.max() > torch.finfo(x.dtype).eps * at_least_fp32(features).abs().max():
        return Channels(0.0, 0.0, 1.0)
    unit = x[:, alive] / std[alive]
    count = int(alive.sum())
    pairs = (unit.T @ unit / len(x)).abs()[~torch.eye(count, dtype=torch.bool, device=x.device)]
    if not len(pairs):
        return Channels(0.0, 0.0, 1 - count / len(std))
    return Channels(float(pairs.mean()), float((pairs > above).to(x.dtype).mean()), 1 - count / len(std))


class Centre(NamedTuple):
    """Of rows of length 1: how long what they have in common is, and what is left of them."""

    common: float  # |mean|, near 1 if all are alike
    residual: float  # mean |row - mean|, near 1 if they are spread


@torch.no_grad()
def centre(features: Tensor) -> Centre:
    """Split each row, normalised here, into the common mean and the rest. features: (N, D). Source: arXiv:2203.16262."""
    rows = unit_rows(features)
    mean = rows.mean(0)
    return Centre(float(mean.norm()), float((rows - mean).norm(dim=1).mean()))
