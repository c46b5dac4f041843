"""The shared transformer."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.model.attention import Attention, Turns
from mmssl.model.recompute import entering, forgetting

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "swiglu"]  # by the error function, nearly, roughly; arXiv:2002.05202
NormKind = Literal["layer", "rms"]  # rms: neither means nor offsets, arXiv:1910.07467
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
WIDEST, DEEPEST = 1 << 17, 1024  # a typing error must not ask for a petabyte
SHARED = ("prenet", "blocks", "norm")  # of a transformer, by encoders of several kinds of data


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


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), as in image GPT."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * torch.sigmoid(1.702 * x)


class SwiGlu(nn.Module):
    """Half of the units, through SiLU, times the other half (arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 * H) -> (..., H)."""
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "gelu_quick": QuickGelu,
    "swiglu": SwiGlu,
}


class Mlp(nn.Module):
    """Linear, activation, Linear. (B, L, D) -> (B, L, D). The first is twice as wide where units come in pairs.

    The widest tensors of a block are what enters and what leaves the activation. A GELU keeps the first for its gradient; the
    second Linear computes the other from it again. So does the first one what a norm gives it.
    """

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu"):
        super().__init__()
        wide = 2 * hidden if activation == "swiglu" else hidden
        self.fc1, self.act, self.fc2 = nn.Linear(dim, wide), ACTIVATIONS[activation](), nn.Linear(hidden, dim)
        self.forgets, self.cheap = True, isinstance(self.act, nn.GELU)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Widen, bend, narrow. norm: what the tokens go through first."""
        h = entering(self.fc1, x, norm, self.forgets)
        if self.forgets and self.cheap and h.requires_grad and not torch.compiler.is_compiling():
            return forgetting(self.act, h, self.fc2)
        return self.fc2(self.act(h))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (arXiv:2103.17239)."""

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.scale


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
        layer_scale: float = 0.0,
        activation: Activation = "gelu",
        causal: bool = False,
        norm_kind: NormKind = "layer",
    ):
        super().__init__()
        self.pre = norm == "pre"
        self.norm1, self.norm2 = NORMS[norm_kind](dim, eps), NORMS[norm_kind](dim, eps)
        self.attn = Attention(dim, heads, dropout, attention_dropout, causal)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), activation)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)
        self.scale1, self.scale2 = (LayerScale(dim, layer_scale) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, bias: Tensor | Turns | None = None, last: int | None = None) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> the block's output and its MLP's output before dropout and residual, both (B, L, D).

        last: how many tokens of the end are wanted of both, (B, last, D); all if None.
        """
        attended = self.attn(x, bias, self.norm1 if self.pre else None, last)
        x = (x if last is None else x[:, -last:]) + self.drop_path(self.scale1(attended))
        if self.pre:
            ffn = self.mlp(x, self.norm2)
            return x + self.drop_path(self.scale2(self.dropout(ffn))), ffn
        x = self.norm1(x)
        ffn = self.mlp(x)
        return self.norm2(x + self.drop_path(self.scale2(self.dropout(ffn)))), ffn


class ExtraTokens(nn.Module):
    """Learned vectors without position in front of the sequence: cls first, then registers.

    A module of its own, because a sharded parameter may only be read in the forward of its owner.
    """

    def __init__(self, count: int, dim: int, std: float = 1.0):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, count, dim).normal_(std=std))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, E + L, D)."""
        return torch.cat([self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)


class Transformer(nn.Module):
    """Extra tokens, input norm and dropout, prenet blocks, trunk.

    Post-norm has a norm at the input (unless `normed` says that tokens come with one) and none at the end, pre-norm the
    other way round. `layer_drop` leaves out a trunk block in training with that probability (arXiv:1909.11556).
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
        input_dropout: float = 0.0,
        layer_drop: float = 0.0,
        layer_scale: float = 0.0,
        extra_std: float = 1.0,
        normed: bool = False,
        activation: Activation = "gelu",
        causal: bool = False,
        norm_kind: NormKind = "layer",
    ):
        super().__init__()
        if causal and extra_tokens > 1:
            raise ValueError(
                f"extra_tokens: {extra_tokens}, with causal=true at most 1, from which the first token is predicted"
            )
        if dim < 1 or depth < 1 or heads < 1 or prenet_depth < 0 or extra_tokens < 0:
            raise ValueError("hidden_size, depth and heads: at least 1; prenet_depth and extra_tokens: at least 0")
        if max(dim, extra_tokens, dim * mlp_ratio) > WIDEST or depth + prenet_depth > DEEPEST:
            raise ValueError(f"hidden_size, extra_tokens and MLP: at most {WIDEST}; depth and prenet_depth: {DEEPEST} together")
        shares = {
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "drop_path": drop_path,
            "input_dropout": input_dropout,
            "layer_drop": layer_drop,
        }
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name}: {share}, must be at least 0 and below 1")
        if eps < 0 or layer_scale < 0 or extra_std < 0:
            raise ValueError("norm_eps, layer_scale and extra_std must be at least 0")
        if dim * mlp_ratio < 1:
            raise ValueError(f"mlp_ratio: {mlp_ratio} leaves the MLP without a hidden unit")
        total = prenet_depth + depth
        rates = [drop_path * i / max(total - 1, 1) for i in range(total)]
        options = (mlp_ratio, norm, eps, dropout, attention_dropout)
        blocks = [Block(dim, heads, *options, rate, layer_scale, activation, causal, norm_kind) for rate in rates]
        normed = normed and not prenet_depth
        self.extra_tokens, self.layer_drop, self.causal = extra_tokens, layer_drop, causal
        self.extra = ExtraTokens(extra_tokens, dim, extra_std) if extra_tokens else nn.Identity()
        self.input_norm = NORMS[norm_kind](dim, eps) if norm == "post" and not normed else nn.Identity()
        self.input_dropout = nn.Dropout(0.0 if normed else input_dropout)
        self.prenet, self.blocks = nn.ModuleList(blocks[:prenet_depth]), nn.ModuleList(blocks[prenet_depth:])
        self.norm = NORMS[norm_kind](dim, eps) if norm == "pre" else nn.Identity()

    def share(self, other: Transformer) -> None:
        """Use the blocks and the last norm of another from now on; extra tokens and what is done to the input stay its own."""
        for name in SHARED:
            setattr(self, name, getattr(other, name))

    def forward(
        self, x: Tensor, collect: Literal["ffn", "block"] | None = None, bias: Tensor | Turns | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Contextualise.

        Args:
            x: (B, L, D) tokens with positions.
            collect: which tensor of each trunk block to return, its MLP's output or its own.
            bias: of the attention of every block, see `Attention`.
        Returns: (B, E + L, D), and the collected tensors of that shape.
        """
        x = self.input_dropout(self.input_norm(self.extra(x)))
        for block in self.prenet:
            x, _ = block(x, bias)
        layers = []
        for block in self.blocks:
            out, ffn = block(x, bias)
            if self.layer_drop and self.training:
                # A dropped block is computed and not used: its weights get zero gradients, so that DDP and ZeRO never wait.
                out = torch.where(torch.rand((), device=x.device) < self.layer_drop, x, out)
            x = out
            if collect:
                layers.append(ffn if collect == "ffn" else x)
        return self.norm(x), tuple(layers)
