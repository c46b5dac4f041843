"""Alterations of spectrograms, for methods that undo them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alterations:
    """What is altered in an utterance; the defaults are those of TERA in time and frequency (arXiv:2007.06028)."""

    time: float = 0.15  # share of the frames that blocks would take if they did not overlap; 0 = none
    width: int = 7  # frames of a block
    zero: float = 0.8  # chance that an utterance's blocks become its mean
    swap: float = 0.1  # chance that they become other blocks of it; else they stay as they are, and count all the same
    band: float = 0.2  # greatest width of a band that becomes the mean, share of all; 0 = none
    noise: float = 0.0  # chance of noise in all cells, 0.15 in TERA's variants with magnitude
    scale: float = 0.2  # standard deviation of noise, in units of what the model normalises to

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


def check(a: Alterations) -> None:
    """Raises: ValueError that begins with `alter` and the option that is wrong."""
    for name in ("time", "band"):
        if not 0 <= getattr(a, name) < 1:
            raise ValueError(f"alter.{name}: {getattr(a, name)}, must be at least 0 and below 1")
    for name in ("zero", "swap", "noise"):
        if not 0 <= getattr(a, name) <= 1:
            raise ValueError(f"alter.{name}: {getattr(a, name)}, must be a chance between 0 and 1")
    if a.zero + a.swap > 1:
        raise ValueError(f"alter.swap: {a.swap}, must leave zero={a.zero:g} its chance; together at most 1")
    if a.width < 1:
        raise ValueError(f"alter.width: {a.width}, must be at least 1 frame")
    if a.scale < 0:
        raise ValueError(f"alter.scale: {a.scale}, must be at least 0")
    if not (a.time or a.band or (a.noise and a.scale)):
        raise ValueError("alter: nothing is altered; raise time, band or noise")


def altered(x: Tensor, a: Alterations, draw: torch.Generator, mean: float = 0.0, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """An utterance with blocks of frames, a band and all magnitudes altered, in this order.

    Departs from the authors' code, which draws once for a whole batch whether there is noise: an utterance is altered in the
    same way in any company.

    Args:
        x: (T, F).  mean, std: of the cells of the data set.
    Returns: (T, F), and bool (T, F), True = to be rebuilt: blocks and band, or all where there is noise alone.
    """
    frames, bands = x.shape
    out, label = x.clone(), torch.zeros(x.shape, dtype=torch.bool)
    if a.time:
        starts, others = block_starts(frames, a, draw), block_starts(frames, a, draw)
        die = float(torch.rand((), generator=draw))  # one for all blocks of the utterance
        for start, other in zip(starts, others):
            if die < a.zero:
                out[start : start + a.width] = mean
            elif die < a.zero + a.swap:
                out[start : start + a.width] = x[other : other + a.width]
            label[start : start + a.width] = True
    if a.band:
        width = int(torch.randint(int(a.band * bands) + 1, (), generator=draw))
        start = int(torch.randint(bands - width, (), generator=draw))
        out[:, start : start + width] = mean
        label[:, start : start + width] = True
    if a.noise and float(torch.rand((), generator=draw)) < a.noise:
        out += a.scale * std * torch.randn(x.shape, generator=draw)
    return out, label if a.time or a.band else ~label


def block_starts(frames: int, a: Alterations, draw: torch.Generator) -> list[int]:
    """Different first frames, at most T - width - 1, of round(T * time / width) blocks, which may overlap."""
    places = max(frames - a.width, 1)
    return torch.randperm(places, generator=draw)[: round(frames * a.time / a.width)].tolist()
