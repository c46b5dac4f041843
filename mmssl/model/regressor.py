"""CAE's latent regressor and decoder: what is in hidden places, from what is visible, in the encoder's own terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.model.token_decoder import place_codes
from mmssl.model.transformer import Block, DropPath, LayerScale, Mlp
from mmssl.types import Mask


@dataclass(frozen=True)
class RegressorOptions:
    """Depths of a regressor and of the decoder behind it; the width is the encoder's."""

    depth: int = 4  # blocks of cross-attention
    decoder_depth: int = 4
    heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    layer_scale: float = 0.1
    drop_path: float = 0.0

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP. Only what asks is changed; places are added to queries and keys, not to values."""

    def __init__(self, dim: int, options: RegressorOptions):
        super().__init__()
        eps = options.norm_eps
        self.heads = options.heads
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(dim, eps) for _ in range(4))
        # What all keys share has no influence, hence no bias.
        self.q, self.v, self.proj, self.k = *(nn.Linear(dim, dim) for _ in range(3)), nn.Linear(dim, dim, bias=False)
        self.mlp, self.drop_path = Mlp(dim, round(dim * options.mlp_ratio)), DropPath(options.drop_path)
        start = options.layer_scale
        self.scale1, self.scale2 = (LayerScale(dim, start) if start else nn.Identity() for _ in range(2))

    def forward(self, asked: Tensor, seen: Tensor, asked_code: Tensor, seen_code: Tensor) -> Tensor:
        """(R, n, D) queries; keys and values are the visible tokens (R, L_visible, D) and the queries as they are."""
        both, code = torch.cat([seen, asked], 1), torch.cat([seen_code, asked_code], 1)
        q = self.q(self.norm_q(asked + asked_code))
        k, v = self.k(self.norm_k(both + code)), self.v(self.norm_v(both))
        out = F.scaled_dot_product_attention(*(x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)))
        asked = asked + self.drop_path(self.scale1(self.proj(out.transpose(1, 2).flatten(2))))
        return asked + self.drop_path(self.scale2(self.mlp(asked, self.norm2)))


class LatentRegressor(nn.Module):
    """Hidden latents from visible ones by cross-attention, then codes from those hidden latents alone by self-attention.

    The decoder never sees visible tokens: all it knows has to be in the latents.

    Source: arXiv:2202.03026, section 3.2 and the authors' code.
    """

    def __init__(self, dim: int, out: int, grid: tuple[int, ...], options: RegressorOptions):
        """dim: of the encoder.  out: codes. Raises: ValueError that begins with the option that is wrong."""
        super().__init__()
        if min(options.depth, options.decoder_depth, options.heads) < 1 or dim % options.heads or dim % 4:
            raise ValueError(
                f"regressor: heads {options.heads} must divide hidden_size {dim}, a multiple of 4; both depths at least 1"
            )
        if not 0 <= options.drop_path < 1 or options.layer_scale < 0:
            raise ValueError("regressor: drop_path must be at least 0 and below 1, layer_scale at least 0")
        shape = (options.mlp_ratio, "pre", options.norm_eps, 0.0, 0.0, options.drop_path, options.layer_scale)
        self.token = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(CrossBlock(dim, options) for _ in range(options.depth))
        self.norm = nn.LayerNorm(dim, options.norm_eps)
        self.decoder = nn.ModuleList(Block(dim, options.heads, *shape) for _ in range(options.decoder_depth))
        self.decoder_norm, self.head = nn.LayerNorm(dim, options.norm_eps), nn.Linear(dim, out)
        self.codes: Tensor
        self.register_buffer("codes", place_codes(grid, dim), persistent=False)
        self.apply(_init_normal)

    def forward(self, visible: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Latents (R, n, D) and logits of codes (R, n, K) at `mask.rest`. visible: (R, L_visible, D), without cls."""
        codes = self.codes.to(visible.dtype)
        seen_code, asked_code = codes[mask.keep], codes[mask.rest]
        latents = self.token.to(visible.dtype).expand(*mask.rest.shape, -1)
        for block in self.blocks:
            latents = block(latents, visible, asked_code, seen_code)
        latents = self.norm(latents)
        x = latents
        for block in self.decoder:
            x, _ = block(x + asked_code)
        return latents, self.head(self.decoder_norm(x))


def _init_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
