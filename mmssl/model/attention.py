"""Multi-head self-attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.model.recompute import entering


class Turns(NamedTuple):
    """Rotary positions: queries and keys turn with the place of their token, so that products tell how far apart places are.

    Of each head the first half turns with the row, the second with the column; in each half channel i and the one a quarter of
    the head further turn together by place * base^(-4i / d).

    Source: arXiv:2211.10408, section 3.2; arXiv:2104.09864.
    """

    cos: Tensor  # (R or 1, 1, L, 2, d/4), fp32 or higher; of rows, then of columns
    sin: Tensor
    bias: Tensor | None = None  # what is added to the logits besides

    @classmethod
    def of(cls, places: Tensor, dim: int, base: float = 100.0) -> Turns:
        """Turns of heads of `dim` channels.

        Args:
            places: (R or 1, L, 2) row and column of each token, in any unit; what is at 0, 0 stays as it is.
        Raises: ValueError if `dim` is no multiple of 4.
        """
        if dim % 4:
            raise ValueError(f"heads: {dim} channels each, which positions that turn need to be a multiple of 4")
        frequency = base ** (-torch.arange(dim // 4, dtype=torch.float64, device=places.device) / (dim // 4))
        angle = (places.to(torch.float64)[:, None, ..., None] * frequency).to(places.dtype)
        return cls(angle.cos(), angle.sin())

    def apply(self, x: Tensor) -> Tensor:
        """(R, H, L, d) queries or keys, turned, of the same type."""
        a, b = x.to(torch.promote_types(x.dtype, self.cos.dtype)).unflatten(-1, (2, 2, -1)).unbind(-2)  # each (R, H, L, 2, d/4)
        turned = torch.stack([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -2)
        return turned.flatten(-3).to(x.dtype)


class Attention(nn.Module):
    """Scaled dot-product self-attention with a fused, biased qkv projection. (B, L, D) -> (B, L, D).

    Args:
        causal: whether a token sees only itself and those before it.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, attention_dropout: float = 0.0, causal: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: hidden_size {dim} is not a multiple of {heads} heads")
        self.heads, self.attention_dropout, self.causal, self.forgets = heads, attention_dropout, causal, True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, bias: Tensor | Turns | None = None, norm: nn.Module | None = None, last: int | None = None
    ) -> Tensor:
        """Attend over the tokens of each row.

        Args:
            norm: what the tokens go through first.
            last: how many tokens, of the end of each row, ask; all if None.
            bias: what is added to the logits, (R or 1, H or 1, L or 1, L): numbers, or bool with True = attend; or how queries
                and keys turn.
        """
        if last is not None and self.causal:
            raise ValueError("last: causal attention is computed for all tokens")
        rows, length, dim = x.shape
        qkv = entering(self.qkv, x, norm, self.forgets).view(rows, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if isinstance(bias, Turns):
            q, k, bias = bias.apply(q), bias.apply(k), bias.bias
        if last is not None:
            q, length = q[:, :, -last:], last
            bias = bias[..., -last:, :] if bias is not None and bias.shape[-2] > 1 else bias
        dropout = self.attention_dropout if self.training else 0.0
        if self.causal and bias is not None:
            past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            bias = bias.masked_fill(~past, -math.inf) if bias.is_floating_point() else bias & past
        if bias is not None and bias.is_floating_point():  # distances of hundreds of frames do not fit into 8 bits
            wide = torch.promote_types(q.dtype, torch.float32)
            with torch.autocast(x.device.type, enabled=False):
                out = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), bias.to(wide), dropout).to(q.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=self.causal and bias is None)
        return self.dropout(self.proj(out.transpose(1, 2).reshape(rows, length, dim)))
