"""To and from the transformers class of the same structure: RoBERTa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import fused, linears, options, renamed, split

NATIVE = ("roberta", "data2vec-text")


def _names(depth: int) -> dict[str, str]:
    names = {
        "features.tokens.weight": "embeddings.word_embeddings.weight",
        "features.places.weight": "embeddings.position_embeddings.weight",
    } | linears("features.norm", "embeddings.LayerNorm")
    for i in range(depth):
        ours, theirs = f"transformer.blocks.{i}", f"encoder.layer.{i}"
        names |= linears(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")
        names |= linears(f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
        names |= linears(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
        names |= linears(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
        names |= linears(f"{ours}.norm2", f"{theirs}.output.LayerNorm")
    return names


def _attention(i: int) -> tuple[str, str]:
    return f"transformer.blocks.{i}.attn.qkv", f"encoder.layer.{i}.attention.self"


def to_native(config: MmsslConfig, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]] | None:
    """A RoBERTa with the same outputs; None if the encoder has another structure.

    Its pooler, which has no counterpart, is the identity, so that `pooler_output` is tanh of the first token.
    """
    from transformers import RobertaConfig

    if config.norm != "post" or config.prenet_depth or config.extra_tokens or config.layer_scale:
        return None
    extra = options(config)
    native = RobertaConfig(
        vocab_size=extra.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=round(config.hidden_size * config.mlp_ratio),
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        max_position_embeddings=extra.max_tokens + extra.pad_token_id + 1,
        type_vocab_size=1,
        layer_norm_eps=config.norm_eps,
        pad_token_id=extra.pad_token_id,
        bos_token_id=extra.bos_token_id,
        eos_token_id=extra.eos_token_id,
    )
    found = renamed(weights, _names(config.depth))
    for i in range(config.depth):
        found |= split(weights, *_attention(i), ("query", "key", "value"))
    eye = torch.eye(config.hidden_size)
    found |= {"embeddings.token_type_embeddings.weight": torch.zeros(1, config.hidden_size)}
    found |= {"pooler.dense.weight": eye, "pooler.dense.bias": torch.zeros(config.hidden_size)}
    return native, found


def from_native(native: Any, weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """The shared transformer with the outputs of that RoBERTa; None if it is something else."""
    if native.model_type not in NATIVE or native.hidden_act != "gelu" or getattr(native, "is_decoder", False):
        return None
    config = MmsslConfig(
        modality="text",
        hidden_size=native.hidden_size,
        depth=native.num_hidden_layers,
        heads=native.num_attention_heads,
        mlp_ratio=native.intermediate_size / native.hidden_size,
        extra_tokens=0,
        norm_eps=native.layer_norm_eps,
        dropout=native.hidden_dropout_prob,
        attention_dropout=native.attention_probs_dropout_prob,
        input_dropout=native.hidden_dropout_prob,
        vocab_size=native.vocab_size,
        pad_token_id=native.pad_token_id,
        bos_token_id=native.bos_token_id,
        eos_token_id=native.eos_token_id,
        max_tokens=native.max_position_embeddings - native.pad_token_id - 1,
    )
    found = renamed(weights, {theirs: ours for ours, theirs in _names(config.depth).items()})
    kind = weights["embeddings.token_type_embeddings.weight"][0]  # all tokens are of the first kind
    found["features.tokens.weight"] = found["features.tokens.weight"] + kind
    for i in range(config.depth):
        found |= fused(weights, *_attention(i), ("query", "key", "value"))
    return config, found
