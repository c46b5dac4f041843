"""Samples that look alike to a model, though their bytes differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.data.scan import Split
from mmssl.errors import RecipeError
from mmssl.evaluate.embedding import usable_rows
from mmssl.losses.numerics import unit_rows
from mmssl.registry import Modality

BLOCK, MOST = 1024, 1000  # rows compared at once, pairs that are named


@torch.no_grad()
def near_pairs(first: Tensor, second: Tensor | None, cosine: float) -> list[tuple[int, int, float]]:
    """Pairs of rows whose cosine is at least that, the most alike first.

    Args:
        first: (N, D).  second: (M, D); None for pairs (i, j), i < j, of the first.
    Returns: places in both, and the cosine.
    """
    ours, theirs = unit_rows(first), unit_rows(first if second is None else second)
    found = []
    for start in range(0, len(ours), BLOCK):
        alike = ours[start : start + BLOCK] @ theirs.T
        if second is None:
            alike = alike.triu(start + 1)  # each pair once, and no row with itself
        places = (alike >= cosine).nonzero()
        found += [(start + i, j, float(alike[i, j])) for i, j in places.tolist()]
    return sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


def typical(first: Tensor, second: Tensor | None) -> float:
    """Mean cosine of two different rows, (N, D), or of one of each set."""
    ours = unit_rows(first).double()
    if second is not None:
        return float(ours.mean(0) @ unit_rows(second).double().mean(0))
    pairs = max(1, len(ours) * (len(ours) - 1))
    return float((ours.sum(0).square().sum() - ours.square().sum()) / pairs)


def near(
    model: str | Path,
    kind: Modality,
    found: Mapping[str, Split],
    against: Mapping[str, Split] | None = None,
    cosine: float = 0.98,
    member: str | None = None,
) -> list[dict[str, Any]]:
    """Of each split, and of each two, how many pairs are at least so alike, and the names of the first thousand.

    Args:
        model: that embeds them, of this kind of data.
        against: splits of another data set.
    Returns: `first`, `second` (the same for pairs within a split), `count`, `pairs` (two names and their cosine), `typical`,
        the mean cosine of any two, which many models have near 1. Pairs of equal content are left out: they are duplicates.
    Raises: RecipeError.
    """
    if not 0 < cosine <= 1:
        raise RecipeError(f"cosine: {cosine:g}, must be above 0 and at most 1.")
    rows = {name: usable_rows(model, split.source, kind, member) for name, split in found.items()}
    others = {f"against {name}": split for name, split in (against or {}).items()}
    rows |= {name: usable_rows(model, split.source, kind, member) for name, split in others.items()}
    splits, names = {**found, **others}, [*found]
    wanted = [(a, b) for i, a in enumerate(names) for b in names[i:]] + [(a, b) for a in found for b in others]
    results = []
    for a, b in wanted:
        (place_a, x), (place_b, y) = rows[a], rows[b]
        pairs = [
            (place_a[i], place_b[j], value)
            for i, j, value in near_pairs(x, None if a == b else y, cosine)
            if splits[a].samples[place_a[i]].content != splits[b].samples[place_b[j]].content
        ]
        told = [[splits[a].source.identity(i), splits[b].source.identity(j), value] for i, j, value in pairs[:MOST]]
        usual = typical(x, None if a == b else y)
        results += [{"first": a, "second": b, "count": len(pairs), "typical": usual, "pairs": told}] if pairs else []
    return results
