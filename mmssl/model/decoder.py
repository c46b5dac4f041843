"""The convolutional decoder of data2vec 2."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import random
from mmssl.model.positions import restore
from mmssl.types import Mask


@dataclass(frozen=True)
class ConvDecoderOptions:
    """Shape of a convolutional decoder."""

    dim: int = 768
    groups: int = 16
    kernel: int = 3
    layers: int = 6
    noise: float = 0.01  # standard deviation of the fillers in masked places
    residual: bool = True  # each layer adds its input where the widths match
    hidden: int = 0  # width of a hidden layer in the output projection; 0 = a single linear layer
    dropout: float = 0.0  # on the visible tokens

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class ConvDecoder(nn.Module):
    """Noise in the masked places, grouped convolutions, output projection (arXiv:2212.07525, section 3).

    Each layer is convolution, layer norm over channels without weights, GELU. Padding is zero before each layer.
    """

    def __init__(self, width: int, grid: tuple[int, ...], options: ConvDecoderOptions):
        super().__init__()
        if options.noise < 0 or options.hidden < 0 or not 0 <= options.dropout < 1:
            raise ValueError("decoder: noise and hidden must be at least 0, dropout at least 0 and below 1")
        if max(options.dim, options.layers, options.kernel, options.hidden) > 1 << 14:
            raise ValueError("decoder: dim, layers, kernel and hidden must be at most 16384")
        if min(options.dim, options.groups, options.kernel, options.layers) < 1 or options.kernel % 2 == 0:
            raise ValueError("decoder: dim, groups, kernel and layers must be at least 1, and the kernel odd")
        if options.dim % options.groups or width % options.groups:
            raise ValueError(
                f"decoder.groups: {options.groups} groups must divide decoder.dim {options.dim} and hidden_size {width}"
            )
        conv = nn.Conv2d if len(grid) == 2 else nn.Conv1d
        widths = [width] + [options.dim] * options.layers
        self.convs = nn.ModuleList(
            conv(a, b, options.kernel, padding=options.kernel // 2, groups=options.groups)
            for a, b in itertools.pairwise(widths)
        )
        self.proj: nn.Module = nn.Linear(options.dim, width)
        if options.hidden:
            first, last = nn.Linear(options.dim, options.hidden), nn.Linear(options.hidden, width)
            for linear in (first, last):  # the text model's; a single projection starts as torch has it
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
            self.proj = nn.Sequential(first, nn.GELU(), last)
        self.dropout = nn.Dropout(options.dropout)
        self.grid, self.noise, self.residual = grid, options.noise, options.residual

    def forward(self, visible: Tensor, mask: Mask, keys: Sequence[int], pad: Tensor | None = None) -> Tensor:
        """Predict every token from the visible ones.

        Args:
            visible: (M*B, L_visible, D) without extra tokens.
            keys: B seeds of the fillers, one a sample.
            pad: (B, L) bool, True = padding.
        Returns: (M*B, L, D).
        """
        rows, _, width = visible.shape
        copies = rows // len(keys)
        fillers = self._fillers(visible, mask, keys, pad)
        x = restore(self.dropout(visible), fillers, mask)
        x = x.view(rows, *((-1, self.grid[1]) if len(self.grid) == 2 else x.shape[1:2]), width).movedim(-1, 1)
        blank = None if pad is None else pad.repeat_interleave(copies, 0)[:, None]  # (M*B, 1, L), of sequences only
        for conv in self.convs:
            x = x if blank is None else x.masked_fill(blank, 0.0)
            y = conv(x).movedim(1, -1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).movedim(-1, 1)
            x = x + y if self.residual and x.shape == y.shape else y
        return self.proj(x.movedim(1, -1).flatten(1, -2))

    def _fillers(self, like: Tensor, mask: Mask, keys: Sequence[int], pad: Tensor | None) -> Tensor:
        """(M*B, L - L_visible, D) noise. A sample's does not depend on how far the batch is padded: padding gets zeros."""
        rows, width = len(like), like.shape[-1]
        copies = rows // len(keys)
        if pad is None:
            noise = random.normal(keys, (copies, mask.count, width), like=like)
        else:
            counts = mask.hidden[::copies].sum(1).tolist()  # equal for the masks of a sample
            noise = like.new_zeros(len(keys), copies, mask.count, width)
            for row, key, count in zip(noise, keys, counts):
                row[:, :count] = random.normal([key], (copies, count, width), like=like)[0]
        return noise.view(rows, mask.count, width) * self.noise
