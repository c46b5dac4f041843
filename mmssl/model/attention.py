"""Multi-head self-attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Scaled dot-product self-attention with a fused, biased qkv projection. (B, L, D) -> (B, L, D).

    Args:
        causal: whether a token sees only itself and those before it.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, attention_dropout: float = 0.0, causal: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: hidden_size {dim} is not a multiple of {heads} heads")
        self.heads, self.attention_dropout, self.causal = heads, attention_dropout, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend over the tokens of each row.

        Args:
            bias: what is added to the logits, (R or 1, H or 1, L or 1, L): numbers, or bool with True = attend.
        """
        rows, length, dim = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
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
