"""Crops of texts: pieces of them, without some of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmssl.crops import one_by_one as expanded

LEAST = 4  # tokens that stay of a text that has as many


@dataclass(frozen=True)
class Crop:
    """How views are made of a text: first a run of its tokens, then some of them left out, never beginning and end.

    Source: random cropping and deletion as in arXiv:2112.09118, section 3.2.
    """

    count: int = 1  # views made this way, each drawn for itself
    span: tuple[float, float] = (1.0, 1.0)  # share of the tokens that are kept, drawn uniformly
    drop: float = 0.0  # chance of each of these to be left out

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


# `dropout`: twice the same, what differs is the model's dropout (SimCSE, arXiv:2104.08821). The other numbers are ours.
POLICIES: dict[str, tuple[Crop, ...]] = {
    "dropout": (Crop(2),),
    "span": (Crop(2, span=(0.3, 0.8)),),
    "drop": (Crop(2, drop=0.2),),
    "span-drop": (Crop(2, span=(0.3, 0.8), drop=0.1),),
    "weak-strong": (Crop(), Crop(span=(0.3, 1.0), drop=0.1)),
    "multi": (Crop(2, span=(0.5, 1.0), drop=0.1), Crop(4, span=(0.1, 0.4), drop=0.1)),
}


def one_by_one(crops: list[Crop] | str | None) -> tuple[list[Crop], int]:
    """One entry for each view, and how many of them, the first ones, are of full size: those whose span may be the largest.

    Raises: ValueError that begins with `crops`.
    """
    return expanded(crops, POLICIES, check_crop, lambda crop: crop.span[1])


def check_crop(crop: Crop, key: str) -> None:
    """Raises: ValueError that begins with `key` and the option that is wrong."""
    if not 1 <= crop.count <= 64:
        raise ValueError(f"{key}.count: {crop.count}, must be between 1 and 64")
    low, high = crop.span
    if not 0 < low <= high <= 1:
        raise ValueError(f"{key}.span: [{low}, {high}], must be two shares with 0 < smallest <= largest <= 1")
    if not 0 <= crop.drop < 1:
        raise ValueError(f"{key}.drop: {crop.drop}, must be a chance, at least 0 and below 1")


def view(tokens: Tensor, crop: Crop, draw: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """One view of a text.

    Args:
        tokens: (n,) without beginning and end.
    Returns: (m,) with m at least `LEAST`, or n if that is less; and what was done: start (first token of the
        run) and kept (m / n).
    """
    count = len(tokens)
    least = min(LEAST, count)
    share = crop.span[0] + (crop.span[1] - crop.span[0]) * float(torch.rand((), generator=draw, dtype=torch.float64))
    length = max(least, round(share * count))
    start = int(torch.randint(count - length + 1, (), generator=draw))
    luck = torch.rand(length, generator=draw)
    stays = luck >= luck.topk(least).values[-1].clamp(max=crop.drop)
    run = tokens[start : start + length][stays]
    return run, {"start": float(start), "kept": len(run) / count}
