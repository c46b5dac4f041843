"""Feature encoder of a modality and shared transformer, in one."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import Tensor, nn

from mmssl.model.configuration import MmsslConfig
from mmssl.model.transformer import Transformer
from mmssl.types import Encoded, Mask, View

FEATURES: dict[str, type[nn.Module]] = {}


def features_of(modality: str):
    """Class decorator: the feature encoder of a modality.

    Such a module takes `dim` and its own options, has `input_name` (the model's keyword), `length` (L), `grid` (the shape
    of its tokens) and `positions()` (a module that adds positions and keeps visible tokens), and maps View.x to (B, L, D).
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        FEATURES[modality] = cls
        return cls

    return register


def feature_class(modality: str) -> type[nn.Module]:
    """The feature encoder of a modality; its package is imported if need be. Raises: ValueError if there is none."""
    if modality not in FEATURES:
        for point in entry_points(group="mmssl.modalities", name=modality):
            point.load()
    if modality not in FEATURES:
        raise ValueError(f"modality: {modality!r} is not installed")
    return FEATURES[modality]


class Encoder(nn.Module):
    """View -> Encoded."""

    def __init__(self, features: Any, transformer: Transformer, modality: str, pooling: Literal["mean", "cls"] = "mean"):
        super().__init__()
        if pooling == "cls" and not transformer.extra_tokens:
            raise ValueError("pooling: 'cls' needs extra_tokens of at least 1")
        self.features, self.positions, self.transformer = features, features.positions(), transformer
        self.modality, self.pooling, self.dim = modality, pooling, features.dim
        self.config: MmsslConfig | None = None

    @classmethod
    def from_config(cls, config: MmsslConfig) -> Encoder:
        """Build with fresh weights. Raises: ValueError that begins with the option that is wrong."""
        kind = feature_class(config.modality)
        options = {name: getattr(config, name) for name in inspect.signature(kind).parameters if hasattr(config, name)}
        transformer = Transformer(
            config.hidden_size,
            config.depth,
            config.heads,
            config.prenet_depth,
            config.mlp_ratio,
            config.norm,
            config.extra_tokens,
            config.norm_eps,
            config.dropout,
            config.attention_dropout,
            config.drop_path,
        )
        encoder = cls(kind(dim=config.hidden_size, **options), transformer, config.modality, config.pooling)
        encoder.config = config
        encoder.transformer.apply(_init_linear)
        return encoder

    def forward(self, view: View, mask: Mask | None = None, collect: Literal["ffn", "block"] | None = None) -> Encoded:
        """Encode a view, only its visible tokens if a mask is given.

        Returns: tokens (M*B, L_visible, D) or (B, L, D), cls if there is one, and the collected layers, content tokens only.
        """
        return self.contextualize(self.features(view.x), mask, collect)

    def contextualize(
        self, features: Tensor, mask: Mask | None = None, collect: Literal["ffn", "block"] | None = None
    ) -> Encoded:
        """Positions, visible tokens, transformer: the part of the pass that depends on the mask. features: (B, L, D)."""
        x, layers = self.transformer(self.positions(features, mask), collect)
        extra = self.transformer.extra_tokens
        return Encoded(x[:, extra:], x[:, 0] if extra else None, tuple(layer[:, extra:] for layer in layers))

    def pool(self, encoded: Encoded) -> Tensor:
        """(B, D): what downstream tasks use, the mean of the tokens or cls."""
        return encoded.cls if self.pooling == "cls" and encoded.cls is not None else encoded.tokens.mean(1)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
