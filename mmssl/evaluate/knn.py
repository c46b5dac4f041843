"""Weighted k-nearest-neighbour classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    bank, queries, k = F.normalize(bank.float(), dim=-1), F.normalize(queries.float(), dim=-1), min(k, len(bank))
    scores = torch.zeros(len(queries), classes, device=bank.device)
    for start in range(0, len(queries), block):
        similarity, index = (queries[start : start + block] @ bank.T).topk(k, dim=1)
        scores[start : start + block].scatter_add_(1, labels[index], (similarity / temperature).exp())
    return scores


def knn_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """Share of queries whose class has the largest vote, 0..1."""
    classes = int(max(labels.max(), truth.max())) + 1
    return float((knn_scores(bank, labels, queries, classes, k, temperature).argmax(1) == truth).float().mean())
