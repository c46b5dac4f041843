"""Clustering: views of a sample predict its cluster, or samples draw near the one they are nearest to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import all_max, all_sum, world
from mmssl.losses.distillation import predict_others
from mmssl.losses.numerics import above_zero, at_least_fp32, without_autocast


@torch.no_grad()
@without_autocast
def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 3, group: ProcessGroup | None = None) -> Tensor:
    """Codes: soft assignments that follow the scores while all prototypes get about the same share of the batch of all ranks.

    Each iteration gives all prototypes the same mass, then all samples. A column's largest entry is made 1, then a row's, which
    moves no column's: both sums stay above 0 whatever the scores.

    Args:
        scores: (B, K) cosines of samples and prototypes, float32 or float64; each rank has other rows.
        eps: entropy weight, above 0: codes are one-hot near 0 and uniform far from it.
        iterations: at least 1.
    Returns: (B, K), no gradient; rows sum to 1, prototypes only nearly to N / K.
    Raises: ValueError in half precision, where scores / eps has too few digits.
    Source: arXiv:2006.09882, Eq. 3-5 and Appendix A.
    """
    above_zero(eps=eps)
    if iterations < 1:
        raise ValueError(f"iterations: {iterations}, must be at least 1")
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores: {scores.dtype}, too coarse to be divided by eps; pass scores.float(), made without autocast")
    scale = 1 / eps
    codes = torch.add(all_max(scores.amax(0), group) * -scale, scores, alpha=scale)
    lag = codes.amax(1)
    codes.sub_(lag[:, None]).exp_()
    samples, prototypes, least = lag.exp(), lag, torch.finfo(lag.dtype).tiny ** 0.8
    for _ in range(iterations):  # factors of rows and columns, so that the matrix is only read
        mass = all_sum(samples @ codes, group)
        prototypes = (mass.amin() / mass).clamp_(min=least)  # at most 1, or factors would grow with samples over prototypes
        samples = (codes @ prototypes).reciprocal()
    return codes.mul_(prototypes).mul_(samples[:, None])


def swav(scores: Sequence[Tensor], codes: Mapping[int, Tensor], temperature: float = 0.1) -> Tensor:
    """Cross entropy between the codes of some views and the predictions from each other view.

    Args:
        scores: per view (B, K) cosines of samples and prototypes.
        codes: view -> (B, K), from `sinkhorn`; held constant.
        temperature: above 0.
    Returns: () mean over pairs of a code and another view, and over this rank's samples, in nats; log K if all is uniform.
    Raises: ValueError if there is no such pair.
    Source: arXiv:2006.09882, Eq. 1-2 and 6.
    """
    above_zero(temperature=temperature)
    return predict_others(codes, scores, 1 / temperature)


def cluster_cross_entropy(scores: Tensor, ids: Tensor, temperature: float = 0.1, group: ProcessGroup | None = None) -> Tensor:
    """Cross entropy of a sample's cluster.

    Args:
        scores: (B, K) logits, or cosines of samples and centroids.
        ids: (B,) int64 clusters; samples with -100 do not count.
        temperature: above 0.
    Returns: () in nats, whose mean over ranks is the mean over all samples that count; 0 if there are none.
    Source: arXiv:1807.05520, Eq. 1; the temperature from DeepCluster v2, arXiv:2006.09882, appendix.
    """
    above_zero(temperature=temperature)
    total = F.cross_entropy(at_least_fp32(scores) / temperature, ids, ignore_index=-100, reduction="sum")
    return total * world(group) / all_sum((ids != -100).sum(), group).clamp(min=1)


def student_t(embeddings: Tensor, centres: Tensor, alpha: float = 1.0) -> Tensor:
    """Soft assignments to the centres of clusters, by the density of Student's t at the distance.

    Args:
        embeddings: (B, D).  centres: (K, D).
        alpha: degrees of freedom, above 0; the fewer, the more a distant centre still counts.
    Returns: (B, K), fp32 or higher; rows sum to 1.
    Source: arXiv:2103.12953, Eq. 3.
    """
    above_zero(alpha=alpha)
    apart = (at_least_fp32(embeddings)[:, None] - at_least_fp32(centres)).square().sum(-1)
    return (-(alpha + 1) / 2 * (apart / alpha).log1p()).softmax(-1)


@torch.no_grad()
def sharpened(assignments: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Targets of `self_training`: assignments squared, over the mass of each cluster in the batch of all ranks.

    Args:
        assignments: (B, K), rows sum to 1; each rank has other rows.
    Returns: (B, K), no gradient; rows sum to 1.
    Source: arXiv:2103.12953, Eq. 4.
    """
    assignments = at_least_fp32(assignments)
    mass = all_sum(assignments.sum(0), group)
    target = assignments.square() / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return target / target.sum(1, keepdim=True)


def self_training(assignments: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """How far assignments are from sharper ones of themselves, the clustering loss of SCCL.

    Args:
        assignments: (B, K) from `student_t`; each rank has other rows.
    Returns: () Kullback-Leibler divergence of `assignments` from `sharpened`, mean over this rank's samples, in nats.
    Source: arXiv:2103.12953, Eq. 5-6.
    """
    assignments = at_least_fp32(assignments)
    return F.kl_div(assignments.log(), sharpened(assignments, group), reduction="batchmean")
