"""A few labelled samples of each class, drawn many times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.evaluate.features import rank_in_class
from mmssl.evaluate.intervals import Interval
from mmssl.losses.numerics import unit_rows


@dataclass(frozen=True)
class FewShot:
    """Nearest class mean of `shots` samples of each class, of features of length 1; the mean over `draws` of them.

    Source: prototypes as in arXiv:1703.05175 and the few-shot part of arXiv:2011.13377, here with all classes at once.
    """

    shots: int
    draws: int = 100


def few_shot(p: FewShot, bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, seed: int = 0) -> Interval:
    """Mean accuracy, 0..1, over draws of the labelled samples, and its 95 % interval (Student's t over draws).

    Arguments and errors as those of `few_shot_right`.
    """
    return over_draws(few_shot_right(p, bank, labels, queries, truth, seed))


def over_draws(right: Tensor) -> Interval:
    """Mean and its 95 % interval (Student's t over draws) of what `few_shot_right` gives."""
    from scipy.stats import t

    draws, scores = len(right), right.double().mean(1)
    spread = float(t.ppf(0.975, draws - 1) * scores.std() / draws**0.5)
    mean = float(scores.mean())
    return Interval(mean, mean - spread, mean + spread)


@torch.no_grad()
def few_shot_right(p: FewShot, bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, seed: int = 0) -> Tensor:
    """(draws, Q) bool: whether the nearest class mean of each draw is that of each query.

    Args:
        bank: (N, D).  labels: (N,) int64.  queries: (Q, D), those asked of each draw.  truth: (Q,).
    Raises: RecipeError if a class has fewer samples.
    """
    labels, bank, queries = labels.cpu(), unit_rows(bank), unit_rows(queries)
    classes, sizes = labels.unique(return_counts=True)
    if int(sizes.min()) < p.shots:
        scarce = classes[sizes.argmin()]
        raise RecipeError(
            f"protocol: few-{p.shots} takes {p.shots} labelled samples of each class, class number {int(scarce)} has "
            f"{int(sizes.min())} among the training samples; raise samples, or take another."
        )
    place = torch.zeros(int(classes.max()) + 1, dtype=torch.int64).scatter_(0, classes, torch.arange(len(classes)))
    found = []
    for draw in range(p.draws):
        chosen = rank_in_class(labels, seed, "few-shot", draw) < p.shots
        sums = bank.new_zeros(len(classes), bank.shape[1])
        means = sums.index_add_(0, place[labels[chosen]].to(bank.device), bank[chosen.to(bank.device)]) / p.shots
        nearest = classes[torch.cdist(queries, means).argmin(1).cpu()]
        found.append(nearest == truth.cpu())
    return torch.stack(found)
