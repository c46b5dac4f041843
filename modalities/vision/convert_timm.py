"""To timm: its VisionTransformer, and its ResNet, by the names of their weights and the arguments of its constructors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import linears, options, plain, renamed

VIT = "vit_base_patch16_224"  # its constructor takes any shape as arguments
RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def to_timm(config: MmsslConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`architecture`, `model_args` and `global_pool` for `timm.create_model`, and weights under timm's names.

    Raises: ValueError that says what timm has no place for.
    """
    return _resnet(config, weights) if config.backbone else _vit(config, weights)


def _vit(config: MmsslConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Extra tokens are cls and registers there too, and have no positions."""
    extra = options(config)
    wrong = {
        "norm": config.norm != "pre",
        "positions": extra.positions not in ("sincos", "learned"),
        "palette": bool(extra.palette),
        "norm_eps": config.norm_eps > 1e-6,  # of timm; a smaller one differs by less than fp32 shows
        "activation, norm_kind, prenet_depth or causal": not plain(config),
    }
    if found := [name for name, unlike in wrong.items() if unlike]:
        raise ValueError(
            f"timm's VisionTransformer has another structure than this encoder (model.{', model.'.join(found)}): it is a "
            "pre-norm ViT with absolute positions, GELU and norm_eps=1e-6"
        )
    arguments: dict[str, Any] = {
        "img_size": extra.image_size,
        "patch_size": extra.patch_size,
        "in_chans": extra.channels,
        "embed_dim": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "class_token": config.extra_tokens > 0,
        "reg_tokens": max(config.extra_tokens - 1, 0),
        "no_embed_class": True,
        "init_values": config.layer_scale or None,
        "fc_norm": False,
    }
    pool = "token" if config.pooling == "cls" else "avg"
    names = linears("features.proj", "patch_embed.proj") | linears("transformer.norm", "norm")
    names["positions.table"] = "pos_embed"
    for i in range(config.depth):
        ours, theirs = f"transformer.blocks.{i}", f"blocks.{i}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= linears(f"{ours}.{part}", f"{theirs}.{part}")
        if config.layer_scale:
            names |= {f"{ours}.scale{n}.scale": f"{theirs}.ls{n}.gamma" for n in (1, 2)}
    found = renamed(weights, names)
    if config.extra_tokens:
        tokens = weights["transformer.extra.tokens"]
        found |= {"cls_token": tokens[:, :1].clone()}
        found |= {"reg_token": tokens[:, 1:].clone()} if config.extra_tokens > 1 else {}
    return {"architecture": VIT, "global_pool": pool, "model_args": arguments | {"global_pool": pool}}, found


def _resnet(config: MmsslConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of transformers, which strides in the 3 x 3 convolution as timm does."""
    own: dict[str, Any] = dict(config.backbone or {})
    kind = str(own.get("layer_type"))
    known: Any = RESNETS.get((kind, tuple(own.get("depths", ())))) if own["model_type"] == "resnet" else None
    usual = known and own["hidden_sizes"] == WIDTHS[kind] and own["embedding_size"] == 64 and own["hidden_act"] == "relu"
    if not usual or config.stem == "small" or own.get("downsample_in_first_stage") or own.get("downsample_in_bottleneck"):
        raise ValueError(
            f"of models of transformers only ResNets of {', '.join(RESNETS.values())} with their usual stem have a counterpart "
            f"in timm, this is another {own['model_type']}"
        )
    names: dict[str, str] = {}

    def same(ours: str, conv: str, norm: str) -> None:
        names[f"{ours}.convolution.weight"] = f"{conv}.weight"
        names.update({f"{ours}.normalization.{part}": f"{norm}.{part}" for part in STATISTICS})

    same("model.embedder.embedder", "conv1", "bn1")
    for stage, depth in enumerate(own["depths"]):
        for i in range(depth):
            ours, theirs = f"model.encoder.stages.{stage}.layers.{i}", f"layer{stage + 1}.{i}"
            for k in range(3 if kind == "bottleneck" else 2):
                same(f"{ours}.layer.{k}", f"{theirs}.conv{k + 1}", f"{theirs}.bn{k + 1}")
            if f"{ours}.shortcut.convolution.weight" in weights:
                same(f"{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    arguments = {"in_chans": own["num_channels"]}
    return {"architecture": known, "global_pool": "avg", "model_args": arguments}, renamed(weights, names)
