"""What conversions to and from transformers classes share.

A modality's `convert.py` has `NATIVE` (the model types it knows), `to_native(config, weights)` and `from_native(config,
weights)`; weights are named as in the encoder's own state dict, theirs as in files. Both give None where structures differ.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import feature_class


class Blocks(NamedTuple):
    """What a class of transformers calls its list of blocks, and the parts of a block."""

    path: str
    qkv: tuple[str, str, str]
    proj: str
    norm1: str
    fc1: str
    fc2: str
    norm2: str

    def names(self, depth: int) -> dict[str, str]:
        """Ours -> theirs, but for the projections that ours fuse."""
        parts = {"attn.proj": self.proj, "norm1": self.norm1, "mlp.fc1": self.fc1, "mlp.fc2": self.fc2, "norm2": self.norm2}
        names = {}
        for i in range(depth):
            for ours, theirs in parts.items():
                names |= linears(f"transformer.blocks.{i}.{ours}", f"{self.path}.{i}.{theirs}")
        return names

    def to_theirs(self, weights: dict[str, Tensor], names: dict[str, str], depth: int) -> dict[str, Tensor]:
        """Our weights under their names: those of the blocks, and those that `names` lists, ours -> theirs."""
        found = renamed(weights, names | self.names(depth))
        for i in range(depth):
            found |= split(weights, f"transformer.blocks.{i}.attn.qkv", f"{self.path}.{i}", self.qkv)
        return found

    def to_ours(self, weights: dict[str, Tensor], names: dict[str, str], depth: int) -> dict[str, Tensor]:
        """The inverse of `to_theirs`; `names` is ours -> theirs here too."""
        found = renamed(weights, {theirs: ours for ours, theirs in (names | self.names(depth)).items()})
        for i in range(depth):
            found |= fused(weights, f"transformer.blocks.{i}.attn.qkv", f"{self.path}.{i}", self.qkv)
        return found


def options(config: MmsslConfig) -> SimpleNamespace:
    """The options of the config's modality, with its feature encoder's defaults where the config has none."""
    parameters = inspect.signature(feature_class(config.modality)).parameters
    return SimpleNamespace(**{name: getattr(config, name, parameter.default) for name, parameter in parameters.items()})


def plain(config: MmsslConfig, activations: tuple[str, ...] = ("gelu",)) -> bool:
    """Whether the blocks are those of most encoders: nothing before them, every token sees all, layer norm, exact GELU."""
    usual = config.activation in activations and config.norm_kind == "layer"
    return usual and not config.prenet_depth and not config.causal


def native_shape(config: MmsslConfig) -> dict[str, Any]:
    """What configs of BERT, ViT and their kin call the shape of our transformer."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": round(config.hidden_size * config.mlp_ratio),
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def own_shape(native: Any) -> dict[str, Any]:
    """The inverse of `native_shape`; their features have the dropout of their blocks."""
    return {
        "hidden_size": native.hidden_size,
        "depth": native.num_hidden_layers,
        "heads": native.num_attention_heads,
        "mlp_ratio": native.intermediate_size / native.hidden_size,
        "norm_eps": native.layer_norm_eps,
        "dropout": native.hidden_dropout_prob,
        "attention_dropout": native.attention_probs_dropout_prob,
        "input_dropout": native.hidden_dropout_prob,
    }


def stored(native: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the bare model of that config, named as in files.

    Names in memory are those of a version of transformers, names in files last. A task's model has the bare one under a prefix.
    """
    from transformers import AutoModel
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModel.from_config(native)
    prefix, known = f"{model.base_model_prefix}.", model.state_dict().keys()
    bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return revert_weight_conversion(model, max(weights, bare, key=lambda held: len(held.keys() & known)))


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
    """Three projections as one. Raises: ValueError if one is missing."""
    three = {part: renamed(weights, {f"{theirs}.{name}.{part}": name for name in qkv}) for part in ("weight", "bias")}
    return {f"{ours}.{part}": torch.cat([*pieces.values()]) for part, pieces in three.items()}
