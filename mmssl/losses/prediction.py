"""Regression of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.types import Mask


def at_least_fp32(x: Tensor) -> Tensor:
    """float32 for lower precisions, unchanged otherwise."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Each channel of each sample to mean 0 and variance 1 over its tokens, without weights. (B, L, D) -> (B, L, D)."""
    x = at_least_fp32(x)
    centred = x - x.mean(1, keepdim=True)
    return centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()


def average_layers(layers: Sequence[Tensor], top_k: int, final_norm: bool = True) -> Tensor:
    """The contextualised target of data2vec 2: the last layers, instance-normalised and averaged.

    Args:
        layers: per block (B, L, D), first block first.
        top_k: how many of the last ones to average.
        final_norm: layer norm without weights over D at the end (images); without it the mean over tokens is zero.
    Returns: (B, L, D), fp32 or higher.
    Raises: ValueError if there are fewer than `top_k` layers.
    Source: arXiv:2212.07525, section 3; spec of normalisations as in the authors' code.
    """
    if not 0 < top_k <= len(layers):
        raise ValueError(f"top_k: {top_k} layers to average, the trunk has {len(layers)}")
    mean = instance_norm(layers[-top_k])
    for layer in layers[len(layers) - top_k + 1 :]:
        mean = mean + instance_norm(layer)
    mean = mean / top_k
    return F.layer_norm(mean, mean.shape[-1:]) if final_norm else mean


def data2vec_regression(prediction: Tensor, target: Tensor, mask: Mask | None = None, scale: float | None = None) -> Tensor:
    """Squared error summed over channels, averaged over masked tokens.

    Args:
        prediction: (M*B, L, D), or (M*B, D) for one vector a row; the M rows of a sample adjacent.
        target: (B, L, D) or (B, D), shared by a sample's M rows.
        mask: which tokens count, rows (M*B, L); all of them if None.
        scale: factor of the squared error; D^-0.5 if None.
    Returns: () mean over tokens of scale * |prediction - target|^2. A zero prediction of a layer-normed target scores sqrt(D).
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2212.07525, Eq. 1.
    """
    if prediction.shape[1:] != target.shape[1:] or prediction.shape[0] % target.shape[0]:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} do not fit")
    prediction, target = at_least_fp32(prediction), at_least_fp32(target)
    grouped = prediction.unflatten(0, (target.shape[0], -1))  # (B, M, ..., D)
    error = (grouped - target[:, None]).square().sum(-1).flatten(0, 1)  # (M*B, ...)
    error = error * (scale if scale is not None else prediction.shape[-1] ** -0.5)
    if mask is None:
        return error.mean()
    hidden = mask.hidden.to(error.dtype)
    return (error * hidden).sum() / hidden.sum()
