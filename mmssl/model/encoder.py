"""Feature encoder of a modality and shared transformer, in one."""

from __future__ import annotations

import inspect
import math
from importlib.metadata import entry_points
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl.model.configuration import MmsslConfig
from mmssl.model.positions import attention_bias, take_pad
from mmssl.model.transformer import Transformer
from mmssl.types import Encoded, Mask, View

FEATURES: dict[str, type[nn.Module]] = {}


def features_of(modality: str):
    """Class decorator: the feature encoder of a modality.

    Such a module takes `dim` and its own options and maps View.x to (B, L, D). It has `input_name` (the model's keyword),
    `length` (L of the longest input), `grid` (shape of its tokens), `normed` (whether they come with norm and dropout),
    `mask_id` (the input that stands for a hidden token; None where features are replaced instead), `positions(heads, extra)`
    (see `positions.py`) and, where inputs can be padded, `pad(attention_mask)`. Where features know their places by themselves,
    `placed` is true. Where a token's own input can be a target, it
    has `raw(x)`, (B, L, n) values or (B, L) ids, and `raw_width`, how many values n or how many different ids.
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

    passes: Any = None  # what was computed already while several methods use it at once, see `mmssl/parts/passes.py`

    def __init__(
        self,
        features: Any,
        positions: nn.Module,
        transformer: Transformer,
        modality: str,
        pooling: Literal["mean", "cls"] = "mean",
    ):
        super().__init__()
        if pooling == "cls" and not transformer.extra_tokens:
            raise ValueError("pooling: 'cls' needs extra_tokens of at least 1")
        if pooling == "cls" and transformer.causal:
            raise ValueError("pooling: 'cls' sees only itself where causal=true; set it to mean")
        self.features, self.positions, self.transformer = features, positions, transformer
        self.modality, self.pooling, self.dim = modality, pooling, features.dim
        self.input_name: str = features.input_name
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
            config.input_dropout,
            config.layer_drop,
            config.layer_scale,
            config.extra_std,
            getattr(kind, "normed", False),
            config.activation,
            config.causal,
            config.norm_kind,
        )
        features: Any = kind(dim=config.hidden_size, **options)
        positions = features.positions(config.heads, config.extra_tokens)
        encoder = cls(features, positions, transformer, config.modality, config.pooling)
        encoder.config = config
        draw_linear(encoder.transformer, config.start)
        return encoder

    def forward(self, view: View, mask: Mask | None = None, collect: Literal["ffn", "block"] | None = None) -> Encoded:
        """Encode a view, only its visible tokens if a mask is given.

        Returns: tokens (M*B, L_visible, D) or (B, L, D), cls if there is one, the collected layers, content tokens only, and
            which tokens are padding.
        """
        return self.contextualize(self.local(view.x), mask, collect, view.pad)

    def local(self, x: Tensor) -> Tensor:
        """View.x -> (B, L, D) features that do not depend on the mask."""
        return self.features(x) if self.passes is None else self.passes.once(self.features, x)

    def contextualize(
        self,
        features: Tensor,
        mask: Mask | None = None,
        collect: Literal["ffn", "block"] | None = None,
        pad: Tensor | None = None,
        attend: Tensor | None = None,
    ) -> Encoded:
        """Positions, visible tokens, transformer: the part of the pass that depends on the mask.

        Args:
            features: (B, L, D).  pad: (B, L) bool, True = padding.
            attend: (B, L) bool, True = token that others attend to; all of them if None. For whole views.
        """
        of = (features, mask, collect, pad, attend)
        return self._contextualize(*of) if self.passes is None else self.passes.once(self._contextualize, *of)

    def _contextualize(
        self,
        features: Tensor,
        mask: Mask | None,
        collect: Literal["ffn", "block"] | None,
        pad: Tensor | None,
        attend: Tensor | None,
    ) -> Encoded:
        extra = self.transformer.extra_tokens
        tokens, bias = self.positions(features, mask, pad)
        pad = take_pad(pad, mask)
        x, layers = self.transformer(tokens, collect, attention_bias(bias, pad, extra, attend))
        return Encoded(x[:, extra:], x[:, 0] if extra else None, tuple(layer[:, extra:] for layer in layers), pad)

    def inspect(self, view: View) -> tuple[Tensor, Tensor]:
        """Of a whole view: (B, D) pooled, and (B, D) local features of the token in the middle."""
        features = self.features(view.x)
        local = features[torch.arange(len(features), device=features.device), middle(features, view.pad)]
        return self.pool(self.contextualize(features, pad=view.pad)), local

    def compilable(self) -> list[nn.Module]:
        """What `train.compile` compiles: blocks, since a whole model would be compiled anew for every mask count."""
        return [*self.transformer.prenet, *self.transformer.blocks]

    def pool(self, encoded: Encoded) -> Tensor:
        """(B, D): what downstream tasks use, the mean of the tokens that are not padding, or cls."""
        if self.pooling == "cls" and encoded.cls is not None:
            return encoded.cls
        return mean_tokens(encoded.tokens, encoded.pad)


def mean_tokens(tokens: Tensor, pad: Tensor | None = None) -> Tensor:
    """(B, L, D) -> (B, D): the mean of the tokens that are not padding. pad: (B, L) bool, True = padding."""
    if pad is None:
        return tokens.mean(1)
    valid = (~pad).to(tokens.dtype)[..., None]
    return (tokens * valid).sum(1) / valid.sum(1).clamp(min=1)


def middle(tokens: Tensor, pad: Tensor | None) -> Tensor:
    """(B,) int64: the place in the middle of each row's valid tokens."""
    if pad is None:
        return torch.full((len(tokens),), tokens.shape[1] // 2, device=tokens.device)
    return (~pad).sum(1) // 2


def init_linear(module: nn.Module) -> None:
    """Weights of a linear layer from N(0, 0.02), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def init_xavier(module: nn.Module) -> None:
    """Weights of a linear layer uniform within sqrt(6 / (inputs + outputs)), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def init_cut(module: nn.Module) -> None:
    """Weights of a linear layer from N(0, 0.02) without what lies beyond 0.02, which leaves a std of 0.0108; biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(module.bias)


def draw_linear(transformer: Transformer, start: Literal["normal", "xavier", "beit"]) -> None:
    """Draw the linear layers anew: `normal` as data2vec and BERT do, `xavier` as MAE, `beit` as BEiT, CAE and SimMIM.

    The last divides what each block adds to its input by sqrt(2 * number), the first block being 1.
    """
    transformer.apply({"normal": init_linear, "xavier": init_xavier, "beit": init_cut}[start])
    if start == "beit":
        blocks: list[Any] = [*transformer.prenet, *transformer.blocks]
        for number, block in enumerate(blocks, 1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data.div_(math.sqrt(2 * number))
