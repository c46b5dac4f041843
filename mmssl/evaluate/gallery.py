"""What features of a few samples look like: directions of tokens, attention, neighbours, spectrum. For pictures only."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.losses.numerics import unit_rows
from mmssl.model.encoder import Encoder
from mmssl.types import Encoded, View


@torch.no_grad()
def attended(encoder: Encoder, view: View) -> tuple[Encoded, Tensor]:
    """A whole view, and where the last layer looks.

    Returns: its tokens, and (B, L) weights of the content tokens as keys, a mean over heads and, where there is no cls, over
        the queries that are not padding. A row sums to 1, or less where cls and registers are looked at as well.
    """
    called: list[Any] = []  # what the layer was called with
    projected: list[Tensor] = []
    last: Any = encoder.transformer.blocks[-1]
    handles = [
        last.attn.register_forward_pre_hook(lambda module, given: called.append(given)),
        last.attn.qkv.register_forward_hook(lambda module, given, out: projected.append(out)),
    ]
    try:
        encoded = encoder(view)
    finally:
        for handle in handles:
            handle.remove()
    bias = called[0][1] if len(called[0]) > 1 else None
    weights, extra = _weights(last.attn, projected[0], bias).mean(1), encoder.transformer.extra_tokens  # (B, E + L, E + L)
    if extra:
        return encoded, weights[:, 0, extra:]
    if encoded.pad is None:
        return encoded, weights.mean(1)
    valid = (~encoded.pad).to(weights)[..., None]
    return encoded, (weights * valid).sum(1) / valid.sum(1)


def _weights(attention: Any, qkv: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, L, L) what a layer multiplies values with. qkv: (B, L, 3 * D). bias: as it is given to the layer."""
    rows, length, triple = qkv.shape
    width = triple // 3 // attention.heads
    q, k, _ = qkv.view(rows, length, 3, attention.heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    logits = q.float() @ k.float().mT / math.sqrt(width)
    if bias is not None:
        logits = logits + bias if bias.is_floating_point() else logits.masked_fill(~bias, -math.inf)
    if attention.causal:
        past = torch.ones(length, length, dtype=torch.bool, device=qkv.device).tril()
        logits = logits.masked_fill(~past, -math.inf)
    return logits.softmax(-1)


def first_components(tokens: Tensor, pad: Tensor | None = None) -> Tensor:
    """The first three principal components of tokens, those of all samples together, as colours.

    Args:
        tokens: (B, L, D), D >= 3.  pad: (B, L) bool, True = padding.
    Returns: (B, L, 3) between 0 and 1: each component from its 1st to its 99th percentile; 0 at padding. The sign of each is
        such that the largest entry of its direction is positive.
    """
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool) if pad is None else ~pad
    rows = tokens[valid].float()
    rows = rows - rows.mean(0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    found = F.pad(rows @ directions.T, (0, 3 - len(directions)))
    low, high = found.quantile(torch.tensor([0.01, 0.99]), dim=0)
    colours = torch.zeros(*tokens.shape[:2], 3)
    colours[valid] = ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours


def nearest(features: Tensor, queries: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """The samples most like some of them, by cosine.

    Args:
        features: (N, D).  queries: (Q,) positions.
    Returns: (Q, count) positions, nearest first and without the query itself, and their cosines; fewer if there are no more.
    """
    rows = unit_rows(features)
    cosines = rows[queries] @ rows.T
    cosines[torch.arange(len(queries)), queries] = -math.inf
    found = cosines.topk(min(count, len(rows) - 1), 1)
    return found.indices, found.values


def random_pairs(features: Tensor) -> Tensor:
    """(N,) cosines of each sample with the one that lies half of the set further on."""
    rows = unit_rows(features)
    return (rows * rows.roll(len(rows) // 2, 0)).sum(1)


def spectrum(features: Tensor) -> Tensor:
    """(min(N, D),) singular values of centred features, as shares of the largest."""
    values = torch.linalg.svdvals(features.float() - features.float().mean(0))
    return values / values[0].clamp(min=torch.finfo(values.dtype).tiny)


def flat_map(features: Tensor, seed: int = 0) -> Tensor:
    """(N, 2) t-SNE by scikit-learn, from principal components on. Source: van der Maaten and Hinton, JMLR 9:2579."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, metric="cosine").fit_transform(features.numpy())
    return torch.from_numpy(found)
