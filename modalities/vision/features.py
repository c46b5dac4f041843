"""Images to patch features."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mmssl.model.encoder import features_of
from mmssl.model.positions import RelativeBias, SinCos2d


@features_of("vision")
class PatchFeatures(nn.Module):
    """One strided convolution over the patches of an image, row by row. (B, C, H, W) -> (B, L, D).

    Where positions (of size 0.7) are larger than patches are at the start, an untrained network says more of where a patch is
    than of what it shows, and a teacher's targets can be told by place alone. A small `position_scale` helps short runs.
    """

    input_name = "pixel_values"
    normed, mask_id = False, None

    def __init__(
        self,
        dim: int,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        positions: Literal["sincos", "relative"] = "sincos",
        position_scale: float = 1.0,
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
        self.relative, self.position_scale = positions == "relative", position_scale
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.length = self.grid[0] * self.grid[1]
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))

    def positions(self, heads: int, extra: int) -> nn.Module:
        """Fixed 2-D sine-cosine positions, or learned biases of the attention as in BEiT."""
        return RelativeBias(self.grid, heads, extra) if self.relative else SinCos2d(self.dim, self.grid, self.position_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Cut and project. Raises: ValueError unless the image is a square of whole patches."""
        height, width = x.shape[-2:]
        if height != width or height % self.patch_size:
            raise ValueError(
                f"image_size: an image of {height} x {width} pixels, must be a square of whole patches of {self.patch_size}"
            )
        return self.proj(x).flatten(2).transpose(1, 2)
