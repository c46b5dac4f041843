"""Numbers that tell whether features still vary."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import all_sum, gather, sum_ranks, world
from mmssl.losses.numerics import above_zero, at_least_fp32, same_shape, unit_rows, without_autocast
from mmssl.losses.redundancy import off_diagonal
from mmssl.types import Mask


@torch.no_grad()
def token_std(tokens: Tensor, mask: Mask | None = None, group: ProcessGroup | None = None, pad: Tensor | None = None) -> Tensor:
    """Standard deviation of each channel over tokens, averaged over channels; 0.001 for a constant.

    Args:
        tokens: (R, L, D), or (B, L, D) under a mask with M*B rows, whose M masks of a sample are adjacent.
        mask: count masked tokens only.
        pad: (R, L) bool, True = padding, which is not counted.
    Returns: () mean over D of sqrt(var + 1e-6), unbiased, over the tokens of all ranks.
    Source: the variance guard of data2vec.
    """
    x = at_least_fp32(tokens)
    if mask is None:
        weight = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    else:  # a token counts once for each mask that hides it
        weight = mask.hidden.unflatten(0, (x.shape[0], -1)).sum(1).to(x.dtype)  # (R, L)
    if pad is not None:
        weight, x = weight.masked_fill(pad, 0.0), x.masked_fill(pad[..., None], 0.0)
    x, weight = x.flatten(0, 1), weight.flatten()
    weighted = weight[:, None] * x  # no matrix product: autocast would round its sums to bf16
    sums = all_sum(torch.cat([weight.sum()[None], weighted.sum(0), (weighted * x).sum(0)]).double(), group)
    count, first, second = sums[0], *sums[1:].chunk(2)
    variance = (second - first.square() / count).clamp(min=0) / (count - 1).clamp(min=1)
    return (variance + 1e-6).sqrt().mean().to(x.dtype)


@torch.no_grad()
def unit_std(z: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """How much rows of length 1 vary: 1 if they point everywhere alike, 0 if all point the same way.

    Args:
        z: (B, D), normalised here.
    Returns: () mean over dimensions of the standard deviation over the rows of all ranks, times sqrt(D).
    Source: arXiv:2011.10566, section 4.1.
    """
    rows = unit_rows(z)
    first, second = all_sum(torch.stack((rows.sum(0), rows.square().sum(0))).double(), group) / (len(z) * world(group))
    return ((second - first.square()).clamp(min=0).sqrt().mean() * z.shape[1] ** 0.5).to(rows.dtype)


@torch.no_grad()
@without_autocast
def dimensions(z: Tensor) -> Tensor:
    """In how many directions rows of length 1 vary: 1 if they lie on a line, at most the smaller of B - 1 and D.

    Args:
        z: (B, D) of this rank, normalised here.
    Returns: () participation ratio of the eigenvalues of their covariance, (sum)^2 / sum of squares; 0 if they do not vary.
    """
    return participation(unit_rows(z))


@torch.no_grad()
@without_autocast
def participation(rows: Tensor) -> Tensor:
    """() participation ratio of the eigenvalues of the covariance of (B, D) rows, as `dimensions`, whatever their length."""
    rows = rows - rows.mean(0)
    small = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows  # the same eigenvalues but zeros
    total, squares = small.diagonal().sum().square(), small.square().sum()
    return total / squares.clamp(min=torch.finfo(rows.dtype).tiny)


class AssignmentEntropy(NamedTuple):
    """In nats, at most log K."""

    of_mean: Tensor  # () near log K if all prototypes are used alike, 0 if one is
    mean: Tensor  # () near 0 if each sample has one prototype, log K if it has all alike


@torch.no_grad()
def assignment_entropy(probabilities: Tensor, group: ProcessGroup | None = None) -> AssignmentEntropy:
    """Entropy of the mean assignment, and mean entropy of assignments, over the samples of all ranks.

    Args:
        probabilities: (B, K), rows sum to 1.
    """
    p = at_least_fp32(probabilities)
    count = len(p) * world(group)
    mean = all_sum(p.sum(0), group) / count
    return AssignmentEntropy(torch.special.entr(mean).sum(), all_sum(torch.special.entr(p).sum(), group) / count)


def alignment(z1: Tensor, z2: Tensor, power: float = 2.0, group: ProcessGroup | None = None) -> Tensor:
    """Mean distance, to a power, between views of a sample; 0 if they agree. With gradient.

    Args:
        z1, z2: (B, D); row i of both is the same sample. Normalised here.
    Returns: () mean over the samples of all ranks.
    Raises: ValueError if the shapes differ.
    Source: arXiv:2005.10242.
    """
    same_shape(z1=z1, z2=z2)
    squares = (unit_rows(z1) - unit_rows(z2)).square().sum(1)
    return sum_ranks((squares if power == 2 else squares ** (power / 2)).mean(), group) / world(group)


@without_autocast
def uniformity(z: Tensor, t: float = 2.0, group: ProcessGroup | None = None) -> Tensor:
    """Log of the mean Gaussian potential of pairs of samples; 0 if all are alike, lower the more they spread. With gradient.

    Args:
        z: (B, D), normalised here.
        t: factor of the squared distances, above 0.
    Returns: () over all pairs of different samples of all ranks.
    Raises: ValueError if there is one sample only.
    Source: arXiv:2005.10242.
    """
    above_zero(t=t)
    rows = gather(unit_rows(z), group)
    if len(rows) < 2:
        raise ValueError("train.global_batch: 1, uniformity needs at least 2 samples")
    return log_potential(rows, t)


def log_potential(rows: Tensor, t: float) -> Tensor:
    """() log of the mean of exp(-t |a - b|^2) over pairs of different rows. rows: (N, D) of length 1, N >= 2."""
    pairs = off_diagonal(2 * t * (rows @ rows.T - 1))
    return pairs.flatten().logsumexp(0) - math.log(pairs.numel())
