"""Clusters of a whole data set, on the device, the work shared by all ranks.

Every rank has all rows, takes each world-th of them, and gets the same result. A block of rows is compared with all centroids
at a time, so that memory does not grow with rows times clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.distributed import all_sum, gather_rows, rank, world

BLOCK = 1 << 22  # similarities held at once


class Clusters(NamedTuple):
    """What k-means found."""

    centroids: Tensor  # (K, D)
    assignment: Tensor  # (N,) int64


def draw_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, D) different rows to start from. Raises: ValueError if there are fewer."""
    if not 0 < count <= len(rows):
        raise ValueError(f"clusters: {count}, must be at least 1 and at most the {len(rows)} samples")
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]


@torch.no_grad()
def spherical_kmeans(rows: Tensor, start: Tensor, iterations: int = 10) -> Clusters:
    """Centroids of length 1 that are nearest by dot product. An empty cluster keeps its centroid; ties go to the first.

    Args:
        rows: (N, D) of length 1, the same on all ranks.  start: (K, D) of length 1.
    Returns: after a last assignment.
    Source: arXiv:2006.09882, DeepCluster v2 in the authors' code.
    """
    centroids = start
    for _ in range(iterations):
        sums, sizes = _sums(rows, centroids, centroids.new_zeros(len(centroids)))
        mean = F.normalize(sums / sizes.clamp(min=1), dim=1)
        centroids = torch.where(sizes > 0, mean, centroids).to(rows.dtype)
    return Clusters(centroids, _assign(rows, centroids, centroids.new_zeros(len(centroids))))


@torch.no_grad()
def kmeans(rows: Tensor, start: Tensor, generator: torch.Generator, iterations: int = 20) -> Clusters:
    """Lloyd's algorithm with Euclidean distance; an empty cluster takes half of a large one.

    Args:
        rows: (N, D), the same on all ranks.  start: (K, D), K at most N.
        generator: on the CPU, seeded alike on all ranks; draws which clusters are split.
    Returns: after a last assignment, in which clusters may be empty again.
    Raises: ValueError if there are more clusters than rows.
    Source: arXiv:1807.05520, section 3.3; splitting as in faiss.
    """
    if len(start) > len(rows):
        raise ValueError(f"clusters: {len(start)}, must be at most the {len(rows)} samples")
    centroids = start
    for _ in range(iterations):
        sums, sizes = _sums(rows, centroids, _offset(centroids))
        means = (sums / sizes.clamp(min=1)).to(rows.dtype)
        centroids = split_empty(means, sizes.flatten(), generator)
    return Clusters(centroids, _assign(rows, centroids, _offset(centroids)))


def split_empty(centroids: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Give each empty cluster a slightly moved copy of a donor's centroid; the donor moves the other way.

    Even coordinates of the copy grow by 1/1024 and odd ones shrink. A donor of size n is drawn with a probability proportional
    to n - 1 and keeps half of its size for later draws.

    Args:
        centroids: (K, D).  sizes: (K,), 0 = empty.  generator: on the CPU.
    Returns: (K, D).
    Source: faiss, `Clustering.cpp`.
    """
    centroids, left = centroids.clone(), sizes.cpu().double()
    nudge = torch.full((centroids.shape[1],), 1 / 1024, dtype=centroids.dtype, device=centroids.device)
    nudge[1::2] *= -1
    for empty in (left == 0).nonzero().flatten().tolist():
        donor = int(torch.multinomial((left - 1).clamp(min=0), 1, generator=generator))
        centroids[empty] = centroids[donor] * (1 + nudge)
        centroids[donor] = centroids[donor] * (1 - nudge)
        left[empty] = left[donor] = left[donor] / 2
    return centroids


@torch.no_grad()
def pca_whiten(rows: Tensor, dim: int) -> Tensor:
    """The leading principal components, each with mean 0 and mean square 1.

    Args:
        rows: (N, D), the same on all ranks.
        dim: components kept at most.
    Returns: (N, up to dim), fewer if the rows vary in fewer directions. The largest entry of each direction is positive, so
        that ranks agree on signs.
    Raises: ValueError if the rows do not vary.
    Source: arXiv:1807.05520, section 3.3, which then makes rows of length 1.
    """
    centre = rows.mean(0, dtype=torch.float64)
    blocks = (block.double() - centre for block in _blocks(_own(rows), rows.shape[1]))
    covariance = all_sum(sum((block.T @ block for block in blocks), torch.zeros_like(centre).diag())) / len(rows)
    values, directions = torch.linalg.eigh(covariance)  # ascending
    kept = int((values > values[-1] * len(values) * torch.finfo(rows.dtype).eps).sum())
    if not kept:
        raise ValueError("pca: the features of all samples are alike; the encoder has collapsed")
    kept = min(kept, dim)
    values, directions = values[-kept:].flip(0), directions[:, -kept:].flip(1)
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign() * values.rsqrt()
    return torch.cat([((block.double() - centre) @ directions).to(rows.dtype) for block in _blocks(rows, rows.shape[1])])


def uniform_order(assignment: Tensor, generator: torch.Generator) -> Tensor:
    """Samples of an epoch in which all clusters that hold some are drawn equally often.

    Of C such clusters each is drawn from floor(N / C) + 1 times, with repetition if it holds no more; all draws are shuffled
    and cut to N.

    Args:
        assignment: (N,) int64 cluster of each sample.  generator: on the CPU.
    Returns: (N,) int64 positions in the data set, on the CPU.
    Source: arXiv:1807.05520, section 3.4, as in the authors' code.
    """
    order = assignment.cpu().argsort(stable=True)
    clusters = order.split(assignment.cpu().unique(return_counts=True)[1].tolist())
    each = len(assignment) // len(clusters) + 1
    draws = []
    for members in clusters:
        size = len(members)
        again = size <= each
        chosen = (
            torch.randint(size, (each,), generator=generator) if again else torch.randperm(size, generator=generator)[:each]
        )
        draws.append(members[chosen])
    drawn = torch.cat(draws)
    return drawn[torch.randperm(len(drawn), generator=generator)[: len(assignment)]]


def _own(rows: Tensor) -> Tensor:
    return rows[rank() :: world()]


def _blocks(rows: Tensor, columns: int) -> Iterator[Tensor]:
    yield from rows.split(max(1, BLOCK // columns))


def _offset(centroids: Tensor) -> Tensor:
    """(K,) what makes the largest dot product the least distance."""
    return -centroids.square().sum(1) / 2


def _nearest(block: Tensor, centroids: Tensor, offset: Tensor) -> Tensor:
    return torch.addmm(offset, block, centroids.T).argmax(1)


def _sums(rows: Tensor, centroids: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(K, D) sum of the rows of each cluster and (K, 1) their number, both float64."""
    total = torch.zeros(len(centroids), rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    for block in _blocks(_own(rows), len(centroids)):
        # A product with indicators adds in the same order each time; index_add_ does not on a GPU.
        chosen = torch.zeros(len(block), len(centroids), dtype=rows.dtype, device=rows.device)
        chosen.scatter_(1, _nearest(block, centroids, offset)[:, None], 1)
        total += chosen.T @ F.pad(block, (0, 1), value=1.0)
    total = all_sum(total)
    return total[:, :-1], total[:, -1:]


def _assign(rows: Tensor, centroids: Tensor, offset: Tensor) -> Tensor:
    """(N,) int64 on all ranks."""
    own = _own(rows)
    found = torch.cat([_nearest(block, centroids, offset) for block in _blocks(own, len(centroids))])
    share = -(-len(rows) // world())  # ranks with one row fewer fill up: gathered shares are equal
    return gather_rows(F.pad(found, (0, share - len(own))))[: len(rows)]
