"""SeLa v2."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import losses
from mmssl.distributed import all_sum, gather_rows, rank, world
from mmssl.methods.families import MemoryCodes
from mmssl.model.encoder import Encoder
from mmssl.parts.kmeans import Clusters, draw_rows


class SeLaV2(MemoryCodes):
    """Asano et al. 2019, arXiv:1911.05371, as DeepCluster v2 is built (arXiv:2006.09882): codes of equal size, by Sinkhorn.

    No code of the authors exists. Here the directions of the pass before (random rows before the first) score all samples,
    Sinkhorn balances the scores over the data set, and each direction becomes the mean of the samples that it got, as often
    as `iterations` says.
    """

    paper, coverage = "arXiv:1911.05371", (13,)

    def __init__(
        self,
        encoder: Encoder,
        hidden: int = 2048,
        dim: int = 128,
        prototypes: int = 3000,
        heads: int = 3,
        temperature: float = 0.1,
        eps: float = 0.05,
        balancing: int = 10,
        iterations: int = 3,
    ):
        super().__init__(encoder, hidden, dim, prototypes, heads, temperature)
        self.eps, self.balancing, self.iterations = eps, balancing, iterations

    def assign(self, rows: Tensor, directions: Tensor, draw: torch.Generator) -> Clusters:
        """Each rank scores every world-th sample."""
        directions = draw_rows(rows, len(directions), draw)
        for _ in range(self.iterations):
            codes, own = self._balanced(rows, directions)
            sums = all_sum(codes.double().T @ own.double())
            directions = torch.nn.functional.normalize(sums, dim=1).to(rows.dtype)
        codes, _ = self._balanced(rows, directions)
        return Clusters(directions, gather_rows(codes.argmax(1))[: len(rows)])

    def _balanced(self, rows: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of this rank's share, and the share; ranks with one row fewer repeat the last."""
        order = torch.arange(rank(), -(-len(rows) // world()) * world(), world(), device=rows.device).clamp(max=len(rows) - 1)
        own = rows[order]
        return losses.sinkhorn(own @ directions.T, self.eps, self.balancing), own
