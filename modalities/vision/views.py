"""Images to views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from mmssl.masks import blocks
from mmssl.types import Mask, View
from modalities.vision.masks import rectangles

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MaskOptions:
    """Which patches to hide; the defaults are those of the image base recipe of data2vec 2.0."""

    kind: Literal["block", "rectangle"] = "block"  # squares of data2vec 2, rectangles of BEiT and data2vec 1
    ratio: float = 0.8
    adjust: float = 0.07  # of blocks: share drawn in addition, since they overlap
    width: int = 3  # of blocks
    copies: int = 16
    inverse: bool = True  # of blocks: they are what is kept
    smallest: int = 16  # of rectangles: patches
    aspect: float = 0.3  # of rectangles: least height / width, the greatest is its inverse

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class ImageViews:
    """A random crop, flipped at random, with its masks."""

    ragged: bool = False
    longest: int | None = None  # all views have one size
    count, crops = 1, 0

    def __init__(
        self,
        features: Any,
        scale: tuple[float, float] = (0.2, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        mask: MaskOptions | None = None,
    ):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: {scale}, must be two areas with 0 < smallest <= largest <= 1")
        if not 0 < aspect[0] <= aspect[1]:
            raise ValueError(f"aspect: {aspect}, must be two ratios width : height with 0 < smallest <= largest")
        if features.image_size > 8192:
            raise ValueError(f"image_size: {features.image_size}, at most 8192 pixels")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: {flip}, must be a probability")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: {jitter}, must be at least 0 and below 1")
        if len(mean) not in (1, features.channels) or len(std) not in (1, features.channels) or min(std) <= 0:
            raise ValueError(f"mean, std: need one number or {features.channels}, and std above 0")
        self.size, self.channels, self.grid = features.image_size, features.channels, features.grid
        self.scale, self.aspect, self.flip, self.jitter, self.mask = scale, aspect, flip, jitter, mask
        self.mean, self.std = np.asarray(mean, np.float32) * 255, np.asarray(std, np.float32) * 255
        if mask is not None:
            share = 1 - mask.ratio if mask.inverse and mask.kind == "block" else mask.ratio
            if not (0 < mask.ratio < 1 and 0 < math.floor(features.length * share) < features.length):
                raise ValueError(f"mask.ratio: {mask.ratio} of {features.length} patches leaves nothing or everything visible")
            if not 1 <= mask.copies <= 1024 or not 1 <= mask.width <= min(self.grid) or not -1 < mask.adjust < 1:
                raise ValueError(
                    f"mask: copies must be between 1 and 1024, width between 1 and {min(self.grid)}, adjust between -1 and 1"
                )
            if mask.smallest < 1 or not 0 < mask.aspect <= 1:
                raise ValueError("mask: smallest must be at least 1 patch, aspect above 0 and at most 1")

    def __call__(
        self, sample: Image.Image, draw: Callable[[int], torch.Generator], length: int | None = None
    ) -> dict[str, Tensor]:
        """One crop and its masks.

        Returns: x (C, H, W) float, normalised; hidden (M, L) bool if the recipe masks.
        """
        source = draw(0)
        left, top, width, height = crop_box(sample.width, sample.height, self.scale, self.aspect, source)
        flip = bool(torch.rand((), generator=source) < self.flip)
        change = jittered(self.jitter, source) if self.jitter else None
        tensors = {"x": self._tensor(sample, (left, top, left + width, top + height), flip, change)}
        if self.mask is not None:
            tensors["hidden"] = self._hidden(source)
        return tensors

    def _hidden(self, draw: torch.Generator) -> Tensor:
        """(M, L) bool."""
        m = self.mask
        assert m is not None
        if m.kind == "rectangle":
            return rectangles(self.grid, m.copies, m.ratio, m.smallest, m.aspect, draw)
        return blocks(self.grid, m.copies, m.ratio, m.width, m.adjust, draw, m.inverse)

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[View]:
        """Stack; the masks of a sample stay adjacent."""
        x = torch.stack([sample["x"] for sample in samples])
        mask = Mask.of(torch.cat([sample["hidden"] for sample in samples])) if self.mask is not None else None
        return [View(x, "vision", mask=mask)]

    def plain(self, samples: Sequence[Image.Image]) -> View:
        """The shorter side resized to the image size, centre crop."""
        return View(torch.stack([self._tensor(s, centre_box(s.width, s.height), False) for s in samples]), "vision")

    def _tensor(
        self,
        image: Image.Image,
        box: tuple[float, float, float, float],
        flip: bool,
        change: Callable[[Image.Image], Image.Image] | None = None,
    ) -> Tensor:
        """Cut `box`, resize it to the image size in one go, change colours, normalise. (C, H, W).

        Departs from torchvision, which cuts first: at the edge the filter sees the pixels around the box.
        """
        cut = image.convert("L" if self.channels == 1 else "RGB").resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        cut = cut if change is None else change(cut)
        pixels = np.asarray(cut, np.float32).reshape(self.size, self.size, self.channels)
        if flip:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(((pixels - self.mean) / self.std).transpose(2, 0, 1)))


def jittered(strength: float, draw: torch.Generator) -> Callable[[Image.Image], Image.Image]:
    """Brightness, contrast and saturation by factors from 1 - strength to 1 + strength, in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = (1 + strength * (2 * torch.rand(3, generator=draw, dtype=torch.float64) - 1)).tolist()
    order = torch.randperm(3, generator=draw).tolist()

    def change(image: Image.Image) -> Image.Image:
        for i in order:
            image = kinds[i](image).enhance(factors[i])
        return image

    return change


def centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred square: left, top, right, bottom in pixels."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def crop_box(
    width: int, height: int, scale: tuple[float, float], aspect: tuple[float, float], draw: torch.Generator
) -> tuple[int, int, int, int]:
    """A box of random area and aspect ratio, as torchvision's RandomResizedCrop draws it: left, top, width, height in pixels.

    After ten boxes that do not fit, the largest centred box within the aspect limits.
    """
    for _ in range(10):
        u = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u[0])
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u[1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=draw))
            top = int(torch.randint(height - h + 1, (), generator=draw))
            return left, top, w, h
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, max(w, 1), max(h, 1)
