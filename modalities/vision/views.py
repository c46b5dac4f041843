"""Images to views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from mmssl.masks import blocks
from mmssl.types import Mask, View
from modalities.vision.augment import Change, Crop, check_box, check_crop, policy
from modalities.vision.masks import rectangles

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ONE_CROP = ((0.2, 1.0), (3 / 4, 4 / 3), 0.5, 0.0)  # scale, aspect, flip, jitter


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
    """A random crop, flipped at random, with its masks; or several crops, listed or those of a published policy.

    `crops` is an option, the kinds of crops, and an attribute, the number of those smaller than the model's image.
    """

    ragged: bool = False
    longest: int | None = None  # all views have one size
    count, crops = 1, 0

    def __init__(
        self,
        features: Any,
        scale: tuple[float, float] = ONE_CROP[0],
        aspect: tuple[float, float] = ONE_CROP[1],
        flip: float = ONE_CROP[2],
        jitter: float = ONE_CROP[3],
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        mask: MaskOptions | None = None,
        crops: list[Crop] | str | None = None,
    ):
        check_box(scale, aspect)
        if features.image_size > 8192:
            raise ValueError(f"image_size: {features.image_size}, at most 8192 pixels")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: {flip}, must be a probability")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: {jitter}, must be at least 0 and below 1")
        if len(mean) not in (1, features.channels) or len(std) not in (1, features.channels) or min(std) <= 0:
            raise ValueError(f"mean, std: need one number or {features.channels}, and std above 0")
        if crops is not None and (tuple(scale), tuple(aspect), flip, jitter) != ONE_CROP:
            raise ValueError("scale, aspect, flip, jitter: each of the crops has its own; set them there, or crops=null")
        self.size, self.channels, self.grid = features.image_size, features.channels, features.grid
        self.scale, self.aspect, self.flip, self.jitter, self.mask = scale, aspect, flip, jitter, mask
        self.mean, self.std = np.asarray(mean, np.float32) * 255, np.asarray(std, np.float32) * 255
        self.kinds = _one_by_one(crops, features)
        if self.kinds:
            self.count = sum(crop.size == self.size for crop in self.kinds)
            self.crops = len(self.kinds) - self.count
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
        """The crops of an image and the masks of those of full size.

        Returns: x (C, H, W) float, normalised; hidden (M, L) bool if the recipe masks. Where `crops` is given, the names of
            view i begin with `i.`, and its record is beside them: box (4,), left, top, width and height as shares of the
            image, and what `Change.record` tells.
        """
        image = self._in_mode(sample)
        if not self.kinds:
            return self._one(image, draw(0))
        tensors = {}
        for i, crop in enumerate(self.kinds):
            assert crop.size is not None
            source = draw(i)
            left, top, width, height = crop_box(*image.size, crop.scale, crop.aspect, source)
            change = Change.drawn(crop, source)
            cut = image.resize((crop.size, crop.size), FILTERS[crop.interpolation], (left, top, left + width, top + height))
            shares = (left / image.width, top / image.height, width / image.width, height / image.height)
            x = change.finished(self._normalised(change.applied(cut, crop.order)))
            view = {"x": x, "box": torch.tensor(shares), **change.record()}
            if self.mask is not None and i < self.count:
                view["hidden"] = self._hidden(source)
            tensors |= {f"{i}.{name}": tensor for name, tensor in view.items()}
        return tensors

    def _one(self, image: Image.Image, source: torch.Generator) -> dict[str, Tensor]:
        """One crop without a policy."""
        left, top, width, height = crop_box(*image.size, self.scale, self.aspect, source)
        flip = bool(torch.rand((), generator=source) < self.flip)
        change = jittered(self.jitter, source) if self.jitter else None
        cut = self._full(image, (left, top, left + width, top + height))
        x = self._normalised(cut if change is None else change(cut), flip)
        return {"x": x} if self.mask is None else {"x": x, "hidden": self._hidden(source)}

    def _hidden(self, draw: torch.Generator) -> Tensor:
        """(M, L) bool."""
        m = self.mask
        assert m is not None
        if m.kind == "rectangle":
            return rectangles(self.grid, m.copies, m.ratio, m.smallest, m.aspect, draw)
        return blocks(self.grid, m.copies, m.ratio, m.width, m.adjust, draw, m.inverse)

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[View]:
        """Stack; the masks of a sample stay adjacent."""
        views = []
        for prefix in [f"{i}." for i in range(len(self.kinds))] or [""]:
            names = [name for name in samples[0] if name.startswith(prefix)]
            own = {name.removeprefix(prefix): torch.stack([sample[name] for sample in samples]) for name in names}
            x, hidden = own.pop("x"), own.pop("hidden", None)
            views.append(View(x, "vision", mask=None if hidden is None else Mask.of(hidden.flatten(0, 1)), record=own))
        return views

    def plain(self, samples: Sequence[Image.Image]) -> View:
        """The shorter side resized to the image size, centre crop."""
        images = [self._in_mode(sample) for sample in samples]
        return View(torch.stack([self._normalised(self._full(i, centre_box(i.width, i.height))) for i in images]), "vision")

    def _in_mode(self, image: Image.Image) -> Image.Image:
        mode = "L" if self.channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)

    def _full(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """Cut `box` and resize it to the image size in one go.

        Departs from torchvision, which cuts first: at the edge the filter sees the pixels around the box.
        """
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)

    def _normalised(self, image: Image.Image, flip: bool = False) -> Tensor:
        """(C, H, W)."""
        pixels = np.asarray(image).reshape(image.height, image.width, self.channels).transpose(2, 0, 1)
        x = np.empty(pixels.shape, np.float32)
        np.subtract(pixels[..., ::-1] if flip else pixels, self.mean[:, None, None], out=x)
        return torch.from_numpy(np.divide(x, self.std[:, None, None], out=x))


def _one_by_one(crops: list[Crop] | str | None, features: Any) -> list[Crop]:
    """One entry for each view, full size first. Raises: ValueError that begins with `crops`."""
    if crops is None:
        return []
    patch = getattr(features, "patch_size", 1)
    kinds = policy(crops, features.image_size, patch) if isinstance(crops, str) else crops
    for i, crop in enumerate(kinds):
        check_crop(crop, f"crops.{i}", features.image_size, patch)
    each = [replace(crop, size=crop.size or features.image_size) for crop in kinds for _ in range(crop.count)]
    smaller = [crop for crop in each if crop.size != features.image_size]
    if len(smaller) == len(each):
        raise ValueError(
            f"crops: at least one must be of full size, model.image_size={features.image_size}; leave its size out"
        )
    if smaller and getattr(features, "relative", False):
        raise ValueError("crops: relative positions know one size of image; set model.positions=sincos, or leave out size")
    return [crop for crop in each if crop.size == features.image_size] + smaller


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
