"""SeLa v2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.distributed import all_max, all_sum, gather_rows, rank, world
from mmssl.methods.families import MemoryCodes
from mmssl.methods.method import Above0, AtLeast1, AtLeast2
from mmssl.model.encoder import Encoder
from mmssl.parts.kmeans import Clusters, draw_rows

BLOCK = 4096  # samples whose scores are held at a time


class SeLaV2(MemoryCodes):
    """Asano et al. 2019, arXiv:1911.05371, as DeepCluster v2 is built (arXiv:2006.09882): codes of equal size, by Sinkhorn.

    No code of the authors exists. Here random rows of the memory score all samples, Sinkhorn balances the scores over the
    data set, and each direction becomes the mean of the samples by their codes, as often as `iterations` says.
    """

    paper, coverage = "arXiv:1911.05371", (13,)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 2048,
        dim: AtLeast1 = 128,
        prototypes: AtLeast2 = 3000,
        heads: AtLeast1 = 3,
        temperature: Above0 = 0.1,
        eps: Above0 = 0.05,
        balancing: AtLeast1 = 10,
        iterations: AtLeast1 = 3,
    ):
        super().__init__(encoder, hidden, dim, prototypes, heads, temperature)
        self.eps, self.balancing, self.iterations = eps, balancing, iterations

    def assign(self, rows: Tensor, directions: Tensor, draw: torch.Generator) -> Clusters:
        """Directions that are means of balanced codes, and the most likely code of each sample."""
        directions = draw_rows(rows, len(directions), draw)
        for _ in range(self.iterations):
            directions, _ = balanced_means(rows, directions, self.eps, self.balancing)
        return Clusters(directions, balanced_means(rows, directions, self.eps, self.balancing)[1])


def balanced_means(rows: Tensor, directions: Tensor, eps: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Sinkhorn over a whole data set, in blocks of each rank's share: nothing of N x K is held.

    Args:
        rows: (N, D) of length 1, the same on all ranks.  directions: (K, D) of length 1.
        eps, iterations: as in `losses.sinkhorn`, whose codes these are.
    Returns: (K, D) means of the rows by their codes, of length 1; (N,) int64 the largest code of each row.
    """
    share = -(-len(rows) // world())
    order = torch.arange(rank(), share * world(), world(), device=rows.device)
    own = rows[order.clamp(max=len(rows) - 1)]
    column = rows.new_zeros(share).masked_fill(order >= len(rows), -torch.inf)  # a repeated row weighs nothing
    blocks = [slice(start, start + BLOCK) for start in range(0, share, BLOCK)]
    balance = rows.new_zeros(len(directions))

    def scores(block: slice) -> Tensor:
        return own[block] @ directions.T / eps

    for _ in range(iterations):
        mass = torch.stack([(scores(b) + column[b, None]).logsumexp(0) for b in blocks]).logsumexp(0)
        peak = all_max(mass)
        balance = -(peak + all_sum((mass - peak).exp()).log())
        for b in blocks:
            column[b] = torch.where(column[b] == -torch.inf, column[b], -(scores(b) + balance).logsumexp(1))
    sums = torch.zeros_like(directions, dtype=torch.float64)
    for b in blocks:
        codes = (scores(b) + balance + column[b, None]).exp()
        sums += (codes.T @ own[b]).double()
    ids = torch.cat([(scores(b) + balance).argmax(1) for b in blocks])
    return F.normalize(all_sum(sums), dim=1).to(rows.dtype), gather_rows(ids)[: len(rows)]
