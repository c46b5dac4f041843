"""Weighted k-nearest-neighbour classification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.losses.prediction import at_least_fp32


@dataclass(frozen=True)
class Knn:
    """How a paper votes. Of several numbers of neighbours the best is reported, with all."""

    neighbours: tuple[int, ...] = (20,)
    temperature: float = 0.07


@torch.no_grad()
def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 20, temperature: float = 0.07, block: int = 1024
) -> Tensor:
    """Votes of the k most similar features of the bank.

    Args:
        bank: (N, D).  labels: (N,) in 0..classes-1.  queries: (Q, D). Normalised here.
        k: neighbours, at most N.
        temperature: of the weights exp(cosine / temperature).
    Returns: (Q, classes) sums of weights.
    Source: arXiv:1805.01978, section 3.4; the protocol of DINO, arXiv:2104.14294.
    """
    return _votes(*_nearest(bank, labels, queries, k, block), classes, temperature)


def knn_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """Share of queries whose class has the largest vote, 0..1."""
    return float(knn_right(bank, labels, queries, truth, k, temperature).float().mean())


def knn_right(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """(Q,) bool: whether the class of each query has the largest vote."""
    (right,) = knn_rights(bank, labels, queries, truth, (k,), temperature).values()
    return right


def knn_accuracies(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, neighbours: tuple[int, ...], temperature: float = 0.07
) -> dict[int, float]:
    """The same for several numbers of neighbours; those beyond the bank count as the whole bank."""
    found = knn_rights(bank, labels, queries, truth, neighbours, temperature)
    return {k: float(right.float().mean()) for k, right in found.items()}


@torch.no_grad()
def knn_rights(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, neighbours: tuple[int, ...], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Number of neighbours, at most the whole bank -> (Q,) bool, as `knn_right`."""
    classes = int(max(labels.max(), truth.max())) + 1
    similarity, votes = _nearest(bank, labels, queries, max(neighbours))
    return {
        k: _votes(similarity[:, :k], votes[:, :k], classes, temperature).argmax(1) == truth
        for k in dict.fromkeys(min(k, len(bank)) for k in neighbours)
    }


def _nearest(bank: Tensor, labels: Tensor, queries: Tensor, k: int, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Cosines and labels of the k nearest, most similar first, both (Q, k)."""
    bank, queries = (F.normalize(at_least_fp32(x), dim=-1) for x in (bank, queries))
    similarity, index = zip(*((rows @ bank.T).topk(min(k, len(bank)), dim=1) for rows in queries.split(block)))
    return torch.cat(similarity), labels[torch.cat(index)]


def _votes(similarity: Tensor, votes: Tensor, classes: int, temperature: float) -> Tensor:
    """(Q, k) and (Q, k) -> (Q, classes)."""
    scores = similarity.new_zeros(len(similarity), classes)
    return scores.scatter_add_(1, votes, (similarity / temperature).exp())
