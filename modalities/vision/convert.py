"""To and from the transformers classes of the same structure: ViT, ViTMAE, Data2VecVision, which is BEiT with shared relative
positions, DINOv2 and DINOv3's ViT.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import Blocks, linears, native_shape, options, own_shape, plain, stored
from mmssl.model.positions import SinCos2d
from modalities.vision import convert_dino
from modalities.vision.convert_timm import to_timm as to_timm

NATIVE = ("vit", "vit_mae", "data2vec-vision", *convert_dino.NATIVE)
FITS = (  # what a class of transformers needs, for who asks for one
    "model.norm=pre and absolute positions without prenet (ViT), besides LayerScale or registers (DINOv2), rotary positions "
    "(DINOv3), or relative ones with LayerScale (Data2VecVision)"
)
# What `method=auto` goes on with. DINO's heads are not released, and new ones of 65 536 prototypes are not for small data.
METHODS = {"vit": "mae", "vit_mae": "mae", "data2vec-vision": "data2vec1"}
BLOCKS = Blocks(
    path="encoder.layer",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    norm1="layernorm_before",
    fc1="intermediate.dense",
    fc2="output.dense",
    norm2="layernorm_after",
)
NAMES = {"transformer.extra.tokens": "embeddings.cls_token"}
NAMES |= linears("features.proj", "embeddings.patch_embeddings.projection") | linears("transformer.norm", "layernorm")
PLACES = "embeddings.position_embeddings"


def to_native(
    config: MmsslConfig, weights: dict[str, Tensor], kind: Literal["vit", "vit_mae"] = "vit"
) -> tuple[Any, dict[str, Tensor]] | None:
    """A model with the same outputs for images of `image_size`; None if the encoder has another structure.

    Relative positions with LayerScale make a Data2VecVision, absolute ones without it a ViT, or a ViTMAE if asked for; with it,
    or with registers, a DINOv2, and rotary ones a DINOv3. ViT's pooler, which has no counterpart, is the identity, so that
    `pooler_output` is cls. A ViTMAE hides patches also in use.
    """
    extra = options(config)
    relative, scaled = extra.positions == "relative", config.layer_scale > 0
    if extra.positions == "none" or extra.palette:
        return None
    beyond = scaled or config.extra_tokens > 1 or config.activation == "swiglu"  # what a ViT can hold
    dino = extra.positions == "rotary" or (beyond and not relative)
    if not dino and (config.norm != "pre" or config.extra_tokens != 1 or relative != scaled or not plain(config)):
        return None
    shape = {"image_size": extra.image_size, "patch_size": extra.patch_size, "num_channels": extra.channels}
    shape |= native_shape(config) | {"pooling": config.pooling}  # the last is ours, and read by nobody else
    if dino:
        return convert_dino.to_native(config, shape, weights)
    return _to_data2vec(config, shape, weights) if relative else _to_vit(config, shape, weights, kind)


def _to_vit(
    config: MmsslConfig, shape: dict[str, Any], weights: dict[str, Tensor], kind: Literal["vit", "vit_mae"]
) -> tuple[Any, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTMAEConfig

    found = BLOCKS.to_theirs(weights, NAMES, config.depth)
    cls = found["embeddings.cls_token"]
    found[PLACES] = torch.cat([torch.zeros_like(cls), weights["positions.table"]], dim=1)
    if kind == "vit_mae":
        return ViTMAEConfig(**shape), found
    bias = found["layernorm.bias"]
    found |= {"pooler.dense.weight": torch.eye(len(bias)).to(bias), "pooler.dense.bias": torch.zeros_like(bias)}
    return ViTConfig(**shape, pooler_act="linear"), found


def _to_data2vec(config: MmsslConfig, shape: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Its keys have no bias; ours has no influence, since softmax does not see what all keys share."""
    from transformers import Data2VecVisionConfig

    native = Data2VecVisionConfig(
        **shape,
        drop_path_rate=config.drop_path,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=config.layer_scale,
        use_mean_pooling=False,
        out_indices=[config.depth - 1],
    )
    found = BLOCKS.to_theirs(weights, NAMES | _relative_names(config.depth), config.depth)
    for i in range(config.depth):
        found.pop(f"{BLOCKS.path}.{i}.{BLOCKS.qkv[1]}.bias")
    return native, found


def from_native(native: Any, weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """The shared transformer with the outputs of that model; None if it is something else."""
    if native.model_type not in NATIVE or native.num_channels not in (1, 3):
        return None
    image, patch = _side(native.image_size), _side(native.patch_size)
    if not image or not patch or image % patch:
        return None
    shape: dict[str, Any] = {"image_size": image, "patch_size": patch, "channels": native.num_channels}
    shape |= {"modality": "vision", "norm": "pre", "extra_tokens": 1, "pooling": getattr(native, "pooling", "mean")}
    if native.model_type in convert_dino.NATIVE:
        return convert_dino.from_native(native, shape, stored(native, weights))
    if native.hidden_act != "gelu":
        return None
    shape |= own_shape(native)
    return (_from_data2vec if native.model_type == "data2vec-vision" else _from_vit)(native, shape, weights)


def _from_vit(native: Any, shape: dict[str, Any], weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """Our cls has no position: its own is added to it, as theirs is in every pass."""
    if not native.qkv_bias:
        return None
    weights = stored(native, weights)
    found = BLOCKS.to_ours(weights, NAMES, native.num_hidden_layers)
    first, table = weights[PLACES].split([1, weights[PLACES].shape[1] - 1], dim=1)
    found["transformer.extra.tokens"] = found["transformer.extra.tokens"] + first
    found["positions.table"] = table.clone()
    return MmsslConfig(**shape, **_kind(table, shape["image_size"] // shape["patch_size"])), found


def _kind(table: Tensor, side: int) -> dict[str, Any]:
    """What positions those are. Fixed ones differ by roundings between those who compute them; cosines begin with 1."""
    scale = float(f"{float(table.max()):.6g}")
    if table.shape[2] % 4 == 0 and scale >= 0:
        fixed = SinCos2d(table.shape[2], (side, side), scale).table
        if torch.allclose(table.to(fixed), fixed, rtol=0, atol=1e-6 * scale):
            return {"positions": "sincos", "position_scale": scale}
    return {"positions": "learned"}


def _from_data2vec(
    native: Any, shape: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    if not native.use_shared_relative_position_bias or not native.layer_scale_init_value:
        return None
    if native.use_mean_pooling or native.use_absolute_position_embeddings or native.use_relative_position_bias:
        return None
    weights, depth = stored(native, weights), native.num_hidden_layers
    zero = torch.zeros_like(weights["layernorm.bias"])
    weights = weights | {f"{BLOCKS.path}.{i}.{BLOCKS.qkv[1]}.bias": zero for i in range(depth)}
    scales = {"positions": "relative", "layer_scale": native.layer_scale_init_value, "drop_path": native.drop_path_rate}
    return MmsslConfig(**shape, **scales), BLOCKS.to_ours(weights, NAMES | _relative_names(depth), depth)


def _relative_names(depth: int) -> dict[str, str]:
    names = {"positions.table.weight": "encoder.relative_position_bias.relative_position_bias_table"}
    for i in range(depth):
        names |= {f"transformer.blocks.{i}.scale{n}.scale": f"{BLOCKS.path}.{i}.lambda_{n}" for n in (1, 2)}
    return names


def _side(size: Any) -> int | None:
    """Of a square in pixels; None if it is none."""
    sides = {size} if isinstance(size, int) else {*size}
    return sides.pop() if len(sides) == 1 else None
