"""Numbers that tell whether features still vary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import all_sum
from mmssl.losses.prediction import at_least_fp32
from mmssl.types import Mask


@torch.no_grad()
def token_std(tokens: Tensor, mask: Mask | None = None, group: ProcessGroup | None = None, pad: Tensor | None = None) -> Tensor:
    """Standard deviation of each channel over tokens, averaged over channels; 0.001 for a constant.

    Args:
        tokens: (R, L, D), or (B, L, D) under a mask with M*B rows, whose M masks of a sample are adjacent.
        mask: count masked tokens only.
        pad: (R, L) bool, True = padding, which is not counted.
    Returns: () mean over D of sqrt(var + 1e-6), unbiased, over the tokens of all ranks.
    Source: the variance guard of data2vec.
    """
    x = at_least_fp32(tokens)
    if mask is None:
        weight = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    else:  # a token counts once for each mask that hides it
        weight = mask.hidden.unflatten(0, (x.shape[0], -1)).sum(1).to(x.dtype)  # (R, L)
    if pad is not None:
        weight, x = weight.masked_fill(pad, 0.0), x.masked_fill(pad[..., None], 0.0)
    x, weight = x.flatten(0, 1), weight.flatten()
    weighted = weight[:, None] * x  # no matrix product: autocast would round its sums to bf16
    sums = all_sum(torch.cat([weight.sum()[None], weighted.sum(0), (weighted * x).sum(0)]).double(), group)
    count, first, second = sums[0], *sums[1:].chunk(2)
    variance = (second - first.square() / count).clamp(min=0) / (count - 1).clamp(min=1)
    return (variance + 1e-6).sqrt().mean().to(x.dtype)
