"""data2vec checkpoints for speech as their authors have published them, in fairseq's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.published import (
    Layout,
    Names,
    Told,
    both,
    count,
    data2vec2_idle,
    data2vec2_names,
    data2vec2_shape,
    fairseq_names,
    heads_of,
)
from modalities.speech.features import KERNELS
from modalities.speech.processor import processor

STEM = "modality_encoders.AUDIO"


def _features(convolutions: str, positions: str, first: int, depth: int, norm: str, proj: str) -> Names:
    """Convolutions, projection and the stack of positions, the first of which has that number."""
    names = both("features.norm", norm) | both("features.proj", proj)
    for i in range(len(KERNELS)):
        names[f"features.convs.{i}.weight"] = (f"{convolutions}.{i}.0.weight",)
        names |= both(f"features.norms.{i}", f"{convolutions}.{i}.2.1")
    for i in range(depth):
        names |= both(f"positions.convs.{i}", f"{positions}.{first + i}.0")
    return names


def _listening(tensors: Mapping[str, Tensor], convolutions: str, position: str) -> dict[str, Any]:
    """Options that the shapes of the first convolutions tell."""
    width, share, kernel = tensors[f"{position}.0.weight"].shape
    channels = len(tensors[f"{convolutions}.0.0.weight"])
    return {"conv_channels": channels, "position_kernel": kernel, "position_groups": width // share}


def _config2(tensors: Mapping[str, Tensor], told: Told) -> MmsslConfig:
    positions = f"{STEM}.relative_positional_encoder"
    return MmsslConfig(
        modality="speech",
        position_layers=count(tensors, positions) - 1,
        alibi=f"{STEM}.alibi_scale" in tensors,
        **_listening(tensors, f"{STEM}.local_encoder.conv_layers", f"{positions}.1"),
        **data2vec2_shape(tensors, told, "AUDIO", eps=1e-5),
    )


def _names2(config: MmsslConfig) -> Names:
    features = f"{STEM}.project_features"
    names = _features(
        f"{STEM}.local_encoder.conv_layers",
        f"{STEM}.relative_positional_encoder",
        1,
        config.position_layers,
        f"{features}.1",
        f"{features}.2",
    )
    names |= {"positions.bias.scale": (f"{STEM}.alibi_scale",)} if config.alibi else {}
    return names | data2vec2_names(config, "AUDIO")


def _config1(tensors: Mapping[str, Tensor], told: Told) -> MmsslConfig:
    if told("model.layer_norm_first", bool):
        raise ValueError("model.layer_norm_first is true; data2vec was published with norms after each sum")
    width = len(tensors["post_extract_proj.weight"])
    dropout = told("model.dropout", float) or 0.0
    return MmsslConfig(
        modality="speech",
        hidden_size=width,
        depth=told("model.encoder_layers", int) or count(tensors, "encoder.layers"),
        heads=told("model.encoder_attention_heads", int) or heads_of(width),
        mlp_ratio=len(tensors["encoder.layers.0.fc1.weight"]) / width,
        extra_tokens=0,
        norm_eps=1e-5,
        dropout=dropout,
        input_dropout=dropout,
        attention_dropout=told("model.attention_dropout", float) or 0.0,
        layer_drop=told("model.encoder_layerdrop", float) or 0.0,
        position_layers=count(tensors, "encoder.pos_conv"),
        alibi=False,
        **_listening(tensors, "feature_extractor.conv_layers", "encoder.pos_conv.0"),
    )


def _names1(config: MmsslConfig) -> Names:
    convolutions, positions = "feature_extractor.conv_layers", "encoder.pos_conv"
    names = _features(convolutions, positions, 0, config.position_layers, "layer_norm", "post_extract_proj")
    return names | both("transformer.input_norm", "encoder.layer_norm") | fairseq_names(config, "encoder.layers")


def _prepare(config: MmsslConfig, told: Told, files: Mapping[str, Path]) -> tuple[Any, str]:
    """Waves are normalised, as all of data2vec's pretraining does, unless the file says otherwise."""
    normalise = told("task.normalize", bool) is not False
    return processor(config, SimpleNamespace(normalise=normalise, repeats=False)), ""


LAYOUTS = (
    Layout(
        "data2vec 2.0, speech",
        f"{STEM}.",
        _config2,
        _names2,
        data2vec2_idle("AUDIO"),
        "",
        (f"{STEM}.local_encoder.", f"{STEM}.project_features."),
        _prepare,
    ),
    Layout(
        "data2vec 1, speech",
        "feature_extractor.conv_layers.",
        _config1,
        _names1,
        ("mask_emb", "final_proj."),
        "encoder.",
        ("feature_extractor.", "layer_norm.", "post_extract_proj.", "encoder.pos_conv.", "encoder.layer_norm."),
        _prepare,
    ),
)
