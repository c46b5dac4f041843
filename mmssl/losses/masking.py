"""Which tokens count, and means over them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.losses.numerics import at_least_fp32
from mmssl.types import Mask


def counted(values: Tensor, mask: Mask | Tensor | None) -> Tensor:
    """(R, L) bool, True = counts: what is masked, or everything if there is no mask. values: (R, L), one a token.

    Raises: ValueError if the mask is not one of these tokens.
    """
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    hidden = mask.hidden if isinstance(mask, Mask) else mask
    if hidden.dtype != torch.bool or hidden.shape != values.shape:
        raise ValueError(
            f"mask: {hidden.dtype} {tuple(hidden.shape)}, must be bool, True = masked, of the {tuple(values.shape)} tokens"
        )
    return hidden


def masked_mean(values: Tensor, mask: Mask | Tensor | None) -> Tensor:
    """() mean over masked tokens, 0 if there are none; over all of them without a mask. values: (R, L), one a token."""
    hidden = counted(values, mask)
    return values.masked_fill(~hidden, 0.0).sum() / hidden.sum().clamp(min=1)


def shared(target: Tensor, prediction: Tensor) -> Tensor:
    """(B, L, ...) to (M*B, L, ...): the target of a sample for each of the M adjacent rows of `prediction`, (M*B, L, ...).

    Raises: ValueError if there are not as many tokens, or no whole number of rows a sample.
    """
    if prediction.shape[1 : target.ndim] != target.shape[1:] or prediction.shape[0] % max(1, target.shape[0]):
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} do not fit")
    copies = prediction.shape[0] // max(1, target.shape[0])
    return target if copies == 1 else target.repeat_interleave(copies, 0)


def difference(prediction: Tensor, target: Tensor) -> Tensor:
    """(M*B, L, n) prediction - target, fp32 or higher, for a target (B, L, n) that is shared and held constant."""
    if prediction.ndim != target.ndim:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} do not fit")
    return at_least_fp32(prediction) - shared(at_least_fp32(target.detach()), prediction)
