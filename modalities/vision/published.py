"""data2vec checkpoints for images as their authors have published them: 2.0 in fairseq's layout, 1 in BEiT's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.positions import SinCos2d
from mmssl.model.published import (
    PARTS,
    Layout,
    Names,
    Told,
    both,
    count,
    data2vec2_idle,
    data2vec2_names,
    data2vec2_shape,
)
from modalities.vision.processor import processor
from modalities.vision.views import IMAGENET_MEAN, IMAGENET_STD

STEM = "modality_encoders.IMAGE"
POSITIONS = f"{STEM}.fixed_positional_encoder.positions"
RELATIVE = "rel_pos_bias.relative_position_bias_table"


def _config2(tensors: Mapping[str, Tensor], told: Told) -> MmsslConfig:
    _, channels, patch, _ = tensors[f"{STEM}.local_encoder.proj.weight"].shape
    table = tensors[POSITIONS]
    side = math.isqrt(table.shape[1])
    fixed = SinCos2d(table.shape[2], (side, side)).table
    # Half precision may have rounded the table; its own numbers are kept.
    known = table.shape == fixed.shape and torch.allclose(table.float(), fixed, rtol=0, atol=5e-3)
    return MmsslConfig(
        modality="vision",
        image_size=side * patch,
        patch_size=patch,
        channels=channels,
        positions="sincos" if known else "learned",
        **data2vec2_shape(tensors, told, "IMAGE", eps=1e-6),
    )


def _names2(config: MmsslConfig) -> Names:
    names = both("features.proj", f"{STEM}.local_encoder.proj") | {"positions.table": (POSITIONS,)}
    return names | data2vec2_names(config, "IMAGE")


def _config1(tensors: Mapping[str, Tensor], told: Told) -> MmsslConfig:
    if "blocks.0.attn.relative_position_bias_table" in tensors:
        raise ValueError("each block has relative positions of its own, as after fine-tuning; convert the pretrained one")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    places, heads = tensors[RELATIVE].shape
    side = (math.isqrt(places - 3) + 1) // 2  # (2 side - 1)^2 pairs, and three with cls
    return MmsslConfig(
        modality="vision",
        hidden_size=width,
        depth=count(tensors, "blocks"),
        heads=heads,
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / width,
        norm="pre",
        extra_tokens=1,
        layer_scale=0.1,  # says that there are scales; theirs are in the weights
        image_size=side * patch,
        patch_size=patch,
        channels=channels,
        positions="relative",
    )


def _names1(config: MmsslConfig) -> Names:
    names = both("features.proj", "patch_embed.proj") | both("transformer.norm", "norm")
    names |= {"transformer.extra.tokens": ("cls_token",), "positions.table.weight": (RELATIVE,)}
    for i in range(config.depth):
        ours, theirs = f"transformer.blocks.{i}", f"blocks.{i}"
        for part in PARTS:
            names |= both(f"{ours}.{part}", f"{theirs}.{part}")
        names[f"{ours}.attn.qkv.bias"] = (f"{theirs}.attn.q_bias", "", f"{theirs}.attn.v_bias")  # keys have none
        names |= {f"{ours}.scale{n}.scale": (f"{theirs}.gamma_{n}",) for n in (1, 2)}
    return names


def _prepare(config: MmsslConfig, mean: Any, std: Any) -> tuple[Any, str]:
    statistics = {"mean": 255 * torch.tensor(mean), "std": 255 * torch.tensor(std)}
    return processor(config, SimpleNamespace(**statistics)), ""


def _prepare2(config: MmsslConfig, told: Told, files: Mapping[str, Path]) -> tuple[Any, str]:
    channels = config.channels
    return _prepare(config, IMAGENET_MEAN[:channels], IMAGENET_STD[:channels])


def _prepare1(config: MmsslConfig, told: Told, files: Mapping[str, Path]) -> tuple[Any, str]:
    """Pixels from -1 to 1 as in BEiT, unless the file says that it was trained with ImageNet's."""
    if told("args.imagenet_default_mean_and_std", bool):
        return _prepare2(config, told, files)
    half = (0.5,) * config.channels
    return _prepare(config, half, half)


LAYOUTS = (
    Layout("data2vec 2.0, images", f"{STEM}.", _config2, _names2, data2vec2_idle("IMAGE"), "", (), _prepare2),
    Layout(
        "data2vec 1, images",
        "patch_embed.",
        _config1,
        _names1,
        ("mask_token", "lm_head.", "rel_pos_bias.relative_position_index", "head.", "fc_norm."),
        "",
        (),
        _prepare1,
    ),
)
