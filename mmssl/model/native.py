"""What conversions to and from transformers classes share.

A modality's `convert.py` has `NATIVE` (the model types it knows), `to_native(config, weights)` and `from_native(config,
weights)`; weights are named as in the encoder's, or the model's, own state dict. Both give None where structures differ.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import feature_class


def options(config: MmsslConfig) -> SimpleNamespace:
    """The options of the config's modality, with its feature encoder's defaults where the config has none."""
    parameters = inspect.signature(feature_class(config.modality)).parameters
    return SimpleNamespace(**{name: getattr(config, name, parameter.default) for name, parameter in parameters.items()})


def linears(ours: str, theirs: str) -> dict[str, str]:
    """Names of a weight and its bias: ours -> theirs."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The weights that `names` lists, under their other names. Raises: ValueError if one is missing."""
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    return {other: weights[name] for name, other in names.items()}


def split(weights: dict[str, Tensor], ours: str, theirs: str, qkv: tuple[str, str, str]) -> dict[str, Tensor]:
    """A fused projection as three."""
    return {
        f"{theirs}.{name}.{part}": piece.clone()
        for part in ("weight", "bias")
        for name, piece in zip(qkv, weights[f"{ours}.{part}"].chunk(3))
    }


def fused(weights: dict[str, Tensor], ours: str, theirs: str, qkv: tuple[str, str, str]) -> dict[str, Tensor]:
    """Three projections as one."""
    return {f"{ours}.{part}": torch.cat([weights[f"{theirs}.{name}.{part}"] for name in qkv]) for part in ("weight", "bias")}
