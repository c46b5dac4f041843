"""To and from the transformers class of the same structure: Data2VecAudio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import fused, linears, options, renamed, split
from modalities.speech.features import KERNELS, STRIDES

NATIVE = ("data2vec-audio",)
QKV = ("q_proj", "k_proj", "v_proj")


def _names(depth: int, positions: int) -> dict[str, str]:
    names = linears("features.norm", "feature_projection.layer_norm")
    names |= linears("features.proj", "feature_projection.projection")
    names |= linears("transformer.input_norm", "encoder.layer_norm")
    for i in range(len(KERNELS)):
        names[f"features.convs.{i}.weight"] = f"feature_extractor.conv_layers.{i}.conv.weight"
        names |= linears(f"features.norms.{i}", f"feature_extractor.conv_layers.{i}.layer_norm")
    for i in range(positions):
        names |= linears(f"positions.convs.{i}", f"encoder.pos_conv_embed.layers.{i}.conv")
    for i in range(depth):
        ours, theirs = f"transformer.blocks.{i}", f"encoder.layers.{i}"
        names |= linears(f"{ours}.attn.proj", f"{theirs}.attention.out_proj")
        names |= linears(f"{ours}.norm1", f"{theirs}.layer_norm")
        names |= linears(f"{ours}.mlp.fc1", f"{theirs}.feed_forward.intermediate_dense")
        names |= linears(f"{ours}.mlp.fc2", f"{theirs}.feed_forward.output_dense")
        names |= linears(f"{ours}.norm2", f"{theirs}.final_layer_norm")
    return names


def _attention(i: int) -> tuple[str, str]:
    return f"transformer.blocks.{i}.attn.qkv", f"encoder.layers.{i}.attention"


def to_native(config: MmsslConfig, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]] | None:
    """A Data2VecAudio model with the same outputs; None if the encoder has another structure, ALiBi for one."""
    from transformers import Data2VecAudioConfig

    extra = options(config)
    if config.norm != "post" or config.prenet_depth or config.extra_tokens or config.layer_scale or extra.alibi:
        return None
    if config.norm_eps != 1e-5:
        return None  # its feature projection shares the eps of the blocks, ours is that of torch
    native = Data2VecAudioConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=round(config.hidden_size * config.mlp_ratio),
        hidden_dropout=config.dropout,
        activation_dropout=0.0,
        attention_dropout=config.attention_dropout,
        feat_proj_dropout=0.0,
        layerdrop=config.layer_drop,
        layer_norm_eps=config.norm_eps,
        conv_dim=(extra.conv_channels,) * len(KERNELS),
        conv_kernel=KERNELS,
        conv_stride=STRIDES,
        num_conv_pos_embeddings=extra.position_layers,
        conv_pos_kernel_size=extra.position_kernel,
        num_conv_pos_embedding_groups=extra.position_groups,
        mask_time_prob=0.0,
    )
    found = renamed(weights, _names(config.depth, extra.position_layers))
    for i in range(config.depth):
        found |= split(weights, *_attention(i), QKV)
    return native, found


def from_native(native: Any, weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """The shared transformer with the outputs of that Data2VecAudio model; None if it is something else."""
    if native.model_type not in NATIVE or {native.hidden_act, native.feat_extract_activation} != {"gelu"}:
        return None
    if native.add_adapter or len({*native.conv_dim}) != 1:
        return None
    if (tuple(native.conv_kernel), tuple(native.conv_stride)) != (KERNELS, STRIDES) or native.conv_bias:
        return None
    if native.layer_norm_eps != 1e-5:
        return None
    config = MmsslConfig(
        modality="speech",
        hidden_size=native.hidden_size,
        depth=native.num_hidden_layers,
        heads=native.num_attention_heads,
        mlp_ratio=native.intermediate_size / native.hidden_size,
        extra_tokens=0,
        norm_eps=native.layer_norm_eps,
        dropout=native.hidden_dropout,
        attention_dropout=native.attention_dropout,
        input_dropout=native.hidden_dropout,
        layer_drop=native.layerdrop,
        conv_channels=native.conv_dim[0],
        position_layers=native.num_conv_pos_embeddings,
        position_kernel=native.conv_pos_kernel_size,
        position_groups=native.num_conv_pos_embedding_groups,
        alibi=False,
    )
    names = _names(config.depth, native.num_conv_pos_embeddings)
    found = renamed(weights, {theirs: ours for ours, theirs in names.items()})
    for i in range(config.depth):
        found |= fused(weights, *_attention(i), QKV)
    return config, found
