"""Masks over a grid of patches that only images have; block masks are in `mmssl/masks.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRIES = 10  # rectangles in a row that do not fit, or add nothing, before the rest is scattered


def rectangles(grid: tuple[int, int], copies: int, ratio: float, smallest: int, aspect: float, draw: torch.Generator) -> Tensor:
    """Block-wise masks of BEiT and data2vec 1: rectangles are added until the wanted number of patches is hidden.

    Args:
        copies: masks to draw, M.
        ratio: share of patches to hide.
        smallest: patches of the smallest rectangle, as long as so many are left to hide.
        aspect: least ratio of height to width; the greatest is its inverse.
    Returns: (M, L) bool, True = masked, exactly floor(L * ratio) in each row: uniformly drawn patches make up the few
        that no rectangle found room for.
    Source: arXiv:2106.08254, algorithm 1, and the authors' code.
    """
    rows, columns = grid
    target = math.floor(rows * columns * ratio)
    hidden = torch.zeros(copies, rows, columns, dtype=torch.bool)
    for mask in hidden:
        failed = 0
        while (free := target - int(mask.sum())) and failed < TRIES:
            u = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
            area = smallest + u[0] * (free - smallest)
            height_to_width = aspect ** (1 - 2 * u[1])
            height, width = round(math.sqrt(area * height_to_width)), round(math.sqrt(area / height_to_width))
            failed += 1
            if not (0 < height < rows and 0 < width < columns):
                continue
            top = int(torch.randint(rows - height + 1, (), generator=draw))
            left = int(torch.randint(columns - width + 1, (), generator=draw))
            box = mask[top : top + height, left : left + width]
            if 0 < int((~box).sum()) <= free:
                box.fill_(True)
                failed = 0
    flat = hidden.flatten(1)
    order = (torch.rand(flat.shape, generator=draw) + flat).argsort(dim=1, descending=True)
    return torch.zeros_like(flat).scatter_(1, order[:, :target], True)
