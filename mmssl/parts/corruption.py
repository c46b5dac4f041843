"""Images of which a student sees something else: rectangles overwritten, noise, a region removed; all by a sample's own key.

Images are normalised, so that zero is the mean colour of the data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl import random
from mmssl.distributed import all_sum, gather_rows, rank, world

NoiseKind = Literal["masking", "gaussian", "salt"]


class Corrupted(NamedTuple):
    """Images and where they are not what they were."""

    x: Tensor  # (B, C, H, W) what is seen
    altered: Tensor  # (B, 1, H, W) or (B, C, H, W) bool, True = altered


def rank_share(counted: Tensor) -> Tensor:
    """() factor that makes a mean over this rank's values one over those of all ranks, whose numbers differ; 1 if they agree.

    Args:
        counted: bool of any shape, True = a value that this rank's mean is over.
    """
    own = counted.sum().double()
    return (own * world() / all_sum(own).clamp(min=1)).float()


# Rectangles -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupOptions:
    """How groups of pixels are overwritten; the defaults are those of GMML."""

    share: float = 0.75  # of an image's pixels: drawn between 0.5 and this, or this if it is less
    fill: Literal["noise", "zeros"] = "noise"
    align: int = 1  # rectangles begin and end at multiples of so many pixels
    largest: float = 0.3  # side of a rectangle, as a share of the image's
    paste: float = 0.5  # chance of an image that another one is pasted into it instead
    paste_share: float = 0.3  # of its pixels, as `share`

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    def check(self, size: int) -> None:
        """Raises: ValueError that begins with `corruption.` and the option that images of `size` pixels cannot have."""
        for name in ("share", "paste_share"):
            if not 0 < getattr(self, name) <= 0.9:
                raise ValueError(f"corruption.{name}: {getattr(self, name)}, must be above 0 and at most 0.9")
        if not 0 <= self.paste <= 1:
            raise ValueError(f"corruption.paste: {self.paste}, must be a probability")
        if not 0 < self.largest <= 1:
            raise ValueError(f"corruption.largest: {self.largest}, must be above 0 and at most 1")
        if self.align < 1 or size % self.align or self.align == size:
            raise ValueError(
                f"corruption.align: {self.align}, must divide the {size} pixels of an image (model.image_size); take 1 or "
                "model.patch_size"
            )

    def check_batch(self, samples: int) -> None:
        """Raises: ValueError if there is no other image in a batch to paste."""
        if self.paste and samples < 2:
            raise ValueError(
                "corruption.paste: needs another image in a micro-batch of 1 sample (of all ranks); set it to 0 or raise "
                "train.global_batch"
            )


@torch.no_grad()
def overwritten(x: Tensor, keys: Sequence[int], options: GroupOptions) -> Corrupted:
    """Rectangles are overwritten until a drawn share of an image is altered: by noise or zeros, or by what another image has
    there. The other one is the next of the batch of all ranks, so that it is the same on any number of them.

    Args:
        x: (B, C, H, W), square.  keys: B seeds.
    Returns: altered (B, 1, H, W), all that was overwritten.
    Source: arXiv:2205.14986 and arXiv:2104.03602, and their authors' code. Departs from it: rectangles begin anywhere, there
        never in the last cell; the other image is the next one, there any one, even itself.
    """
    fate, place = random.uniform([random.key(key, "fate") for key in keys], (2,), x.device).unbind(1)
    pasted = fate < options.paste
    most = torch.where(pasted, options.paste_share, options.share)
    least = most.clamp(max=0.5)
    altered = covered(least + (most - least) * place, x.shape[-1], options.align, options.largest, keys)[:, None]
    content = torch.zeros_like(x)
    if options.fill == "noise":
        content = random.normal([random.key(key, "noise") for key in keys], x.shape[1:], x)
    if options.paste:
        others = gather_rows(x).roll(-1, 0)[rank() :: world()]
        content = torch.where(pasted[:, None, None, None], others, content)
    return Corrupted(torch.where(altered, content, x), altered)


def covered(share: Tensor, size: int, align: int, largest: float, keys: Sequence[int]) -> Tensor:
    """The first of some random rectangles, just as many as it takes to cover a share of an image.

    So many are drawn for all images that hardly ever one remains with less; there is no look at the device in between.

    Args:
        share: (B,) in (0, 0.9].  size: of the image, pixels; a multiple of `align`, which sides and places are, too.
        largest: side of a rectangle, as a share of the image's; sides are uniform from `align` on.
        keys: B seeds.
    Returns: (B, size, size) bool, True = covered.
    """
    side = size // align  # in cells of align x align pixels, as all that follows
    longest = max(1.0, largest * side)
    usual = (1 + longest) / 2
    area = (usual * (1 - usual / (2 * side)) / side) ** 2  # of what lies within the image
    count = 16 + math.ceil(3 * math.log(0.1) / math.log1p(-min(area, 0.9)))
    u = random.uniform([random.key(key, "rectangles") for key in keys], (4, count), share.device)
    begin = (u[:, :2] * side).long().clamp(max=side - 1)  # (B, 2, count) rows, columns
    end = begin + (1 + u[:, 2:] * (longest - 1)).round().long()
    line = torch.arange(side, device=share.device)
    row, column = ((begin[..., None] <= line) & (line < end[..., None])).unbind(1)  # (B, count, side)
    number = torch.full((len(u), side, side), count, dtype=torch.int16, device=share.device)  # of a cell's first rectangle
    for k in reversed(range(count)):
        number.masked_fill_(row[:, k, :, None] & column[:, k, None, :], k)
    wanted = (share.double() * side * side).ceil().long().clamp(1, side * side)
    last = number.flatten(1).sort(1).values.gather(1, wanted[:, None] - 1).clamp(max=count - 1)  # (B, 1)
    return (number <= last[..., None]).repeat_interleave(align, 1).repeat_interleave(align, 2)


# Noise ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def noised(x: Tensor, keys: Sequence[int], kind: NoiseKind, level: float) -> Corrupted:
    """Each value of each pixel changed by chance.

    Args:
        x: (B, C, H, W).  keys: B seeds.
        kind: masking: zero instead; salt: the image's least or greatest value of the channel instead, either as likely;
            gaussian: noise in addition.
        level: the chance of a value that this happens; of gaussian, the standard deviation.
    Returns: altered (B, C, H, W); of gaussian, everything.
    Source: Vincent et al. 2010, JMLR 11, section 4.3, where salt and pepper are the extremes of the data set.
    """
    if kind == "gaussian":
        noise = random.normal([random.key(key, "noise") for key in keys], x.shape[1:], x)
        return Corrupted(x + level * noise, torch.ones_like(x, dtype=torch.bool))
    u = random.uniform([random.key(key, "altered") for key in keys], x.shape[1:], x.device)
    altered = u < level
    content = torch.zeros_like(x) if kind == "masking" else torch.where(u < level / 2, *_extremes(x))
    return Corrupted(torch.where(altered, content, x), altered)


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, 1, 1) least and greatest value of each channel of each image."""
    return x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)


# A region ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionOptions:
    """What is removed of an image; the defaults are those of the context encoder for images of 128 pixels."""

    kind: Literal["centre", "random"] = "centre"  # a square, or blobs that are drawn
    share: float = 0.25  # of an image's pixels
    overlap: int = 4  # of centre: pixels at the rim of the square that stay visible, and are asked for all the same
    blobs: int = 8  # of random: the most that fit along a side of the image

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    def check(self, size: int) -> None:
        """Raises: ValueError that begins with `region.` and the option that images of `size` pixels cannot have."""
        side = round(math.sqrt(max(self.share, 0)) * size)
        if not (0 < self.share < 1 and 0 < side < size):
            raise ValueError(f"region.share: {self.share} of {size} x {size} pixels, must leave some and remove some")
        if self.kind == "centre" and not 0 <= 2 * self.overlap < side:
            raise ValueError(
                f"region.overlap: {self.overlap} pixels, must be at least 0 and leave some of the {side} pixels of the square "
                f"hidden; take at most {(side - 1) // 2}"
            )
        if self.kind == "random" and not 2 <= self.blobs <= size:
            raise ValueError(f"region.blobs: {self.blobs}, must be between 2 and the {size} pixels of a side")


class Region(NamedTuple):
    """Of images, (B, 1, H, W) bool each; as many pixels of every image."""

    hidden: Tensor  # True = not seen
    asked: Tensor  # True = to be said: what is hidden, and perhaps a rim around it


@torch.no_grad()
def region(keys: Sequence[int], size: int, device: torch.device, options: RegionOptions) -> Region:
    """Regions of B images, B seeds.

    Blobs are where coarse noise, enlarged, is least, exactly the share of the image.

    Source: arXiv:1604.07379, section 3.3, and the authors' code. Departs from it: there all images of a batch have blobs of one
        shape, whose share is between 0.2 and 0.3.
    """
    if options.kind == "centre":
        side = round(math.sqrt(options.share) * size)
        line = torch.arange(size, device=device) - (size - side) // 2
        inner, outer = ((line >= rim) & (line < side - rim) for rim in (options.overlap, 0))
        squares = ((one[:, None] & one).expand(len(keys), 1, size, size) for one in (inner, outer))
        return Region(*squares)
    noise = random.uniform([random.key(key, "region") for key in keys], (1, options.blobs, options.blobs), device)
    height = F.interpolate(noise, (size, size), mode="bicubic").flatten(1)
    lowest = height.argsort(1)[:, : math.floor(options.share * size * size)]
    blobs = torch.zeros_like(height, dtype=torch.bool).scatter_(1, lowest, True).view(-1, 1, size, size)
    return Region(blobs, blobs)
