"""A slot for each sample of the data set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.parts.part import Staged, finite_rows
from mmssl.parts.queue import keyed_rows


class Memory(Staged):
    """The latest row of length 1 of every sample, equal on all ranks.

    What is written in the forward takes effect after the update, if it is applied. Rows that are not finite are not written.
    Slots start with Gaussian rows of length 1.

    Args:
        samples: of the data set.  dim: of a row.
        momentum: of the old row in the new one, which is then normalised again; 0 replaces it.
        seed: of the rows at the start.
    Raises: ValueError if momentum is not in [0, 1).
    Source: arXiv:1805.01978, section 3.2 (momentum 0.5); arXiv:2006.09882, DeepCluster v2 in the authors' code.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, samples: int, dim: int, momentum: float = 0.0, seed: int = 0):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"memory_momentum: {momentum}, must be at least 0 and below 1")
        self.momentum = momentum
        self.register_buffer("rows", keyed_rows(samples, dim, "memory", seed))
        self.register_buffer("seen", torch.zeros(samples, dtype=torch.bool))  # whether a slot was ever written

    def read(self, index: Tensor) -> Tensor:
        """(n,) int64 -> (n, D)."""
        return self.rows[index]

    def write(self, index: Tensor, rows: Tensor) -> None:
        """After the update.

        Args:
            index: (B,) int64 positions in the data set.  rows: (B, D), no gradient; normalised here.
        """
        self.stage(index, F.normalize(rows.to(self.rows.dtype), dim=1))

    def commit(self, *rows: Tensor) -> None:
        """Replace or average."""
        index, new = rows
        # A stand-in for an unreadable sample can meet itself in a batch: then the first counts, and every rank writes the same.
        place = torch.arange(len(index), device=index.device)
        new = new[torch.where(index[:, None] == index, place, len(index)).amin(1)]
        old = self.rows[index]
        self.seen[index] |= new.isfinite().all(1)
        self.rows[index] = finite_rows(F.normalize(torch.lerp(new, old, self.momentum), dim=1) if self.momentum else new, old)
