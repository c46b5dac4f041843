"""Redundancy reduction: views agree while dimensions vary and say different things."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import gather, sum_ranks, world
from mmssl.losses.numerics import at_least_fp32, same_shape, without_autocast


def off_diagonal(square: Tensor) -> Tensor:
    """(D, D) -> (D - 1, D): all entries but the diagonal ones, without a copy."""
    return square.flatten()[1:].view(len(square) - 1, -1)[:, :-1]


def squares_beside_diagonal(first: Tensor, second: Tensor) -> Tensor:
    """() sum of the squares of all entries of first.T @ second but the diagonal ones. first, second: (N, D).

    By the smaller of two products, as |A^T B|^2 = <A A^T, B B^T>. Where there are fewer samples than dimensions the squares
    beside the diagonal are no small difference of large numbers, since a matrix of rank N cannot keep to it.
    """
    if len(first) >= first.shape[1]:
        return off_diagonal(first.T @ second).square().sum()
    gram = first @ first.T
    other = gram if second is first else second @ second.T
    return (gram * other).sum() - (first * second).sum(0).square().sum()


@without_autocast
def barlow_twins(z1: Tensor, z2: Tensor, lambd: float = 0.0051, eps: float = 1e-5, group: ProcessGroup | None = None) -> Tensor:
    """Squared distance of the correlation matrix between two views from the identity.

    Args:
        z1, z2: (B, D) projections; row i of both is the same sample. Standardised here over the batch of all ranks.
        lambd: weight of the squares beside the diagonal.
        eps: added to the biased variances.
    Returns: () whole loss on every rank; D if all samples are alike.
    Raises: ValueError if the shapes differ.
    Source: arXiv:2103.03230, Eq. 1-2, statistics as in the authors' code. Departs from that code: its all-reduce is not seen by
        autograd, so on W ranks its gradient is 1/W of this one, for which its learning rates of biases and norms were tuned.
    """
    same_shape(z1=z1, z2=z2)
    count = len(z1) * world(group)
    both = at_least_fp32(torch.cat((z1, z2), 1))  # (B, 2D)
    centred = both - sum_ranks(both.sum(0), group) / count
    variance = sum_ranks(centred.square().sum(0), group) / count
    standard = centred * (variance + eps).rsqrt()
    first, second = standard.chunk(2, 1)
    agreement = sum_ranks((first * second).sum(0), group) / count  # (D,)
    if count * world(group) < first.shape[1]:  # rows of all ranks take less than the matrix, to send and to multiply
        beside = squares_beside_diagonal(*gather(standard, group).chunk(2, 1)) / count**2
    else:
        beside = off_diagonal(sum_ranks(first.T @ second, group) / count).square().sum()
    return (agreement - 1).square().sum() + lambd * beside


class VICReg(NamedTuple):
    """Terms without their weights, which are 25, 25 and 1 in the paper; (), of the batch of all ranks except for the first."""

    invariance: Tensor  # mean squared difference of the views, over this rank's rows
    variance: Tensor  # how far standard deviations fall short of 1
    covariance: Tensor  # squared covariances of dimensions


@without_autocast
def vicreg(z1: Tensor, z2: Tensor, eps: float = 1e-4, group: ProcessGroup | None = None) -> VICReg:
    """Views agree, each dimension varies, and no two of them vary together.

    Args:
        z1, z2: (B, D) projections; row i of both is the same sample.
        eps: added to the unbiased variances before the root, which bounds its gradient.
    Returns: the three terms: (0, 1 - sqrt(eps), 0) if all samples are alike.
    Raises: ValueError if the shapes differ, or if there is one sample only.
    Source: arXiv:2105.04906, Eq. 1-6; as in the authors' code the invariance is also a mean over dimensions, the variance the
        mean of both views', the covariance their sum.
    """
    same_shape(z1=z1, z2=z2)
    count, dim = len(z1) * world(group), z1.shape[1]
    if count < 2:
        raise ValueError("train.global_batch: 1, a variance over the batch needs at least 2 samples")
    both = at_least_fp32(torch.stack((z1, z2), 1))  # (B, 2, D)
    everyone = gather(both, group)
    centred = everyone - everyone.mean(0)
    deviation = (centred.square().sum(0) / (count - 1) + eps).sqrt()  # (2, D)
    beside = torch.stack([squares_beside_diagonal(view, view) for view in centred.unbind(1)])
    return VICReg(
        invariance=(both[:, 0] - both[:, 1]).square().mean(),
        variance=(1 - deviation).relu().mean(),
        covariance=beside.sum() / (count - 1) ** 2 / dim,
    )
