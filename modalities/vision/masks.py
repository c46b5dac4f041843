"""Masks over a grid of patches that only images have; block masks are in `mmssl/masks.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.masks import of_size
from mmssl.random import generator

TRIES = 10  # rectangles in a row that do not fit, or add nothing, before no more are tried

Range = tuple[float, float]


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
    target = math.floor(grid[0] * grid[1] * ratio)
    hidden = torch.stack([grown(grid, target, smallest, aspect, draw) for _ in range(copies)]).flatten(1)
    return of_size(hidden, target, draw)


def grown(grid: tuple[int, int], target: float, smallest: int, aspect: float, draw: torch.Generator) -> Tensor:
    """One mask of rectangles that hide at most `target` patches, fewer where no further rectangle finds room.

    Returns: (rows, columns) bool, True = masked. Other arguments and source as of `rectangles`.
    """
    rows, columns = grid
    mask, failed = torch.zeros(rows, columns, dtype=torch.bool), 0
    while (free := target - int(mask.sum())) > 0 and failed < TRIES:
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
    return mask


def mixed(
    grid: tuple[int, int], copies: int, share: float, ratios: Range, smallest: int, aspect: float, draw: torch.Generator
) -> Tensor:
    """Masks of iBOT: some hide nothing, the others rectangles whose share of the patches is drawn, too.

    Args:
        share: of the masks that hide something.  ratios: between which the share of their patches is drawn.
        Others as of `rectangles`.
    Returns: (M, L) bool, True = masked; rows differ in how much they hide, and hide less than was drawn where no further
        rectangle finds room.
    Source: arXiv:2111.07832, section 4.1 and the authors' code.
    """
    rows = []
    for _ in range(copies):
        hides, where = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        ratio = ratios[0] + where * (ratios[1] - ratios[0]) if hides < share else 0.0
        rows.append(grown(grid, ratio * grid[0] * grid[1], smallest, aspect, draw))
    return torch.stack(rows).flatten(1)


def units(grid: tuple[int, int], copies: int, ratio: float, width: int, draw: torch.Generator) -> Tensor:
    """Masks of SimMIM: squares of `width` patches a side, in rank and file.

    Args:
        copies: masks to draw, M.  width: a divisor of both sides of the grid.
    Returns: (M, L) bool, True = masked, ceil(ratio * squares) squares in each row, at least one, and at least one not.
    Source: arXiv:2111.09886, section 3.2, and the authors' code.
    """
    rows, columns = grid[0] // width, grid[1] // width
    hidden = min(max(1, math.ceil(ratio * rows * columns)), rows * columns - 1)
    order = torch.rand(copies, rows * columns, generator=draw).argsort(dim=1)
    coarse = torch.zeros(copies, rows * columns, dtype=torch.bool).scatter_(1, order[:, :hidden], True)
    fine = coarse.view(copies, rows, columns).repeat_interleave(width, 1).repeat_interleave(width, 2)
    return fine.flatten(1)


# Several blocks to predict, one to predict them from -------------------------------------------------------------------


class Blocks(NamedTuple):
    """Masks of I-JEPA before a batch is made of them."""

    context: Tensor  # (M, L) bool, True = visible
    wanted: Tensor  # (M, K, n) int64, places of each target block, ascending


def block_size(grid: tuple[int, int], scale: Range, aspect: Range, u: float) -> tuple[int, int]:
    """Rows and columns of a block, less than the grid has.

    Args:
        scale: range of its share of the patches.  aspect: range of height to width.
        u: in [0, 1], says both where in `scale` and where in `aspect`.
    """
    area = int(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(1, min(sides[0], grid[0] - 1)), max(1, min(sides[1], grid[1] - 1))


def block_sizes(grid: tuple[int, int], scale: Range, aspect: Range) -> set[tuple[int, int]]:
    """All sizes that `block_size` can give, but for slivers of probability below 1/2000."""
    return {block_size(grid, scale, aspect, i / 2000) for i in range(2001)}


def multiblock(
    grid: tuple[int, int],
    copies: int,
    context: tuple[int, int],
    target: tuple[int, int],
    targets: int,
    least: int,
    draw: torch.Generator,
    published: bool = False,
    enough: int | None = None,
) -> Blocks:
    """Masks of I-JEPA: K blocks to predict, and a large block without any of their patches to predict them from.

    A context of `least` patches or fewer is drawn again, at times with its targets; after a hundred tries all targets lie in
    one place, which leaves enough. Departs from the authors' code, which then lets the context see targets.

    Args:
        copies: masks to draw, M.  context, target: rows and columns of the blocks.  targets: K.
        published: blocks never touch the last row and column, as in the authors' code.
        enough: patches of a context that is not drawn again, `least` + 1 if None.
    Raises: ValueError if that is impossible, with what `why_not_multiblock` says.
    Source: arXiv:2301.08243, section 3, and the authors' code.
    """
    if trouble := why_not_multiblock(context, target, least):
        raise ValueError(trouble)
    cells = torch.arange(grid[0] * grid[1]).view(grid)
    last, enough = 0 if published else 1, least + 1 if enough is None else enough
    rows = [_placed(cells, context, target, targets, enough, draw, last) for _ in range(copies)]
    return Blocks(torch.stack([row.context for row in rows]), torch.stack([row.wanted for row in rows]))


def why_not_multiblock(context: tuple[int, int], target: tuple[int, int], least: int) -> str | None:
    """What is wrong with such blocks, in words that begin with the option; None if masks can be drawn."""
    small, large = target[0] * target[1], context[0] * context[1]
    if small <= least:
        return (
            f"mask.min_keep: {least}, target blocks of {target[0]} x {target[1]} patches must have more than that; lower it "
            f"to at most {small - 1}, enlarge mask.target_scale, or take smaller patches"
        )
    if large - small <= least:
        return (
            f"mask.context_scale: a block of {context[0]} x {context[1]} patches without one of {target[0]} x {target[1]} "
            f"may leave {max(0, large - small)}, mask.min_keep={least} asks for more; enlarge it, or lower mask.target_scale"
        )
    return None


@cache
def usual_context(grid: tuple[int, int], context: tuple[int, int], target: tuple[int, int], targets: int, least: int) -> int:
    """Patches of the smallest of 64 contexts of such blocks, the same for every batch; arguments as of `multiblock`."""
    rows = multiblock(grid, 64, context, target, targets, least, generator("usual"))
    always = context[0] * context[1] - target[0] * target[1]  # what the last resort of `multiblock` leaves
    return min(int(rows.context.sum(1).min()), always)


def _placed(
    cells: Tensor,
    context: tuple[int, int],
    target: tuple[int, int],
    targets: int,
    enough: int,
    draw: torch.Generator,
    last: int,
) -> Blocks:
    """One mask."""

    def block(size: tuple[int, int]) -> Tensor:
        top, left = (
            int(torch.randint(side - own + last, (), generator=draw)) for side, own in zip(cells.shape, size, strict=True)
        )
        return cells[top : top + size[0], left : left + size[1]].flatten()

    wanted = torch.empty(0)
    for attempt in range(102):
        if attempt % 20 == 0:
            wanted = torch.stack([block(target) for _ in range(targets)])
        if attempt > 100:
            wanted = wanted[:1].expand(targets, -1)
        seen = torch.zeros(cells.numel(), dtype=torch.bool)
        seen[block(context)] = True
        seen[wanted.flatten()] = False
        if int(seen.sum()) >= enough:
            break
    return Blocks(seen, wanted)


def equal_context(
    rows: Sequence[Blocks], seeds: Sequence[int], published: bool = False, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Contexts of a batch, all as large as one another.

    Args:
        rows: M masks of each of B samples.  seeds: B, one a sample.
        published: patches are left out from the end, as in the authors' code; the larger a batch, the fewer of the lower rows
            are then ever seen. Uniformly drawn ones otherwise.
        size: of each context, which none of them may be below; that of the smallest one if None.
    Returns: (M*B, L) bool, True = masked, that is not in the context; and (M*B, K, n) places to predict.
    """
    fewest = min(int(row.context.sum(1).min()) for row in rows) if size is None else size
    if published:
        kept = [row.context & (row.context.cumsum(1) <= fewest) for row in rows]
    else:
        kept = [of_size(row.context, fewest, generator(seed, "equal")) for row, seed in zip(rows, seeds, strict=True)]
    return ~torch.cat(kept), torch.cat([row.wanted for row in rows])
