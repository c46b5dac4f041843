"""To and from DINOv2, without and with registers, and DINOv3's ViT.

What masked patches are replaced by in their training has no counterpart in an encoder: ours belongs to the method, and theirs
is zero after an export, as transformers begins it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import Blocks, linears, plain

NATIVE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
BLOCKS_2 = Blocks(
    path="encoder.layer",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    norm1="norm1",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    norm2="norm2",
)
GATED_2 = BLOCKS_2._replace(fc1="mlp.weights_in", fc2="mlp.weights_out")
BLOCKS_3 = Blocks(
    path="layer",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    norm1="norm1",
    fc1="mlp.up_proj",
    fc2="mlp.down_proj",
    norm2="norm2",
)
GATE, CLS, REGISTERS = "mlp.gate_proj", "embeddings.cls_token", "embeddings.register_tokens"
MASK, PLACES = "embeddings.mask_token", "embeddings.position_embeddings"


def to_native(config: MmsslConfig, shape: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]] | None:
    """A model with the same outputs: DINOv3's with rotary positions, else DINOv2's; None if neither has the structure.

    Blocks without LayerScale get one of ones. Dropout after blocks, which theirs do not have, is left out.

    Args:
        shape: what configs of ViT call image, patches, channels, depth and dropout.
    """
    gated = config.activation == "swiglu"
    if config.norm != "pre" or not config.extra_tokens or not plain(config, ("gelu", "swiglu")):
        return None
    shape = shape | {"layerscale_value": config.layer_scale or 1.0, "drop_path_rate": config.drop_path}
    hidden, ones = shape.pop("intermediate_size"), torch.ones_like(weights["transformer.norm.weight"])
    for name in _scale_names("", config.depth):
        weights = weights | {name: weights.get(name, ones)}
    first = {MASK: torch.zeros_like(ones)}
    extra = weights["transformer.extra.tokens"]
    first |= {CLS: extra[:, :1].clone()} | ({REGISTERS: extra[:, 1:].clone()} if config.extra_tokens > 1 else {})
    if "positions.table" not in weights:
        shape |= {"intermediate_size": hidden, "use_gated_mlp": gated, "num_register_tokens": config.extra_tokens - 1}
        return _to_3(config, shape, weights, first, gated)
    return _to_2(config, shape, weights, first, hidden)


def _to_2(
    config: MmsslConfig, shape: dict[str, Any], weights: dict[str, Tensor], first: dict[str, Tensor], hidden: int
) -> tuple[Any, dict[str, Tensor]] | None:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    gated = config.activation == "swiglu"
    ratio = _ratio_2(hidden, config.hidden_size, gated)
    if ratio is None:
        return None
    shape = shape | {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "qkv_bias": True, "hidden_dropout_prob": config.input_dropout}
    found = _blocks_2(gated).to_theirs(weights, _names_2(config.depth), config.depth) | first
    found[MASK] = first[MASK][None]
    found[PLACES] = torch.cat([torch.zeros_like(first[CLS]), weights["positions.table"]], dim=1)
    if config.extra_tokens == 1:
        return Dinov2Config(**shape), found
    return Dinov2WithRegistersConfig(**shape, num_register_tokens=config.extra_tokens - 1), found


def _to_3(
    config: MmsslConfig, shape: dict[str, Any], weights: dict[str, Tensor], first: dict[str, Tensor], gated: bool
) -> tuple[Any, dict[str, Tensor]]:
    """A key's bias matters where keys turn; without one theirs has none, as released."""
    from transformers import DINOv3ViTConfig

    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        shape.pop(name)
    found = BLOCKS_3.to_theirs(weights, _names_3(config.depth), config.depth) | first
    found[MASK] = first[MASK][None, None]
    found.setdefault(REGISTERS, first[CLS][:, :0])
    keys = [f"{BLOCKS_3.path}.{i}.{BLOCKS_3.qkv[1]}.bias" for i in range(config.depth)]
    key_bias = any(bool(found[name].any()) for name in keys)
    for i, name in enumerate(keys):
        for part in ("query", "key"):
            _swap(found, f"{BLOCKS_3.path}.{i}.{BLOCKS_3.qkv[part == 'key']}", config.heads)
        if gated:
            for part in ("weight", "bias"):
                up = f"{BLOCKS_3.path}.{i}.{BLOCKS_3.fc1}.{part}"
                gate, found[up] = (half.clone() for half in found[up].chunk(2))
                found[f"{BLOCKS_3.path}.{i}.{GATE}.{part}"] = gate
        if not key_bias:
            del found[name]
    return DINOv3ViTConfig(
        **shape,
        attention_dropout=config.attention_dropout,
        hidden_act="silu" if gated else "gelu",
        key_bias=key_bias,
        rope_theta=getattr(config, "rotary_base", 100.0),
        pos_embed_rescale=None,  # places are not stretched in our training
    ), found


def from_native(native: Any, shape: dict[str, Any], weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """The shared transformer with the outputs of that model; None if it is a variant without one.

    DINOv2 with registers interpolates positions for smaller images with a low-pass, ours without.

    Args:
        shape: ours, of image, patches and channels; the rest is added here.  weights: named as in files.
    """
    if not native.layerscale_value:
        return None
    registers = getattr(native, "num_register_tokens", 0)
    shape = shape | {
        "hidden_size": native.hidden_size,
        "depth": native.num_hidden_layers,
        "heads": native.num_attention_heads,
        "norm_eps": native.layer_norm_eps,
        "layer_scale": native.layerscale_value,
        "drop_path": native.drop_path_rate,
        "extra_tokens": 1 + registers,
    }
    tokens = [weights[CLS]] + ([weights[REGISTERS]] if registers else [])
    return (_from_3 if native.model_type == "dinov3_vit" else _from_2)(native, shape, weights, tokens)


def _from_2(
    native: Any, shape: dict[str, Any], weights: dict[str, Tensor], tokens: list[Tensor]
) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """Our cls has no position: its own is added to it, as theirs is in every pass."""
    if not native.qkv_bias or native.hidden_act != "gelu":
        return None
    gated, dropout = native.use_swiglu_ffn, native.hidden_dropout_prob
    found = _blocks_2(gated).to_ours(weights, _names_2(shape["depth"]), shape["depth"])
    places = weights[PLACES]
    found["positions.table"] = places[:, 1:].clone()
    found["transformer.extra.tokens"] = torch.cat([tokens[0] + places[:, :1], *tokens[1:]], dim=1)
    hidden = found["transformer.blocks.0.mlp.fc2.weight"].shape[1]
    shape |= {"positions": "learned", "mlp_ratio": hidden / native.hidden_size, "activation": "swiglu" if gated else "gelu"}
    shape |= {"dropout": 0.0, "input_dropout": dropout, "attention_dropout": native.attention_probs_dropout_prob}
    return MmsslConfig(**shape), found


def _from_3(
    native: Any, shape: dict[str, Any], weights: dict[str, Tensor], tokens: list[Tensor]
) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """Biases that theirs lack are zero."""
    gated, depth, dim = native.use_gated_mlp, native.num_hidden_layers, native.hidden_size
    if native.hidden_act != ("silu" if gated else "gelu") or dim % (4 * native.num_attention_heads):
        return None
    weights = {name.removeprefix("model."): tensor.clone() for name, tensor in weights.items()}
    for i in range(depth):
        stem = f"{BLOCKS_3.path}.{i}."
        for name in (*BLOCKS_3.qkv, BLOCKS_3.proj, BLOCKS_3.fc1, BLOCKS_3.fc2, *([GATE] if gated else [])):
            weight = weights.get(f"{stem}{name}.weight")
            if weight is not None:
                weights.setdefault(f"{stem}{name}.bias", torch.zeros_like(weight[:, 0]))
        for name in BLOCKS_3.qkv[:2]:
            _swap(weights, f"{stem}{name}", native.num_attention_heads)
        if gated:
            for part in ("weight", "bias"):
                up = f"{stem}{BLOCKS_3.fc1}.{part}"
                weights[up] = torch.cat([weights[f"{stem}{GATE}.{part}"], weights[up]])
    found = BLOCKS_3.to_ours(weights, _names_3(depth), depth)
    found["transformer.extra.tokens"] = torch.cat(tokens, dim=1)
    shape |= {"positions": "rotary", "rotary_base": native.rope_theta, "mlp_ratio": native.intermediate_size / dim}
    shape |= {"attention_dropout": native.attention_dropout, "activation": "swiglu" if gated else "gelu"}
    return MmsslConfig(**shape), found


def _swap(weights: dict[str, Tensor], name: str, heads: int) -> None:
    """Change between their order of a head's channels and ours, in place: theirs has rows and columns of both halves of a pair
    one after the other, ours both halves of rows first. It is its own inverse.
    """
    for part in ("weight", "bias"):
        value = weights[f"{name}.{part}"]
        quarters = value.unflatten(0, (heads, 4, -1))
        weights[f"{name}.{part}"] = quarters[:, [0, 2, 1, 3]].flatten(0, 2)


def _ratio_2(hidden: int, dim: int, gated: bool) -> int | None:
    """`mlp_ratio` of a DINOv2 with that many hidden units; None if there is none."""
    for ratio in range(1, 17):
        if hidden == ((int(dim * ratio * 2 / 3) + 7) // 8 * 8 if gated else dim * ratio):
            return ratio
    return None


def _blocks_2(gated: bool) -> Blocks:
    return GATED_2 if gated else BLOCKS_2


def _names_2(depth: int) -> dict[str, str]:
    names = linears("features.proj", "embeddings.patch_embeddings.projection") | linears("transformer.norm", "layernorm")
    return names | _scale_names(BLOCKS_2.path, depth)


def _names_3(depth: int) -> dict[str, str]:
    names = linears("features.proj", "embeddings.patch_embeddings") | linears("transformer.norm", "norm")
    return names | _scale_names(BLOCKS_3.path, depth)


def _scale_names(path: str, depth: int) -> dict[str, str]:
    both = [(i, n) for i in range(depth) for n in (1, 2)]
    return {f"transformer.blocks.{i}.scale{n}.scale": f"{path}.{i}.layer_scale{n}.lambda1" for i, n in both}
