"""Positions, and the choice of visible tokens that goes with them.

A position module maps (features (B, L, D), mask, pad) to the visible tokens (M*B, L_visible, D) and a bias of the attention,
additive, (M*B or 1, heads, E + L_visible, E + L_visible), or how queries and keys turn, or None.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.model.attention import Turns
from mmssl.types import Mask


def take(tokens: Tensor, mask: Mask | None) -> Tensor:
    """The visible tokens under each mask.

    Args:
        tokens: (B, L, D), one row a sample; not repeated for its M masks.
        mask: rows (M*B, L), or None for all tokens.
    Returns: (M*B, L_visible, D).
    """
    if mask is None:
        return tokens
    samples, length, dim = tokens.shape
    rows, kept = mask.keep.shape
    first = torch.arange(samples, device=tokens.device).mul_(length).repeat_interleave(rows // samples)  # (M*B,)
    return tokens.reshape(samples * length, dim).index_select(0, (mask.keep + first[:, None]).flatten()).view(rows, kept, dim)


def take_at(x: Tensor, places: Tensor) -> Tensor:
    """What is at given places of each row.

    Args:
        x: (B, L, ...), one row a sample.  places: (M*B, n) int64, the M rows of a sample adjacent.
    Returns: (M*B, n, ...).
    """
    rows = torch.arange(len(x), device=x.device).repeat_interleave(len(places) // len(x))
    return x[rows[:, None], places]


def take_pad(pad: Tensor | None, mask: Mask | None) -> Tensor | None:
    """Which of the visible tokens are padding. pad: (B, L) -> (M*B, L_visible); None stays None."""
    if pad is None or mask is None:
        return pad
    return pad.repeat_interleave(mask.keep.shape[0] // pad.shape[0], 0).gather(1, mask.keep)


def restore(visible: Tensor, fillers: Tensor, mask: Mask) -> Tensor:
    """Visible tokens back in place, fillers where the mask hid.

    Args:
        visible: (R, L_visible, D).  fillers: (R, L - L_visible, D).  mask: rows (R, L).
    Returns: (R, L, D).
    """
    both = torch.cat([visible, fillers], dim=1)
    rows, length, dim = both.shape
    first = torch.arange(rows, device=both.device).mul_(length)
    return both.reshape(rows * length, dim).index_select(0, (mask.restore + first[:, None]).flatten()).view(rows, length, dim)


class NoPositions(nn.Module):
    """For features that know their place."""

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, None]:
        """Keep what is visible."""
        return take(tokens, mask), None


class SinCos2d(nn.Module):
    """Fixed sine-cosine positions of a grid.

    The first half of the channels encodes the column, the second the row; each half holds the sines, then the cosines,
    of position * 10000^(-i / (D/4)). Another number of tokens is a square image of another size, whose patches lie evenly
    over the same grid: position (i + 1/2) * G/g - 1/2 for g patches where there would be G. All is multiplied by `scale`.
    """

    def __init__(self, dim: int, grid: tuple[int, int], scale: float = 1.0):
        super().__init__()
        if dim % 4:
            raise ValueError(f"hidden_size: {dim} is not a multiple of 4, which sine-cosine positions need")
        self.dim, self.grid, self.scale = dim, grid, scale
        self.table: Tensor
        self.register_buffer("table", self._code(*grid))
        self._others: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, None]:
        """Add positions, then keep what is visible."""
        return take(tokens + self._table(tokens).to(tokens.dtype), mask), None

    def fitted(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a model for images of another size: its places are computed, not learned."""
        return saved | {"table": self.table}

    def _table(self, tokens: Tensor) -> Tensor:
        """(1, L, D) for that many tokens."""
        length = tokens.shape[1]
        if length == self.table.shape[1]:
            return self.table
        if (length, tokens.device) not in self._others:
            side = math.isqrt(length)
            if side * side != length:
                raise ValueError(f"image_size: {length} patches form no square, which positions of a smaller image need")
            self._others[length, tokens.device] = self._code(side, side).to(tokens.device)
        return self._others[length, tokens.device]

    def _code(self, rows: int, columns: int) -> Tensor:
        """(1, rows * columns, D) fp32."""
        frequency = 10000.0 ** (-torch.arange(self.dim // 4, dtype=torch.float64) / (self.dim // 4))

        def code(count: int, whole: int) -> Tensor:  # (count, D/2)
            position = (torch.arange(count, dtype=torch.float64) + 0.5) * whole / count - 0.5
            angle = position[:, None] * frequency
            return torch.cat([angle.sin(), angle.cos()], dim=1)

        column, row = code(columns, self.grid[1]), code(rows, self.grid[0])
        both = torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, 0)], dim=1)
        return self.scale * both[None].float()


class Rotary2d(nn.Module):
    """Places of a square grid as `Turns` of queries and keys; tokens stay as they are, and extra tokens do not turn.

    The centres of the patches lie evenly from -1 to 1 whatever the size of the image, and a turn is 2 pi (DINOv3,
    arXiv:2508.10104, section 3.2). The shifts and stretches of places in its training are left out.
    """

    def __init__(self, dim: int, extra: int, base: float = 100.0):
        super().__init__()
        if base <= 0:
            raise ValueError(f"rotary_base: {base}, must be above 0")
        self.dim, self.extra, self.base = dim, extra, base
        Turns.of(torch.zeros(1, 1, 2), dim, base)  # or says why not

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, Turns]:
        """Keep what is visible; turns of those tokens."""
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"image_size: {tokens.shape[1]} patches form no square, which rotary positions need")
        centre = (torch.arange(side, device=tokens.device, dtype=torch.float32) + 0.5) * (2 / side) - 1
        places = 2 * math.pi * torch.cartesian_prod(centre, centre)[None]  # (1, L, 2)
        if mask is not None:
            places = places[0][mask.keep]  # (M*B, L_visible, 2)
        return take(tokens, mask), Turns.of(F.pad(places, (0, 0, self.extra, 0)), self.dim, self.base)


class RelativeBias(nn.Module):
    """A learned attention bias for each pair of rows and columns apart, shared by all blocks, as in BEiT (arXiv:2106.08254).

    The extra token has biases of its own: towards patches, from patches, towards itself.
    """

    def __init__(self, grid: tuple[int, int], heads: int, extra: int):
        super().__init__()
        if extra > 1:
            raise ValueError(f"extra_tokens: {extra}, relative positions know at most one")
        rows, columns = grid
        self.table = nn.Embedding((2 * rows - 1) * (2 * columns - 1) + 3, heads)
        nn.init.zeros_(self.table.weight)
        self.grid, self.extra = grid, extra

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keep what is visible; biases of those pairs."""
        rows, columns = self.grid
        if tokens.shape[1] != rows * columns:
            raise ValueError(
                f"positions: relative ones know images of {rows} x {columns} patches, this has {tokens.shape[1]}; "
                "smaller crops need positions=sincos"
            )
        place = torch.arange(rows * columns, device=tokens.device)
        row, column = place // columns, place % columns
        apart = (row[:, None] - row + rows - 1) * (2 * columns - 1) + column[:, None] - column + columns - 1  # (L, L)
        index = F.pad(apart, (self.extra, 0, self.extra, 0))
        if self.extra:
            last = self.table.num_embeddings
            index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
        index = index[None]
        if mask is not None:
            keep = F.pad(mask.keep + self.extra, (self.extra, 0))  # (M*B, E + L_visible)
            index = index[0][keep[:, :, None], keep[:, None, :]]
        bias = self.table(index).permute(0, 3, 1, 2)  # (1 or M*B, H, E + L_visible, E + L_visible)
        return take(tokens, mask), bias


class Alibi(nn.Module):
    """Attention biases that fall linearly with the distance of two tokens, with a learned scale for each head.

    Source: arXiv:2108.12409, made symmetric and scaled as in data2vec 2.0.
    """

    def __init__(self, heads: int, extra: int = 0):
        super().__init__()
        self.extra = extra
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, length: int, keep: Tensor | None = None) -> Tensor:
        """(1 or R, H, E + L, E + L), fp32 or higher.

        Args:
            keep: (R, L_visible) original places of the tokens; all of `length` if None. Distances are those of the places.
        """
        scale = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32))  # bf16 cannot count to 300
        place = torch.arange(length, device=scale.device)[None] if keep is None else keep
        apart = (place[:, None, :, None] - place[:, None, None, :]).abs()  # (R, 1, L, L)
        strength = slopes(len(scale), scale) * scale.clamp(min=0)
        return F.pad(-strength[:, None, None] * apart, (self.extra, 0, self.extra, 0))


def slopes(heads: int, like: Tensor) -> Tensor:
    """(heads,): 2^(-8i/H) for i = 1..H; if H is no power of two, those of the power below, then every second one of the
    power above. `like` gives device and dtype.
    """
    power = 1 << (heads.bit_length() - 1)
    i = torch.arange(1, heads + 1, device=like.device, dtype=like.dtype)
    return torch.exp2(torch.where(i <= power, -8 * i, -4 * (2 * (i - power) - 1)) / power)


class ConvPositions(nn.Module):
    """A stack of grouped convolutions whose output is added to the features; each layer is convolution, layer norm over
    channels without weights, GELU (arXiv:2202.03555, section 4).

    It sees masked frames as zeros, so that a frame beside a masked one learns nothing of it. Padding is zero before each
    layer, so that features do not depend on what a sample is batched with (the authors' layers refill it).
    """

    def __init__(self, dim: int, layers: int, kernel: int, groups: int, bias: Alibi | None = None):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups) for _ in range(layers))
        self.bias = bias
        self.trim = kernel % 2 == 0  # an even kernel gives one frame too many

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Add positions, then keep what is visible; biases of those pairs."""
        copies = 1 if mask is None else mask.hidden.shape[0] // tokens.shape[0]
        x = tokens.repeat_interleave(copies, 0) if copies > 1 else tokens
        if mask is not None:
            x = x.masked_fill(mask.hidden[..., None], 0.0)
        blank = None if pad is None else pad.repeat_interleave(copies, 0)[:, None]  # (M*B, 1, L)
        x = x.transpose(1, 2)
        for conv in self.convs:
            x = conv(x if blank is None else x.masked_fill(blank, 0.0))
            x = (x[..., :-1] if self.trim else x).transpose(1, 2)
            x = F.gelu(F.layer_norm(x, x.shape[-1:])).transpose(1, 2)
        code = x.transpose(1, 2)
        if mask is not None:
            code = code.gather(1, mask.keep[..., None].expand(-1, -1, code.shape[-1]))
        bias = None if self.bias is None else self.bias(tokens.shape[1], None if mask is None else mask.keep)
        return take(tokens, mask) + code, bias


def attention_bias(
    bias: Tensor | Turns | None, pad: Tensor | None, extra: int, attend: Tensor | None = None
) -> Tensor | Turns | None:
    """What attention adds, with padding hidden as keys.

    Args:
        bias: additive, (R or 1, H, E + L, E + L), or turns, or None.
        pad: (R, L) bool, True = padding, or None.
        attend: (R, L) bool, the tokens that are keys, True = attend, or None for all.
    Returns: additive bias, -inf at what is hidden; or bool (R, 1, 1, E + L), True = attend, if there is no bias; or None; or
        turns that hold one of them.
    """
    if isinstance(bias, Turns):
        return bias._replace(bias=_hiding(bias.bias, pad, extra, attend))
    return _hiding(bias, pad, extra, attend)


def _hiding(bias: Tensor | None, pad: Tensor | None, extra: int, attend: Tensor | None) -> Tensor | None:
    hide = pad if attend is None else ~attend if pad is None else pad | ~attend
    if hide is None:
        return bias
    hide = F.pad(hide, (extra, 0))[:, None, None]  # extra tokens are always keys
    return ~hide if bias is None else bias.masked_fill(hide, -math.inf)


class WeightNormConv(nn.Module):
    """A grouped convolution whose weight has a learned length at each tap, over all channels (arXiv:1602.07868).

    (B, D, L) -> (B, D, L), or L + 1 frames if the kernel is even. The weight is made in forward, where its parameters may be
    read; torch's parametrisation reads them elsewhere, which sharded ones do not survive.
    """

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups, self.padding = groups, kernel // 2
        self.v = nn.Parameter(torch.empty(dim, dim // groups, kernel).normal_(std=math.sqrt(4 / (kernel * dim))))
        self.g = nn.Parameter(self._lengths().detach().to(self.v.dtype))  # (1, 1, K)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with zeros on both sides."""
        weight = self.v * (self.g / self._lengths())
        return F.conv1d(x, weight.to(self.v.dtype), self.bias, padding=self.padding, groups=self.groups)

    def _lengths(self) -> Tensor:
        """(1, 1, K), fp32 or higher: each is a sum over tens of thousands of squares."""
        wide = torch.promote_types(self.v.dtype, torch.float32)
        return torch.linalg.vector_norm(self.v, dim=(0, 1), keepdim=True, dtype=wide)


class SingleConvPositions(nn.Module):
    """One wide grouped convolution and GELU, whose output is added to the features (arXiv:2006.11477, section 2).

    It sees padding as zeros, and masked frames too where the transformer does not see them.
    """

    def __init__(self, dim: int, kernel: int, groups: int, bias: Alibi | None = None):
        super().__init__()
        self.conv, self.bias = WeightNormConv(dim, kernel, groups), bias

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Add positions, then keep what is visible; biases of those pairs."""
        x = tokens if pad is None else tokens.masked_fill(pad[..., None], 0.0)
        if mask is not None:
            x = x.repeat_interleave(len(mask.hidden) // len(x), 0).masked_fill(mask.hidden[..., None], 0.0)
        code = F.gelu(self.conv(x.transpose(1, 2))[..., : tokens.shape[1]]).transpose(1, 2)  # an even kernel gives one too many
        bias = None if self.bias is None else self.bias(tokens.shape[1], None if mask is None else mask.keep)
        return take(tokens, mask) + take(code, mask), bias


class Learned2d(nn.Module):
    """A learned vector for each place of a grid, as in ViT (arXiv:2010.11929). Extra tokens have none.

    Another number of tokens is a square image of another size: the grid is interpolated, bicubic, with its corners where they
    are in the image.
    """

    def __init__(self, dim: int, grid: tuple[int, int], std: float = 0.02):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim).normal_(std=std))

    def forward(self, tokens: Tensor, mask: Mask | None = None, pad: Tensor | None = None) -> tuple[Tensor, None]:
        """Add positions, then keep what is visible."""
        return take(tokens + self._table(tokens.shape[1]).to(tokens.dtype), mask), None

    def fitted(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a model for square images of another size: its places are interpolated."""
        table = saved.get("table")
        side = 0 if table is None else math.isqrt(table.shape[1])
        if table is None or side * side != table.shape[1] or table.shape == self.table.shape:
            return saved
        return saved | {"table": _resized(table, (side, side), self.grid)}

    def _table(self, length: int) -> Tensor:
        """(1, L, D) for that many tokens."""
        if length == self.table.shape[1]:
            return self.table
        side = math.isqrt(length)
        if side * side != length:
            raise ValueError(f"image_size: {length} patches form no square, which positions of another image size need")
        return _resized(self.table, self.grid, (side, side))


def _resized(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(1, rows * columns, D) of one grid -> of the other."""
    places = table.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    return F.interpolate(places, size, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
