"""From one kind of data to another, by cosine in the space that binds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096  # rows compared at a time


def nearest(z: Tensor, others: Tensor) -> Tensor:
    """(N,) int64: of each row of z, (N, F), the place of the nearest of the others, (M, F)."""
    directions = F.normalize(others, dim=1)
    return torch.cat([(F.normalize(rows, dim=1) @ directions.T).argmax(1) for rows in z.split(BLOCK)])


def recall(z: Tensor, others: Tensor, content: Tensor, theirs: Tensor) -> float:
    """Share of the rows whose nearest other side is theirs, or has the content of one that is (recall at 1).

    Args:
        z, others: (N, F), row i of both is one pair.
        content, theirs: (N,) int64, of either side, equal for equal content.
    """
    found = nearest(z, others)
    return float(((theirs[found] == theirs) | (content[found] == content)).float().mean())
