"""DeepCluster v2."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.methods.families import MemoryCodes
from mmssl.methods.method import Above0, AtLeast1, AtLeast2
from mmssl.model.encoder import Encoder
from mmssl.parts.kmeans import Clusters, draw_rows, spherical_kmeans


class DeepClusterV2(MemoryCodes):
    """Caron et al. 2020, arXiv:2006.09882, Appendix C: codes are those of spherical k-means."""

    paper, coverage = "arXiv:2006.09882", (12,)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 2048,
        dim: AtLeast1 = 128,
        prototypes: AtLeast2 = 3000,
        heads: AtLeast1 = 3,
        temperature: Above0 = 0.1,
        iterations: AtLeast1 = 10,
    ):
        super().__init__(encoder, hidden, dim, prototypes, heads, temperature)
        self.iterations = iterations

    def assign(self, rows: Tensor, directions: Tensor, draw: torch.Generator) -> Clusters:
        """From random rows."""
        return spherical_kmeans(rows, draw_rows(rows, len(directions), draw), self.iterations)
