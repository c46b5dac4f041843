"""The transformer that says what is in other places: MAE's decoder, I-JEPA's predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.model.encoder import init_xavier
from mmssl.model.positions import SinCos2d, attention_bias
from mmssl.model.transformer import Block
from mmssl.types import Encoded, Mask


@dataclass(frozen=True)
class TokenDecoderOptions:
    """Shape of a transformer that decodes; the defaults are those of MAE's base model."""

    dim: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class TokenDecoder(nn.Module):
    """A learned token with the code of each wanted place beside the visible tokens, pre-norm blocks, norm, projection.

    Places have fixed sine-cosine codes. cls goes along without one, if there is one.
    """

    def __init__(self, width: int, out: int | None, grid: tuple[int, ...], options: TokenDecoderOptions):
        """Raises: ValueError that begins with the option that is wrong.

        Args:
            width: of the visible tokens.  out: of the predictions; those of the last norm, without a projection, if None.
            grid: cells in each dimension, (L,) or (rows, columns).
        """
        super().__init__()
        if min(options.dim, options.depth, options.heads) < 1 or options.dim % options.heads or options.dim % 4:
            raise ValueError(
                f"decoder: dim {options.dim} must be a multiple of 4 and of {options.heads} heads, and depth at least 1"
            )
        self.embed = nn.Linear(width, options.dim)
        self.token = nn.Parameter(torch.empty(options.dim))
        shape = (options.mlp_ratio, "pre", options.norm_eps)
        self.blocks = nn.ModuleList(Block(options.dim, options.heads, *shape) for _ in range(options.depth))
        self.norm = nn.LayerNorm(options.dim, options.norm_eps)
        self.proj = nn.Identity() if out is None else nn.Linear(options.dim, out)
        self.codes: Tensor
        self.register_buffer("codes", place_codes(grid, options.dim), persistent=False)
        self.apply(init_xavier)
        nn.init.normal_(self.token, std=0.02)

    def forward(self, visible: Encoded, mask: Mask, pad: Tensor | None = None) -> Tensor:
        """Predict what is hidden, or each group of places that the mask asks for without the others.

        Args:
            visible: tokens (R, L_visible, D) and perhaps cls.  mask: R rows.
            pad: (B, L) bool, True = padding; R = M*B.
        Returns: (R, L - L_visible, out) at `mask.rest`; or (R*K, n, out), the K groups of a row adjacent.
        """
        places = mask.rest[:, None] if mask.wanted is None else mask.wanted  # (R, K, n)
        rows, groups, count = places.shape
        seen = self.embed(visible.tokens) + self.codes.to(visible.tokens.dtype)[mask.keep]
        if visible.cls is not None:
            seen = torch.cat([self.embed(visible.cls)[:, None], seen], 1)
        asked = (self.token + self.codes[places.flatten(0, 1)]).to(seen.dtype)  # (R*K, n, d)
        x = torch.cat([seen.repeat_interleave(groups, 0) if groups > 1 else seen, asked], 1)
        bias = None
        if pad is not None:
            each = pad.repeat_interleave(rows // len(pad), 0)
            own = [each.gather(1, mask.keep).repeat_interleave(groups, 0)]
            own.append(each.repeat_interleave(groups, 0).gather(1, places.flatten(0, 1)))
            bias = attention_bias(None, torch.cat(own, 1), int(visible.cls is not None))
        for i, block in enumerate(self.blocks, 1):
            x, _ = block(x, bias, count if i == len(self.blocks) else None)  # what is visible is not asked in the end
        return self.proj(self.norm(x))


def hidden_places(mask: Mask) -> Tensor:
    """(R, n) the places that a head must look at: `mask.rest`, or all of them where rows may hide different numbers."""
    return mask.rest if mask.count else mask.keep


def place_codes(grid: tuple[int, ...], dim: int) -> Tensor:
    """(L, dim) fixed sine-cosine codes of a grid's cells, as of `SinCos2d`; of a sequence all sines, then all cosines."""
    if len(grid) == 2:
        return SinCos2d(dim, (grid[0], grid[1])).table[0]
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(grid[0], dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1).float()
