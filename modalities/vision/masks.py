"""Masks over a grid of patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_blocks(
    grid: tuple[int, int], copies: int, ratio: float, width: int, adjust: float, draw: torch.Generator, inverse: bool = True
) -> Tensor:
    """Block masks of data2vec 2.0: keep a few squares, hide the rest (or hide the squares, if not `inverse`).

    Squares of `width` patches around uniformly drawn centres (with replacement, clamped at the edge) are covered; then
    uniformly chosen cells are cleared or added until every row covers exactly floor(L * share) of them.

    Args:
        copies: masks to draw, M.
        ratio: share of patches to hide; `adjust` enlarges the drawn area to make up for overlaps.
    Returns: (M, L) bool, True = masked.
    Source: arXiv:2212.07525 and the authors' code.
    """
    covered = cover(grid, copies, ratio, width, adjust, draw, inverse)
    share = 1 - ratio if inverse else ratio
    target = math.floor(grid[0] * grid[1] * share)
    # Covered cells rank before clear ones and ties are broken at random: the first `target` cells of this order drop
    # covered cells if there are too many, and add clear ones if there are too few.
    order = (torch.rand(covered.shape, generator=draw) + covered).argsort(dim=1, descending=True)
    exact = torch.zeros_like(covered).scatter_(1, order[:, :target], True)
    return ~exact if inverse else exact


def cover(
    grid: tuple[int, int], copies: int, ratio: float, width: int, adjust: float, draw: torch.Generator, inverse: bool = True
) -> Tensor:
    """The drawn squares before the rows are made equal. (M, L) bool, True = in a square."""
    rows, columns = grid
    length = rows * columns
    share = 1 - ratio if inverse else ratio
    centres = math.floor(length * (share + adjust) / width**2)
    centre = torch.randint(length, (copies, max(centres, 1)), generator=draw)
    offset = torch.arange(width) - width // 2
    row = (centre.div(columns, rounding_mode="floor")[..., None] + offset).clamp(0, rows - 1)  # (M, c, w)
    column = (centre.remainder(columns)[..., None] + offset).clamp(0, columns - 1)
    cells = (row[..., :, None] * columns + column[..., None, :]).flatten(1)  # (M, c*w*w)
    return torch.zeros(copies, length, dtype=torch.bool).scatter_(1, cells, True)
