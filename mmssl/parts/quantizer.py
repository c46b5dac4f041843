"""Vectors to entries of learned codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmssl import random


class Quantized(NamedTuple):
    """What stands for some vectors."""

    vectors: Tensor  # (..., dim) the chosen entry of each codebook, side by side
    ids: Tensor  # (...) int64, the same where all chosen entries are the same
    chosen: Tensor  # (..., G, V) one-hot, no gradient
    probabilities: Tensor  # (..., G, V) softmax of the logits, without noise or temperature


class GumbelQuantizer(nn.Module):
    """The product quantizer of wav2vec 2.0: one of V entries from each of G codebooks.

    In training entries are drawn by their probability, and all logits get the gradient of a softmax (straight through); in
    evaluation the most likely ones are taken. Logits start with weights from N(0, 1), entries in [0, 1).

    Args:
        width: of the vectors.  dim: of what stands for them, G entries of dim / G each.
        groups: G.  entries: V.
    Raises: ValueError that begins with the option that is wrong.
    Source: arXiv:2006.11477, section 2, Eq. 1; arXiv:1611.01144.
    """

    def __init__(self, width: int, dim: int, groups: int = 2, entries: int = 320):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups: {groups}, must be at least 1 and divide dim={dim} into entries of equal width")
        if entries < 2 or entries**groups >= 1 << 63:
            raise ValueError(f"entries: {entries} in {groups} groups, must be at least 2, with fewer than 2^63 combinations")
        self.groups, self.count = groups, entries
        self.logits = nn.Linear(width, groups * entries)
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        self.entries = nn.Parameter(torch.empty(groups, entries, dim // groups).uniform_())

    def forward(self, x: Tensor, keys: Sequence[int], temperature: float) -> Quantized:
        """Choose.

        Args:
            x: (M*B, n, width), the M rows of a sample adjacent.
            keys: B seeds of the noise, one a sample; read in training only.
            temperature: above 0, of the softmax whose gradient is used.
        """
        logits = self.logits(x).unflatten(-1, (self.groups, self.count))  # (M*B, n, G, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        noisy = (logits + gumbel(keys, logits)) / temperature if self.training else logits
        codes = noisy.argmax(-1, keepdim=True)
        hard = torch.zeros_like(noisy).scatter_(-1, codes, 1.0)
        soft = noisy.softmax(-1)
        picked = hard + (soft - soft.detach()) if self.training else hard  # in this order exactly one-hot
        vectors = torch.einsum("...gv,gvd->...gd", picked, self.entries.to(picked.dtype)).flatten(-2)
        places = self.count ** torch.arange(self.groups, device=codes.device)
        ids = (codes.squeeze(-1) * places).sum(-1)  # CUDA has no products of integer matrices
        return Quantized(vectors, ids, hard, logits.softmax(-1))


def gumbel(keys: Sequence[int], like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape (M*B, ...) of `like`, that of a sample's M rows by its own one of B keys."""
    own = [random.key(key, "gumbel") for key in keys]
    drawn = random.uniform(own, (len(like) // len(own), *like.shape[1:]), like.device).flatten(0, 1)
    return -(-drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()).log().to(like.dtype)
