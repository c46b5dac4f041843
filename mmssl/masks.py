"""Which tokens a student does not see: generators of boolean masks over grids of any number of dimensions, True = masked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def blocks(
    grid: Sequence[int], copies: int, ratio: float, width: int, adjust: float, draw: torch.Generator, inverse: bool = False
) -> Tensor:
    """Block masks of data2vec 2.0: hide a few segments (1-D) or squares (2-D), or keep them and hide the rest if `inverse`.

    Blocks of `width` cells a side around uniformly drawn centres (with replacement, clamped at the edge) are covered; then
    uniformly chosen cells are cleared or added until every row covers exactly floor(L * share) of them.

    Args:
        grid: cells in each dimension, (L,) or (rows, columns).
        copies: masks to draw, M.
        ratio: share of cells to hide; `adjust` enlarges the drawn area to make up for overlaps.
    Returns: (M, L) bool, True = masked.
    Source: arXiv:2212.07525 and the authors' code.
    """
    covered = cover(grid, copies, ratio, width, adjust, draw, inverse)
    target = math.floor(math.prod(grid) * (1 - ratio if inverse else ratio))
    # Covered cells rank before clear ones and ties are broken at random: the first `target` cells of this order drop
    # covered cells if there are too many, and add clear ones if there are too few.
    order = (torch.rand(covered.shape, generator=draw) + covered).argsort(dim=1, descending=True)
    exact = torch.zeros_like(covered).scatter_(1, order[:, :target], True)
    return ~exact if inverse else exact


def cover(
    grid: Sequence[int], copies: int, ratio: float, width: int, adjust: float, draw: torch.Generator, inverse: bool = False
) -> Tensor:
    """The drawn blocks before the rows are made equal. (M, L) bool, True = in a block."""
    length = math.prod(grid)
    share = 1 - ratio if inverse else ratio
    centres = math.floor(length * (share + adjust) / width ** len(grid))
    centre = torch.randint(length, (copies, max(centres, 1)), generator=draw)
    offset = torch.arange(width) - width // 2
    cells, stride = torch.zeros(copies, centre.shape[1], 1, dtype=torch.int64), length
    for side in grid:  # row-major: the last dimension is dense
        stride //= side
        place = (centre.div(stride, rounding_mode="floor") % side)[..., None] + offset
        cells = (cells[..., :, None] + (place.clamp(0, side - 1) * stride)[..., None, :]).flatten(2)
    return torch.zeros(copies, length, dtype=torch.bool).scatter_(1, cells.flatten(1), True)


def spans(length: int, copies: int, ratio: float, width: int, draw: torch.Generator) -> Tensor:
    """Span masks of wav2vec 2.0 and data2vec 1: the union of segments that start at uniformly drawn places.

    Args:
        length: valid tokens, L.
        ratio: share of tokens that would be hidden if no spans overlapped; 0.65 with a width of 10 hides about 49 %.
    Returns: (M, L) bool, True = masked. There are floor(ratio * L / width + u) spans with u uniform in [0, 1), at least one;
        rows are made equal by unmasking uniformly drawn tokens, down to the row that hides fewest.
    Raises: ValueError if not one span fits with a token to spare.
    Source: arXiv:2006.11477, section 4; arXiv:2202.03555, section 4.
    """
    if length <= width:
        raise ValueError(f"mask.width: a span of {width} does not fit into {length} tokens")
    hidden = torch.zeros(copies, length, dtype=torch.bool)
    number = span_count(length, ratio, width, float(torch.rand((), generator=draw)))
    for row in hidden:
        row |= union(torch.randperm(length - width, generator=draw)[:number], width, length)
    fewest = min(int(hidden.sum(1).min()), length - 1)
    order = (torch.rand(hidden.shape, generator=draw) + hidden).argsort(dim=1, descending=True)
    return torch.zeros_like(hidden).scatter_(1, order[:, :fewest], True)


def span_count(length: int, ratio: float, width: int, u: float) -> int:
    """How many spans there are: ratio * length / width rounded down or up, as u in [0, 1) says, and at least one.

    Departs from the authors' code, which takes at least two and hides short utterances nearly as a whole.
    """
    return max(1, math.floor(ratio * length / width + u))


def union(starts: Tensor, width: int, length: int) -> Tensor:
    """(length,) bool, True = in one of the segments of `width` tokens that begin at `starts` (n,) int64."""
    covered = torch.zeros(length, dtype=torch.bool)
    covered[(starts[:, None] + torch.arange(width)).flatten()] = True
    return covered


def subsets(
    length: int,
    copies: int,
    context: tuple[float, float],
    target: tuple[float, float],
    targets: int,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Features of a table to see, and groups of others to predict, as in T-JEPA.

    Args:
        length: features, L.  copies: rows to draw, M, all with the same sizes.
        context, target: ranges of the share of the features that is seen, and that is in a group; both sizes are drawn until
            they fit beside each other.
        targets: groups, K; they may overlap.
    Returns: (M, L) bool, True = seen, and (M, K, n) int64, the features of each group, ascending; none of them is seen.
    Raises: ValueError if the least sizes do not fit.
    Source: arXiv:2410.05016 and the authors' code.
    """
    ends = [(max(1, round(length * low)), round(length * high)) for low, high in (context, target)]
    if ends[0][0] + ends[1][0] > length or any(low > high for low, high in ends):
        raise ValueError(f"subsets: shares {context} and {target} of {length} features must rise and fit beside each other")
    seen = wanted = length
    while seen + wanted > length:
        u = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        seen, wanted = (low + round((high - low) * share) for (low, high), share in zip(ends, u, strict=True))
    order = torch.rand(copies, length, generator=draw).argsort(dim=1)
    rest = order[:, None, seen:].expand(-1, targets, -1)  # (M, K, L - seen)
    chosen = torch.rand(rest.shape, generator=draw).argsort(dim=2)[..., :wanted]
    visible = torch.zeros(copies, length, dtype=torch.bool).scatter_(1, order[:, :seen], True)
    return visible, rest.gather(2, chosen).sort(2).values


def uniform(length: int, copies: int, ratio: float, draw: torch.Generator) -> Tensor:
    """Independent uniform masks: each row keeps floor(L * (1 - ratio)) tokens, at least one, and hides at least one.

    Returns: (M, L) bool, True = masked.
    """
    kept = min(max(1, math.floor(length * (1 - ratio))), length - 1)
    order = torch.rand(copies, length, generator=draw).argsort(dim=1)
    return torch.ones(copies, length, dtype=torch.bool).scatter_(1, order[:, :kept], False)


def of_size(hidden: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Rows with exactly `count` masked tokens: uniformly drawn ones are masked or unmasked in addition.

    Args:
        hidden: (M, L) bool, True = masked.
    Returns: (M, L) bool.
    """
    order = (torch.rand(hidden.shape, generator=draw) + hidden).argsort(dim=1, descending=True)
    return torch.zeros_like(hidden).scatter_(1, order[:, :count], True)
