"""From tokens to ids."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tied(nn.Module):
    """Products with each row of an embedding table, and perhaps an offset: logits of all ids. (..., D) -> (..., V).

    The table is the embedding's own parameter. This module owns it too, so that whatever gathers or shards the parameters of a
    module before its forward does so here; it is counted, trained and saved once, with the embedding.
    """

    def __init__(self, embedding: nn.Embedding, bias: bool = True):
        super().__init__()
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Compare with all."""
        return F.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        missing.remove(f"{prefix}weight")


def lm_head(embedding: nn.Embedding, width: int, eps: float = 1e-5) -> nn.Sequential:
    """Linear layer, GELU, norm, and the embedding table with an offset, as in BERT. (..., width) -> (..., V) logits.

    Args:
        eps: of the norm.
    Source: arXiv:1810.04805, the authors' code.
    """
    linear = nn.Linear(width, embedding.embedding_dim)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.GELU(), nn.LayerNorm(embedding.embedding_dim, eps), Tied(embedding))
