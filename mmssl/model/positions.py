"""Positions, and the choice of visible tokens that goes with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.types import Mask


def take(tokens: Tensor, mask: Mask | None) -> Tensor:
    """The visible tokens under each mask.

    Args:
        tokens: (B, L, D), one row a sample; not repeated for its M masks.
        mask: rows (M*B, L), or None for all tokens.
    Returns: (M*B, L_visible, D).
    """
    if mask is None:
        return tokens
    samples, length, dim = tokens.shape
    rows, kept = mask.keep.shape
    first = torch.arange(samples, device=tokens.device).mul_(length).repeat_interleave(rows // samples)  # (M*B,)
    return tokens.reshape(samples * length, dim).index_select(0, (mask.keep + first[:, None]).flatten()).view(rows, kept, dim)


def restore(visible: Tensor, fillers: Tensor, mask: Mask) -> Tensor:
    """Visible tokens back in place, fillers where the mask hid.

    Args:
        visible: (R, L_visible, D).  fillers: (R, L - L_visible, D).  mask: rows (R, L).
    Returns: (R, L, D).
    """
    both = torch.cat([visible, fillers], dim=1)
    rows, length, dim = both.shape
    first = torch.arange(rows, device=both.device).mul_(length)
    return both.reshape(rows * length, dim).index_select(0, (mask.restore + first[:, None]).flatten()).view(rows, length, dim)


class SinCos2d(nn.Module):
    """Fixed sine-cosine positions of a grid.

    The first half of the channels encodes the column, the second the row; each half holds the sines, then the cosines,
    of position * 10000^(-i / (D/4)).
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        if dim % 4:
            raise ValueError(f"hidden_size: {dim} is not a multiple of 4, which sine-cosine positions need")
        rows, columns = grid
        frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

        def code(position: Tensor) -> Tensor:  # (L,) -> (L, D/2)
            angle = position.to(torch.float64)[:, None] * frequency
            return torch.cat([angle.sin(), angle.cos()], dim=1)

        column, row = torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)
        self.table: Tensor
        self.register_buffer("table", torch.cat([code(column), code(row)], dim=1)[None].float())

    def forward(self, tokens: Tensor, mask: Mask | None = None) -> Tensor:
        """Add positions, then keep what is visible. (B, L, D) -> (M*B, L_visible, D)."""
        return take(tokens + self.table.to(tokens.dtype), mask)
