"""Images in pieces and turned images, of which a network says how they were put together."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor


def tiles(x: Tensor, side: int, size: int, draw: torch.Generator) -> Tensor:
    """A square from a random place of each cell of a grid, so that edges of neighbours do not meet.

    Args:
        x: (C, H, W), cut into `side` x `side` cells; what is left over at the right and below is not used.
        size: of the squares, pixels.
    Returns: (side^2, C, size, size), row by row, the channels of each normalised by themselves to mean 0 and variance 1.
    Raises: ValueError if a square is larger than a cell.
    Source: arXiv:1603.09246, section 4.2; normalised by tile as there.
    """
    cell = x.shape[1] // side, x.shape[2] // side
    if size > min(cell):
        raise ValueError(f"tiles: {size} pixels, larger than the cells of {cell[0]} x {cell[1]}; take smaller or fewer tiles")
    places = [torch.randint(own - size + 1, (side, side), generator=draw).tolist() for own in cell]
    cut = []
    for row in range(side):
        for column in range(side):
            top, left = row * cell[0] + places[0][row][column], column * cell[1] + places[1][row][column]
            cut.append(x[:, top : top + size, left : left + size])
    each = torch.stack(cut)
    std, mean = torch.std_mean(each, (2, 3), keepdim=True)
    return (each - mean) / std.clamp(min=1e-6)


def far_orders(count: int, pieces: int, draw: torch.Generator) -> Tensor:
    """Orders of pieces that differ in as many places as possible, the classes of jigsaw puzzles.

    After a random first one, each is the order whose differences from those before are largest on average.

    Args:
        count: K, at most pieces!.  pieces: n, at most 9.
    Returns: (K, n) int64, row k the order of class k: what is at place i is piece [k, i].
    Raises: ValueError if there are not so many.
    Source: arXiv:1603.09246, algorithm 1.
    """
    if not 1 <= pieces <= 9:
        raise ValueError(f"pieces: {pieces}, must be between 1 and 9")
    every = torch.tensor(list(permutations(range(pieces))), dtype=torch.int8)
    if not 1 <= count <= len(every):
        raise ValueError(f"count: {count} orders of {pieces} pieces, there are {len(every)}")
    chosen = [int(torch.randint(len(every), (), generator=draw))]
    total = torch.zeros(len(every), dtype=torch.int64)
    for _ in range(count - 1):
        total += (every != every[chosen[-1]]).sum(1)
        total[chosen[-1]] = torch.iinfo(torch.int64).min // 2  # never again
        chosen.append(int(total.argmax()))
    return every[chosen].long()


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    """All four quarter turns of each square image, counter-clockwise, and how many there were.

    Args:
        x: (B, C, H, H).
    Returns: (4*B, C, H, H), the turns of an image adjacent, and (4*B,) int64 from 0 to 3.
    Source: arXiv:1803.07728, section 2.2.
    """
    four = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)], 1)
    return four.flatten(0, 1), torch.arange(4, device=x.device).repeat(len(x))
