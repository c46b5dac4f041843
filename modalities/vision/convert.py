"""To and from the transformers class of the same structure: Data2VecVision, which is BEiT with shared relative positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import fused, linears, options, renamed, split

NATIVE = ("data2vec-vision",)
QKV = ("query", "key", "value")


def _names(depth: int) -> dict[str, str]:
    names = {"transformer.extra.tokens": "embeddings.cls_token"}
    names |= {"positions.table.weight": "encoder.relative_position_bias.relative_position_bias_table"}
    names |= linears("features.proj", "embeddings.patch_embeddings.projection") | linears("transformer.norm", "layernorm")
    for i in range(depth):
        ours, theirs = f"transformer.blocks.{i}", f"encoder.layer.{i}"
        names |= linears(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")
        names |= linears(f"{ours}.norm1", f"{theirs}.layernorm_before")
        names |= linears(f"{ours}.norm2", f"{theirs}.layernorm_after")
        names |= linears(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
        names |= linears(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
        names |= {f"{ours}.scale{n}.scale": f"{theirs}.lambda_{n}" for n in (1, 2)}
    return names


def _attention(i: int) -> tuple[str, str]:
    return f"transformer.blocks.{i}.attn.qkv", f"encoder.layer.{i}.attention.attention"


def to_native(config: MmsslConfig, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]] | None:
    """A Data2VecVision model with the same outputs; None if the encoder has another structure.

    Its keys have no bias; ours has no influence, since softmax does not see what all keys share.
    """
    from transformers import Data2VecVisionConfig

    extra = options(config)
    same = config.norm == "pre" and not config.prenet_depth and config.extra_tokens == 1 and config.layer_scale > 0
    if not same or extra.positions != "relative":
        return None
    native = Data2VecVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=round(config.hidden_size * config.mlp_ratio),
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        drop_path_rate=config.drop_path,
        layer_norm_eps=config.norm_eps,
        image_size=extra.image_size,
        patch_size=extra.patch_size,
        num_channels=extra.channels,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=config.layer_scale,
        use_mean_pooling=False,
        out_indices=[config.depth - 1],
    )
    found = renamed(weights, _names(config.depth))
    for i in range(config.depth):
        found |= split(weights, *_attention(i), QKV)
        found.pop(f"{_attention(i)[1]}.key.bias")
    return native, found


def from_native(native: Any, weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """The shared transformer with the outputs of that Data2VecVision model; None if it is something else."""
    if native.model_type not in NATIVE or native.hidden_act != "gelu" or not native.use_shared_relative_position_bias:
        return None
    if native.use_mean_pooling or native.use_absolute_position_embeddings or native.use_relative_position_bias:
        return None
    if not native.layer_scale_init_value:
        return None
    config = MmsslConfig(
        modality="vision",
        hidden_size=native.hidden_size,
        depth=native.num_hidden_layers,
        heads=native.num_attention_heads,
        mlp_ratio=native.intermediate_size / native.hidden_size,
        norm="pre",
        extra_tokens=1,
        norm_eps=native.layer_norm_eps,
        dropout=native.hidden_dropout_prob,
        attention_dropout=native.attention_probs_dropout_prob,
        drop_path=native.drop_path_rate,
        input_dropout=native.hidden_dropout_prob,
        layer_scale=native.layer_scale_init_value,
        image_size=native.image_size,
        patch_size=native.patch_size,
        channels=native.num_channels,
        positions="relative",
    )
    found = renamed(weights, {theirs: ours for ours, theirs in _names(config.depth).items()})
    for i in range(config.depth):
        ours, theirs = _attention(i)
        found |= fused(weights | {f"{theirs}.key.bias": weights[f"{theirs}.query.bias"] * 0}, ours, theirs, QKV)
    return config, found
