"""Log-mel spectrograms to patch features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.model.encoder import features_of
from mmssl.model.positions import NoPositions, SinCos2d, take
from mmssl.types import Mask


@features_of("spectrogram")
class MelFeatures(nn.Module):
    """A linear map of the patches of a log-mel spectrogram, frame after frame. (B, T, F) -> (B, L, D).

    Patches of all bands are a sequence, smaller ones a grid whose rows follow in time. Frames that fill no patch at the end are
    left out.

    Args:
        bands: F.
        frames: of the longest input, 10 ms each.
        patch_frames: frames of a patch.
        patch_bands: bands of a patch; all of them if None.
        mean, std: of the cells of a data set, which become 0 and 1; for spectrograms that are not normalised one by one.
        positions: fixed sine-cosine ones, or none.
        position_scale: factor of the fixed positions.
    """

    input_name = "input_features"
    normed, mask_id = False, None

    def __init__(
        self,
        dim: int,
        bands: int = 80,
        frames: int = 1500,
        patch_frames: int = 1,
        patch_bands: int | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        position_scale: float = 1.0,
        positions: Literal["sincos", "none"] = "sincos",
    ):
        super().__init__()
        if not 4 <= bands <= 256:
            raise ValueError(f"bands: {bands}, must be between 4 and 256")
        if not 1 <= frames <= 1 << 17:
            raise ValueError(f"frames: {frames}, must be between 1 and {1 << 17}")
        if patch_frames < 1 or frames % patch_frames:
            near = max(1, frames // max(patch_frames, 1)) * max(patch_frames, 1)
            raise ValueError(f"frames: {frames} is not a multiple of patch_frames {patch_frames}; try model.frames={near}")
        self.patch_bands = bands if patch_bands is None else patch_bands
        if self.patch_bands < 1 or bands % self.patch_bands:
            raise ValueError(f"patch_bands: {patch_bands}, must divide the {bands} bands (model.bands)")
        if not std > 0:
            raise ValueError(f"std: {std}, must be above 0")
        if position_scale < 0:
            raise ValueError(f"position_scale: {position_scale}, must be at least 0")
        self.dim, self.bands, self.frames, self.patch_frames = dim, bands, frames, patch_frames
        self.mean, self.std, self.position_scale, self.kind = mean, std, position_scale, positions
        self.columns = bands // self.patch_bands
        rows = frames // patch_frames
        self.grid = (rows,) if self.columns == 1 else (rows, self.columns)
        self.length = rows * self.columns
        self.proj = nn.Linear(self.raw_width, dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def positions(self, heads: int, extra: int) -> nn.Module:
        """Fixed sine-cosine positions: interleaved in a sequence, of time and band in a grid; or none."""
        if self.kind == "none":
            return NoPositions()
        if self.columns == 1:
            table = interleaved(self.length, self.dim)
        else:
            table = SinCos2d(self.dim, (self.length // self.columns, self.columns)).table[0]
        return TimePositions(self.position_scale * table)

    def forward(self, x: Tensor) -> Tensor:
        """Cut and project. Raises: ValueError if there is not a single patch, or if bands are missing."""
        return self.proj(self.raw(x))

    def pad(self, attention_mask: Tensor) -> Tensor:
        """(B, T) as transformers has it, 1 = valid -> (B, L) bool, True = patch that padding reaches into."""
        rows = attention_mask.shape[1] // self.patch_frames
        valid = attention_mask.sum(1) // self.patch_frames
        return (torch.arange(rows, device=valid.device) >= valid[:, None]).repeat_interleave(self.columns, 1)

    @property
    def raw_width(self) -> int:
        """Cells of a patch."""
        return self.patch_frames * self.patch_bands

    def raw(self, x: Tensor) -> Tensor:
        """(B, T, F) -> (B, L, n) the normalised cells of each patch, the bands of a frame adjacent."""
        rows = x.shape[1] // self.patch_frames
        if rows == 0 or x.shape[2] != self.bands:
            raise ValueError(
                f"a spectrogram of {x.shape[1]} frames and {x.shape[2]} bands; at least {self.patch_frames} frames "
                f"(model.patch_frames) and {self.bands} bands (model.bands) are needed"
            )
        x = (x[:, : rows * self.patch_frames] - self.mean) / self.std
        cut = x.unflatten(1, (rows, self.patch_frames)).unflatten(3, (self.columns, self.patch_bands))
        return cut.transpose(2, 3).flatten(3).flatten(1, 2)

    def unraw(self, patches: Tensor) -> Tensor:
        """(B, L, n) -> (B, T, F) normalised cells in their places."""
        cut = patches.unflatten(2, (self.patch_frames, self.patch_bands)).unflatten(1, (-1, self.columns))
        return cut.transpose(2, 3).flatten(3).flatten(1, 2)


class TimePositions(nn.Module):
    """Fixed positions in order of time: those of a shorter input are the first ones."""

    def __init__(self, table: Tensor):
        """table: (L, D) of the longest input."""
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", table[None])

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, None]:
        """Add positions, then keep what is visible. Raises: ValueError if the input is longer than the longest."""
        length, most = tokens.shape[1], self.table.shape[1]
        if length > most:
            raise ValueError(f"frames: {length} patches are more than the {most} of the longest input (model.frames); cut it")
        return take(tokens + self.table[:, :length].to(tokens.dtype), mask), None


def interleaved(length: int, dim: int) -> Tensor:
    """(length, dim) codes of a sequence, the sine and the cosine of a frequency adjacent (arXiv:1706.03762, section 3.5).

    Raises: ValueError if `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"hidden_size: {dim} is not a multiple of 2, which sine-cosine positions need")
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1).float()
