"""The convolutional decoder of data2vec 2."""

from __future__ import annotations

import itertools
import math
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

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class ConvDecoder(nn.Module):
    """Noise in the masked places, grouped convolutions, one linear layer (arXiv:2212.07525, section 3).

    Each layer is convolution, layer norm over channels without weights, GELU, and adds its input where the widths match.
    """

    def __init__(self, width: int, grid: tuple[int, ...], options: ConvDecoderOptions):
        super().__init__()
        if options.noise < 0:
            raise ValueError(f"decoder.noise: {options.noise}, must be at least 0")
        if max(options.dim, options.layers, options.kernel) > 1 << 14:
            raise ValueError("decoder: dim, layers and kernel must be at most 16384")
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
        self.proj = nn.Linear(options.dim, width)
        self.grid, self.noise = grid, options.noise

    def forward(self, visible: Tensor, mask: Mask, keys: Sequence[int]) -> Tensor:
        """Predict every token from the visible ones.

        Args:
            visible: (M*B, L_visible, D) without extra tokens.
            keys: B seeds of the fillers, one a sample.
        Returns: (M*B, L, D).
        """
        rows, _, width = visible.shape
        copies = rows // len(keys)
        fillers = random.normal(keys, (copies, mask.count, width), like=visible).view(rows, mask.count, width) * self.noise
        x = restore(visible, fillers, mask)
        x = x.view(rows, *(self.grid if math.prod(self.grid) == x.shape[1] else x.shape[1:2]), width).movedim(-1, 1)
        for conv in self.convs:
            y = conv(x).movedim(1, -1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).movedim(-1, 1)
            x = x + y if x.shape == y.shape else y
        return self.proj(x.movedim(1, -1).flatten(1, -2))
