"""What layouts of checkpoints that authors have published share.

A modality's `published.py` has `LAYOUTS`. Such checkpoints name weights otherwise than the encoder's own state dict does, and
say only in part how the network is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig

Told = Callable[[str, Any], Any]  # dotted path in the configuration beside the weights, type -> value, or None
Names = dict[str, tuple[str, ...]]  # ours -> theirs, of which ours is made by concatenation; "" stands for zeros
PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # of a block of data2vec 2, as of ours


class Layout(NamedTuple):
    """Checkpoints of one kind."""

    title: str
    mark: str  # how a name begins that no other layout has
    config: Callable[[Mapping[str, Tensor], Told], MmsslConfig]  # Raises: ValueError, or KeyError of a name that is missing
    names: Callable[[MmsslConfig], Names]
    idle: tuple[str, ...]  # how names begin of what only training needs
    averaged: str  # what names of the teacher's weights lack in front
    shared: tuple[str, ...]  # how names begin that the teacher may take from the student
    # (config, configuration, files by option) -> what prepares inputs, or None; a sentence about it, or ""
    prepare: Callable[[MmsslConfig, Told, Mapping[str, Path]], tuple[Any, str]]
    native: str | None = None  # model type of transformers to write, where a structure has several


def both(ours: str, theirs: str) -> Names:
    """Names of a weight and its bias."""
    return {f"{ours}.{part}": (f"{theirs}.{part}",) for part in ("weight", "bias")}


def count(tensors: Mapping[str, Tensor], stem: str) -> int:
    """Entries of a list of modules: one more than the largest number after `stem.`."""
    numbers = [name.removeprefix(f"{stem}.").split(".")[0] for name in tensors if name.startswith(f"{stem}.")]
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def heads_of(width: int) -> int:
    """As those who publish choose them: of 64 channels, of 80 in the huge one. Raises: ValueError if that does not divide."""
    size = 80 if width == 1280 else 64
    if width % size:
        raise ValueError(f"its configuration cannot be read, and a width of {width} does not tell the number of heads")
    return width // size


def data2vec2_shape(tensors: Mapping[str, Tensor], told: Told, kind: str, eps: float) -> dict[str, Any]:
    """Options of the transformer of a data2vec 2.0. Raises: ValueError if it is none that was published."""
    own, stem = f"model.modalities.{kind.lower()}", f"modality_encoders.{kind}"
    if told("model.layer_norm_first", bool):
        raise ValueError("model.layer_norm_first is true, which the authors' blocks do otherwise than any other transformer")
    width, prenet = len(tensors["blocks.0.norm1.weight"]), told(f"{own}.prenet_depth", int)
    scales = tensors.get(f"{stem}.alibi_scale")
    heads = told("model.num_heads", int) or (None if scales is None else scales.numel())
    extra = tensors.get(f"{stem}.extra_tokens")
    return {
        "hidden_size": width,
        "depth": told("model.depth", int) or count(tensors, "blocks"),
        "prenet_depth": count(tensors, f"{stem}.context_encoder.blocks") if prenet is None else prenet,
        "heads": heads or heads_of(width),
        "mlp_ratio": len(tensors["blocks.0.mlp.fc1.weight"]) / width,
        "extra_tokens": 0 if extra is None else extra.shape[1],
        "norm_eps": told("model.norm_eps", float) or eps,
        "dropout": told("model.encoder_dropout", float) or 0.0,
        "attention_dropout": told("model.attention_dropout", float) or 0.0,
        "input_dropout": told(f"{own}.prenet_dropout", float) or 0.0,
        "layer_drop": told("model.layerdrop", float) or 0.0,
    }


def data2vec2_names(config: MmsslConfig, kind: str) -> Names:
    """Of the transformer of a data2vec 2.0."""
    stem = f"modality_encoders.{kind}"
    names = {"transformer.extra.tokens": (f"{stem}.extra_tokens",)} if config.extra_tokens else {}
    if config.modality != "text" or config.prenet_depth:  # else tokens come with a norm
        names |= both("transformer.input_norm", f"{stem}.context_encoder.norm")
    for ours, theirs, depth in (
        ("prenet", f"{stem}.context_encoder.blocks", config.prenet_depth),
        ("blocks", "blocks", config.depth),
    ):
        for i in range(depth):
            for part in PARTS:
                names |= both(f"transformer.{ours}.{i}.{part}", f"{theirs}.{i}.{part}")
    return names


def data2vec2_idle(kind: str) -> tuple[str, ...]:
    """What a data2vec 2.0 has for training alone."""
    return (f"modality_encoders.{kind}.decoder.", "shared_decoder.", "recon_proj.", "classification_heads.")


def fairseq_names(config: MmsslConfig, layers: str) -> Names:
    """Of the blocks of a transformer of fairseq, whose projections are apart."""
    names: Names = {}
    for i in range(config.depth):
        ours, theirs = f"transformer.blocks.{i}", f"{layers}.{i}"
        for part in ("weight", "bias"):
            names[f"{ours}.attn.qkv.{part}"] = tuple(f"{theirs}.self_attn.{n}_proj.{part}" for n in "qkv")
        names |= both(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj")
        names |= both(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
        names |= both(f"{ours}.mlp.fc1", f"{theirs}.fc1") | both(f"{ours}.mlp.fc2", f"{theirs}.fc2")
        names |= both(f"{ours}.norm2", f"{theirs}.final_layer_norm")
    return names


def wrong(
    names: Names, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], every: Iterable[str], idle: tuple[str, ...]
) -> list[str]:
    """What keeps weights from being those of an encoder: names that are missing, that nobody knows, shapes that do not fit.

    Args:
        wanted: our name -> tensor of the right shape.
        every: names of the checkpoint, which may hold other networks beside these weights.
        idle: how names begin that may be there without being used.
    """
    found, used = [], {theirs for group in names.values() for theirs in group}
    for ours, group in names.items():
        first, *rest = wanted[ours].shape
        for theirs in filter(None, group):
            if theirs not in tensors:
                found.append(f"{theirs}: missing")
            elif _full(tensors[theirs].shape) != _full([first // len(group), *rest]):
                shape = [first // len(group), *rest]
                found.append(f"{theirs}: of shape {[*tensors[theirs].shape]}, expected {shape}")
    return found + [f"{name}: unknown" for name in every if name not in used and not name.startswith(idle)]


def gathered(names: Names, wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights, in fp32."""
    weights = {}
    for ours, group in names.items():
        size = len(wanted[ours]) // len(group)
        parts = [tensors[theirs].float() if theirs else torch.zeros(size, *wanted[ours].shape[1:]) for theirs in group]
        weights[ours] = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(wanted[ours].shape).clone()
    return weights


def _full(shape: Any) -> list[int]:
    """A shape without ones, which authors put where tensors meet others."""
    return [n for n in shape if n != 1]
