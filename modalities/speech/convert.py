"""To and from the transformers classes of the same structure: Data2VecAudio, Wav2Vec2 and HuBERT, which is Wav2Vec2 by another
name. A stack of positions makes it the first, a single convolution the second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import fused, linears, options, renamed, split
from modalities.speech.features import KERNELS, STRIDES

NATIVE = ("data2vec-audio", "wav2vec2", "hubert")
FITS = "model.alibi=false, no prenet, extra tokens or LayerScale, GELU and model.norm_eps=1e-5 (Data2VecAudio, Wav2Vec2)"
METHODS = {"data2vec-audio": "data2vec1", "wav2vec2": "wav2vec2", "hubert": "hubert"}  # of `method=auto`
QKV = ("q_proj", "k_proj", "v_proj")
OLD = {"conv.weight_g": "conv.parametrizations.weight.original0", "conv.weight_v": "conv.parametrizations.weight.original1"}


def _names(config: MmsslConfig) -> dict[str, str]:
    extra = options(config)
    names = linears("features.norm", "feature_projection.layer_norm")
    names |= linears("features.proj", "feature_projection.projection")
    names |= linears("transformer.norm" if config.norm == "pre" else "transformer.input_norm", "encoder.layer_norm")
    for i in range(len(KERNELS)):
        theirs = f"feature_extractor.conv_layers.{i}"
        conv = linears(f"features.convs.{i}", f"{theirs}.conv")
        names |= conv if extra.conv_bias else {name: conv[name] for name in conv if name.endswith("weight")}
        if i == 0 or extra.conv_norm == "layer":
            names |= linears(f"features.norms.{i}", f"{theirs}.layer_norm")
    if extra.positions == "single":
        theirs = "encoder.pos_conv_embed.conv"
        names |= {f"positions.conv.{ours}": f"{theirs}.parametrizations.weight.original{i}" for i, ours in enumerate("gv")}
        names["positions.conv.bias"] = f"{theirs}.bias"
    else:
        for i in range(extra.position_layers):
            names |= linears(f"positions.convs.{i}", f"encoder.pos_conv_embed.layers.{i}.conv")
    for i in range(config.depth):
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
    """A Data2VecAudio or Wav2Vec2 model with the same outputs; None if the encoder has another structure, ALiBi for one.

    It masks nothing, so it has no vector for masked frames: ours belongs to the method, and transformers draws one where
    `mask_time_prob` is set for fine-tuning.
    """
    from transformers import Data2VecAudioConfig, Wav2Vec2Config

    extra = options(config)
    if config.prenet_depth or config.extra_tokens or config.layer_scale or extra.alibi:
        return None
    if config.causal or config.activation != "gelu" or config.norm_kind != "layer":
        return None
    if config.norm_eps != 1e-5:
        return None  # its feature projection shares the eps of the blocks, ours is that of torch
    if extra.positions == "none" or (extra.positions == "stack" and (config.norm, extra.conv_norm) != ("post", "layer")):
        return None
    shared: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": round(config.hidden_size * config.mlp_ratio),
        "hidden_dropout": config.dropout,
        "activation_dropout": 0.0,
        "attention_dropout": config.attention_dropout,
        "feat_proj_dropout": 0.0,
        "layerdrop": config.layer_drop,
        "layer_norm_eps": config.norm_eps,
        "conv_dim": (extra.conv_channels,) * len(KERNELS),
        "conv_kernel": KERNELS,
        "conv_stride": STRIDES,
        "conv_bias": extra.conv_bias,
        "num_conv_pos_embedding_groups": extra.position_groups,
        "mask_time_prob": 0.0,
    }
    if extra.positions == "stack":
        native: Any = Data2VecAudioConfig(
            **shared, num_conv_pos_embeddings=extra.position_layers, conv_pos_kernel_size=extra.position_kernel
        )
    else:
        native = Wav2Vec2Config(
            **shared,
            num_conv_pos_embeddings=extra.position_kernel,
            feat_extract_norm=extra.conv_norm,
            do_stable_layer_norm=config.norm == "pre",
        )
    found = renamed(weights, _names(config))
    for i in range(config.depth):
        found |= split(weights, *_attention(i), QKV)
    return native, found


def from_native(native: Any, weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """The shared transformer with the outputs of that model; None if it is something else.

    Args:
        weights: of the model itself, or of one made of it for a task; what the task adds is left out, and so is the vector
            for masked frames, which has no counterpart in an encoder.
    """
    if native.model_type not in NATIVE or {native.hidden_act, native.feat_extract_activation} != {"gelu"}:
        return None
    if getattr(native, "add_adapter", False) or getattr(native, "adapter_attn_dim", None) is not None:
        return None
    if getattr(native, "conv_pos_batch_norm", False) or not getattr(native, "feat_proj_layer_norm", True):
        return None
    if (tuple(native.conv_kernel), tuple(native.conv_stride)) != (KERNELS, STRIDES) or len({*native.conv_dim}) != 1:
        return None
    if native.layer_norm_eps != 1e-5:
        return None
    own: dict[str, Any]
    if native.model_type == "data2vec-audio":
        own = {"position_layers": native.num_conv_pos_embeddings, "position_kernel": native.conv_pos_kernel_size}
    else:
        own = {"positions": "single", "position_kernel": native.num_conv_pos_embeddings, "conv_norm": native.feat_extract_norm}
        own["norm"] = "pre" if native.do_stable_layer_norm else "post"
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
        conv_bias=native.conv_bias,
        position_groups=native.num_conv_pos_embedding_groups,
        alibi=False,
        **own,
    )
    weights = _current(weights, native.model_type)
    found = renamed(weights, {theirs: ours for ours, theirs in _names(config).items()})
    for i in range(config.depth):
        found |= fused(weights, *_attention(i), QKV)
    return config, found


def _current(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Named as in the bare model today: tasks put a prefix before it, and older files name weight norm's tensors otherwise."""
    current = {}
    for name, tensor in weights.items():
        name = name.removeprefix(f"{kind.replace('-', '_')}.")
        for old, new in OLD.items():
            name = name.replace(old, new)
        current[name] = tensor
    return current
