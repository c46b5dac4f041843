"""Images to patch features."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.model.encoder import features_of
from mmssl.model.positions import Learned2d, NoPositions, RelativeBias, Rotary2d, SinCos2d


class Palette(nn.Module):
    """The learned vector of the nearest of some colours, for each pixel. (B, C, H, W) -> (B, H*W, D).

    Colours are values of normalised pixels. They are not trained: a method finds them before it begins.
    """

    measured = ("colours",)  # buffers that a method measures of the data before training
    colours: Tensor

    def __init__(self, count: int, channels: int, dim: int):
        super().__init__()
        self.embed = nn.Embedding(count, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.register_buffer("colours", torch.zeros(count, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Look up."""
        return self.embed(self.ids(x))

    def ids(self, x: Tensor) -> Tensor:
        """(B, H*W) int64, the nearest colour of each pixel, row by row."""
        with torch.autocast(x.device.type, enabled=False):  # nearest by few digits is another one
            pixels = x.to(self.colours.dtype).flatten(2).transpose(1, 2)
            return (pixels @ self.colours.T - self.colours.square().sum(1) / 2).argmax(-1)


@features_of("vision")
class PatchFeatures(nn.Module):
    """One strided convolution over the patches of an image, row by row. (B, C, H, W) -> (B, L, D).

    Where positions (of size 0.7) are larger than patches are at the start, an untrained network says more of where a patch is
    than of what it shows, and a teacher's targets can be told by place alone. A small `position_scale` helps short runs; it
    multiplies what learned ones start from, 0.02, too.

    With a `palette`, pixels are tokens and have the vector of the nearest of so many colours, as in image GPT.
    """

    input_name = "pixel_values"
    normed, mask_id = False, None

    def __init__(
        self,
        dim: int,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        positions: Literal["sincos", "learned", "relative", "rotary", "none"] = "sincos",
        position_scale: float = 1.0,
        rotary_base: float = 100.0,
        palette: int = 0,
    ):
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"image_size: {image_size} is not a multiple of patch_size {patch_size}; "
                f"try model.image_size={max(1, image_size // max(patch_size, 1)) * max(patch_size, 1)}"
            )
        if channels not in (1, 3):
            raise ValueError(f"channels: {channels}, must be 1 (grey) or 3 (colour)")
        self.dim, self.image_size, self.patch_size, self.channels = dim, image_size, patch_size, channels
        if position_scale < 0:
            raise ValueError(f"position_scale: {position_scale}, must be at least 0")
        self.kind, self.position_scale, self.rotary_base = positions, position_scale, rotary_base
        self.relative = positions == "relative"
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.length = self.grid[0] * self.grid[1]
        if palette and (patch_size > 1 or not 2 <= palette <= 1 << 16):
            raise ValueError(
                f"palette: {palette} colours of patches of {patch_size} pixels, must be 2 to {1 << 16} colours of single "
                "pixels; set model.patch_size=1, or palette=0 for none"
            )
        self.palette = Palette(palette, channels, dim) if palette else None
        if self.palette is None:
            self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
            nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))

    def positions(self, heads: int, extra: int) -> nn.Module:
        """Fixed 2-D sine-cosine positions, learned ones as in ViT, learned biases of the attention as in BEiT, queries and keys
        that turn as in DINOv3, or none.
        """
        if self.kind == "none":
            return NoPositions()
        if self.kind == "rotary":
            return Rotary2d(self.dim // heads, extra, self.rotary_base)
        if self.relative:
            return RelativeBias(self.grid, heads, extra)
        if self.kind == "learned":
            return Learned2d(self.dim, self.grid, 0.02 * self.position_scale)
        return SinCos2d(self.dim, self.grid, self.position_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Cut and project. Raises: ValueError unless the image is a square of whole patches."""
        height, width = x.shape[-2:]
        if height != width or height % self.patch_size:
            raise ValueError(
                f"image_size: an image of {height} x {width} pixels, must be a square of whole patches of {self.patch_size}"
            )
        return self.proj(x).flatten(2).transpose(1, 2) if self.palette is None else self.palette(x)

    def fitted(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a model for images with another number of channels: the same features of a grey image in either form."""
        weight = saved.get("proj.weight")
        if weight is None or weight.shape[1] == self.channels:
            return saved
        return saved | {"proj.weight": weight.sum(1, keepdim=True).expand(-1, self.channels, -1, -1) / self.channels}

    @property
    def raw_width(self) -> int:
        """Values of a patch, or colours of the palette."""
        return self.patch_size**2 * self.channels if self.palette is None else len(self.palette.colours)

    def raw(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, P*P*C) the pixels of each patch, row by row, the channels of a pixel adjacent; with a palette
        (B, L) ids of colours.
        """
        if self.palette is not None:
            return self.palette.ids(x)
        size = self.patch_size
        cut = x.unflatten(2, (-1, size)).unflatten(4, (-1, size))  # (B, C, rows, P, columns, P)
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unraw(self, patches: Tensor) -> Tensor:
        """The inverse of `raw`; ids become their colours."""
        if self.palette is not None and not patches.is_floating_point():
            patches = self.palette.colours[patches]
        size, side = self.patch_size, math.isqrt(patches.shape[1])
        cut = patches.view(-1, side, side, size, size, self.channels)
        return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
