"""Regression of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.losses.numerics import at_least_fp32, cosines, same_shape
from mmssl.types import Mask

Norm = Literal["instance", "layer", "none"]


def instance_norm(x: Tensor, eps: float = 1e-5, pad: Tensor | None = None) -> Tensor:
    """Each channel of each sample to mean 0 and variance 1 over its tokens, without weights.

    Args:
        x: (B, L, D).  pad: (B, L) bool, True = padding, which has no part in the statistics and becomes 0.
    Returns: (B, L, D), fp32 or higher.
    """
    x = at_least_fp32(x)
    if pad is None:
        centred = x - x.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    valid = (~pad).to(x.dtype)[..., None]
    count = valid.sum(1, keepdim=True).clamp(min=1)
    centred = (x - (x * valid).sum(1, keepdim=True) / count) * valid
    return centred * (centred.square().sum(1, keepdim=True) / count + eps).rsqrt()


def normalise(x: Tensor, how: Norm, pad: Tensor | None = None) -> Tensor:
    """(B, L, D) by instance norm, by layer norm over D without weights, or not at all; fp32 or higher."""
    if how == "instance":
        return instance_norm(x, pad=pad)
    x = at_least_fp32(x)
    return F.layer_norm(x, x.shape[-1:]) if how == "layer" else x


def average_layers(
    layers: Sequence[Tensor], top_k: int, each: Norm = "instance", final: Norm = "layer", pad: Tensor | None = None
) -> Tensor:
    """The contextualised target of data2vec: the last layers, normalised, averaged, perhaps normalised again.

    Args:
        layers: per block (B, L, D), first block first.
        top_k: how many of the last ones to average.
        each, final: norm of each layer and of the average. After instance norm alone the mean over tokens is zero.
        pad: (B, L) bool, True = padding, which has no part in the statistics.
    Returns: (B, L, D), fp32 or higher.
    Raises: ValueError if there are fewer than `top_k` layers.
    Source: arXiv:2202.03555, section 3.3; arXiv:2212.07525, section 3; which norms, as in the authors' code.
    """
    if not 0 < top_k <= len(layers):
        raise ValueError(f"top_k: {top_k} layers to average, the trunk has {len(layers)}")
    mean = normalise(layers[-top_k], each, pad)
    for layer in layers[len(layers) - top_k + 1 :]:
        mean = mean + normalise(layer, each, pad)
    return normalise(mean / top_k, final, pad)


def data2vec_regression(
    prediction: Tensor, target: Tensor, mask: Mask | None = None, scale: float | None = None, beta: float = 0.0
) -> Tensor:
    """Squared error, or smooth L1, summed over channels and averaged over masked tokens.

    Args:
        prediction: (M*B, L, D), or (M*B, D) for one vector a row; the M rows of a sample adjacent.
        target: (B, L, D) or (B, D), shared by a sample's M rows.
        mask: which tokens count, rows (M*B, L); all of them if None.
        scale: factor of the error; D^-0.5 if None.
        beta: if above 0, smooth L1: error^2 / (2 beta) below beta, |error| - beta / 2 beyond.
    Returns: () mean over tokens of scale * |prediction - target|^2. A zero prediction of a layer-normed target scores sqrt(D).
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2212.07525, Eq. 1; arXiv:2202.03555, Eq. 3.
    """
    if prediction.shape[1:] != target.shape[1:] or prediction.shape[0] % target.shape[0]:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} do not fit")
    prediction, target = at_least_fp32(prediction), at_least_fp32(target)
    grouped = prediction.unflatten(0, (target.shape[0], -1))  # (B, M, ..., D)
    error = grouped - target[:, None]
    error = error.square() if beta == 0 else F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=beta)
    error = error.sum(-1).flatten(0, 1) * (scale if scale is not None else prediction.shape[-1] ** -0.5)  # (M*B, ...)
    if mask is None:
        return error.mean()
    return error.masked_fill(~mask.hidden, 0.0).sum() / mask.hidden.sum()


def cosine_regression(p: Tensor, z: Tensor) -> Tensor:
    """Squared distance between predictions and targets of length 1, which is 2 - 2 cos.

    Args:
        p: (B, D) predictions.  z: (B, D) targets, which are held constant. Normalised here.
    Returns: () mean over this rank's samples, in [0, 4].
    Raises: ValueError if the shapes differ.
    Source: arXiv:2006.07733, Eq. 2. SimSiam's loss of one direction is half of this less 1, arXiv:2011.10566, Eq. 1.
    """
    same_shape(p=p, z=z)
    return 2 - 2 * cosines(p, z.detach()).mean()
