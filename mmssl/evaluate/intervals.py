"""How sure a number is, over the test samples that happened to be drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmssl.random import generator

DRAWS, BLOCK = 2000, 100  # bootstrap draws, those made at once


class Interval(NamedTuple):
    """A number and where it lies in 95 of 100 cases."""

    value: float
    low: float
    high: float


@torch.no_grad()
def resampled(right: Tensor, seed: int = 0, draws: int = DRAWS) -> Tensor:
    """Means over samples drawn with replacement; a draw takes the same samples of every row.

    Args:
        right: (M, Q), such as whether each of M models is right about each of Q samples.
    Returns: (M, draws) float64.
    """
    draw, samples = generator(seed, "bootstrap"), right.shape[1]
    rows, found = right.double().cpu(), []
    for start in range(0, draws, BLOCK):
        many = min(BLOCK, draws - start)
        places = torch.randint(samples, (many, samples), generator=draw)
        counts = torch.zeros(many, samples, dtype=torch.float64).scatter_add_(1, places, torch.ones_like(places).double())
        found.append(rows @ counts.T / samples)
    return torch.cat(found, 1)


def interval(value: float | Tensor, draws: Tensor) -> Interval:
    """The 2.5th and 97.5th percentile of the draws, (n,). Source: Efron, Annals of Statistics 7:1, 1979."""
    low, high = torch.quantile(draws.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(value), low, high)


def paired(first: Tensor, second: Tensor, seed: int = 0, draws: int = DRAWS) -> Interval:
    """How much more often the second is right than the first, of the same samples, (Q,) each."""
    both = torch.stack([first, second]).double().cpu()
    means = resampled(both, seed, draws)
    return interval(both[1].mean() - both[0].mean(), means[1] - means[0])
