"""The shared transformer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.model.attention import Attention

WIDEST, DEEPEST = 1 << 17, 1024  # a typing error must not ask for a petabyte


class DropPath(nn.Module):
    """Leaves out a residual branch for a random share of the rows (stochastic depth, arXiv:1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), each row zero with probability `rate`, else scaled to keep the mean."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.empty(x.shape[0], 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Mlp(nn.Module):
    """Linear, GELU, Linear. (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, bend, narrow."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A transformer block, post-norm as in data2vec or pre-norm as in ViT."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        norm: Literal["post", "pre"] = "post",
        eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.pre = norm == "pre"
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, dropout, attention_dropout)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> the block's output and its MLP's output before dropout and residual, both (B, L, D)."""
        if self.pre:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            ffn = self.mlp(self.norm2(x))
            return x + self.drop_path(self.dropout(ffn)), ffn
        x = self.norm1(x + self.drop_path(self.attn(x)))
        ffn = self.mlp(x)
        return self.norm2(x + self.drop_path(self.dropout(ffn))), ffn


class ExtraTokens(nn.Module):
    """Learned vectors without position in front of the sequence: cls first, then registers.

    A module of its own, because a sharded parameter may only be read in the forward of its owner.
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, count, dim).normal_())  # std 1, as data2vec 2 starts

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, E + L, D)."""
        return torch.cat([self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)


class Transformer(nn.Module):
    """Extra tokens, input norm, prenet blocks, trunk.

    Post-norm has a norm at the input and none at the end, pre-norm the other way round.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        prenet_depth: int = 0,
        mlp_ratio: float = 4.0,
        norm: Literal["post", "pre"] = "post",
        extra_tokens: int = 1,
        eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if dim < 1 or depth < 1 or heads < 1 or prenet_depth < 0 or extra_tokens < 0:
            raise ValueError("hidden_size, depth and heads must be at least 1, prenet_depth and extra_tokens at least 0")
        if max(dim, extra_tokens, dim * mlp_ratio) > WIDEST or depth + prenet_depth > DEEPEST:
            raise ValueError(f"hidden_size, extra_tokens and MLP: at most {WIDEST}; depth and prenet_depth: {DEEPEST} together")
        if not (0 <= dropout < 1 and 0 <= attention_dropout < 1 and 0 <= drop_path < 1 and eps >= 0):
            raise ValueError("dropout, attention_dropout and drop_path must be at least 0 and below 1, norm_eps at least 0")
        if dim * mlp_ratio < 1:
            raise ValueError(f"mlp_ratio: {mlp_ratio} leaves the MLP without a hidden unit")
        total = prenet_depth + depth
        rates = [drop_path * i / max(total - 1, 1) for i in range(total)]
        blocks = [Block(dim, heads, mlp_ratio, norm, eps, dropout, attention_dropout, rate) for rate in rates]
        self.extra_tokens = extra_tokens
        self.extra = ExtraTokens(extra_tokens, dim) if extra_tokens else nn.Identity()
        self.input_norm = nn.LayerNorm(dim, eps) if norm == "post" else nn.Identity()
        self.prenet, self.blocks = nn.ModuleList(blocks[:prenet_depth]), nn.ModuleList(blocks[prenet_depth:])
        self.norm = nn.LayerNorm(dim, eps) if norm == "pre" else nn.Identity()

    def forward(self, x: Tensor, collect: Literal["ffn", "block"] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Contextualise.

        Args:
            x: (B, L, D) tokens with positions.
            collect: which tensor of each trunk block to return, its MLP's output or its own.
        Returns: (B, E + L, D), and the collected tensors of that shape.
        """
        x = self.input_norm(self.extra(x))
        for block in self.prenet:
            x, _ = block(x)
        layers = []
        for block in self.blocks:
            x, ffn = block(x)
            if collect:
                layers.append(ffn if collect == "ffn" else x)
        return self.norm(x), tuple(layers)
