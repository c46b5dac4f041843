"""Images to views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from mmssl.masks import blocks, uniform
from mmssl.random import generator, key
from mmssl.registry import Views
from mmssl.types import Mask, View
from modalities.vision.augment import Change, Crop, check_box, check_crop, policy, recoloured, told
from modalities.vision.batched import changed, finished
from modalities.vision.masks import (
    block_size,
    block_sizes,
    equal_context,
    mixed,
    multiblock,
    rectangles,
    units,
    usual_context,
    why_not_multiblock,
)
from modalities.vision.pixels import cut, floats, read

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ONE_CROP = ((0.2, 1.0), (3 / 4, 4 / 3), 0.5, 0.0)  # scale, aspect, flip, jitter


@dataclass(frozen=True)
class MaskOptions:
    """Which patches to hide; the defaults are those of the image base recipe of data2vec 2.0.

    block: squares of data2vec 2.  rectangle: BEiT, data2vec 1 and CAE.  random: single patches, MAE.  unit: squares in rank
    and file, SimMIM.  mixed: nothing or rectangles, iBOT.  multiblock: all but a large block less some blocks, which are
    predicted one apart from the other, I-JEPA.
    """

    kind: Literal["block", "rectangle", "random", "unit", "mixed", "multiblock"] = "block"
    ratio: float = 0.8  # of block, rectangle, random and unit
    adjust: float = 0.07  # of blocks: share drawn in addition, since they overlap
    width: int = 3  # of blocks and units: patches
    copies: int = 16
    inverse: bool = True  # of blocks: they are what is kept
    smallest: int = 16  # of rectangles, mixed or not: patches
    aspect: float = 0.3  # of rectangles: least height / width, the greatest is its inverse
    share: float = 0.5  # of mixed: of the masks that hide something
    ratios: tuple[float, float] = (0.1, 0.5)  # of mixed: what those hide is between
    targets: int = 4  # of multiblock: blocks to predict
    target_scale: tuple[float, float] = (0.15, 0.2)  # share of the patches in each
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width
    context_scale: tuple[float, float] = (0.85, 1.0)  # share of the patches in the large block
    min_keep: int = 10  # patches that every block has more of, and what is left of the large one
    published: bool = False  # leaves out the last row and column, and patches of the context from the end

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class ImageViews(Views):
    """A random crop, flipped at random, with its masks; or several crops, listed or those of a published policy.

    `crops` is an option, the kinds of crops, and an attribute, the number of those smaller than the model's image. With
    `on_device` workers draw, decode and cut, and what else is done to a crop is done to a whole batch by `finish`.
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
        on_device: bool = False,
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
        self.replaces = mask is not None and mask.kind == "mixed"  # masks are for encoders that see all places
        self.shares = mask is not None and mask.kind == "multiblock"  # all samples of an update have blocks of one size
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32) * 255 for values in (mean, std))
        self.gain, self.shift = (v[:, None, None] for v in (1 / self.std, -self.mean / self.std))
        both = zip(mean * (features.channels // len(mean)), std * (features.channels // len(std)))
        self.per_channel = [(1 / (255 * s), -m / s) for m, s in both]  # numbers of the host, for any device
        self.kinds = _one_by_one(crops, features)
        if self.kinds:
            self.count = sum(crop.size == self.size for crop in self.kinds)
            self.crops = len(self.kinds) - self.count
        self.on_device = on_device
        if on_device and not self.kinds:
            raise ValueError("on_device: changes crops of views.crops, and there are none; leave it out")
        if on_device and any(crop.noise for crop in self.kinds):
            raise ValueError("on_device: noise of crops is drawn in workers; leave out either")
        if mask is not None:
            _check_mask(mask, self.grid)

    def __call__(
        self, sample: Image.Image, draw: Callable[[int], torch.Generator], length: int | None = None
    ) -> dict[str, Tensor]:
        """The crops of an image and the masks of those of full size.

        Returns: x (C, H, W) float, normalised, or uint8 for `finish`; if the recipe masks, hidden (M, L) bool, or seed ()
            int64 of masks that depend on the batch. Where `crops` is given, the names of view i begin with `i.`, and beside
            them is its record (22,) float32, see `told`.
        """
        image = self._in_mode(sample)
        if not self.kinds:
            return self._one(image, draw(0))
        tensors, pixels = {}, read(image)
        for i, crop in enumerate(self.kinds):
            assert crop.size is not None
            source = draw(i)
            left, top, width, height = box = crop_box(*image.size, crop.scale, crop.aspect, source)
            change = Change.drawn(crop, source)
            x = cut(pixels, box, crop.size, crop.interpolation)
            if self.on_device:
                x = x[: self.channels].contiguous()
            else:
                x = change.finished(self._normalised(change.applied(x, crop.order)))
            shares = (left / image.width, top / image.height, width / image.width, height / image.height)
            view = {"x": x, "record": torch.tensor((*shares, *change.numbers()))}
            if self.mask is not None and i < self.count:
                view |= self._hidden(source)
            tensors |= {f"{i}.{name}": tensor for name, tensor in view.items()}
        return tensors

    def _one(self, image: Image.Image, source: torch.Generator) -> dict[str, Tensor]:
        """One crop without a policy."""
        left, top, width, height = crop_box(*image.size, self.scale, self.aspect, source)
        flip = bool(torch.rand((), generator=source) < self.flip)
        x = self._full(image, (left, top, left + width, top + height))
        if self.jitter:
            x = recoloured(x, *jitter(self.jitter, source))
        x = self._normalised(x.flip(-1) if flip else x)
        return {"x": x} if self.mask is None else {"x": x, **self._hidden(source)}

    def _hidden(self, draw: torch.Generator) -> dict[str, Tensor]:
        """`hidden` (M, L) bool, or the `seed` of what is drawn when samples are collated."""
        m = self.mask
        assert m is not None
        if m.kind == "multiblock":
            return {"seed": torch.randint(2**63 - 1, (), generator=draw)}
        if m.kind == "rectangle":
            hidden = rectangles(self.grid, m.copies, m.ratio, m.smallest, m.aspect, draw)
        elif m.kind == "random":
            hidden = uniform(self.grid[0] * self.grid[1], m.copies, m.ratio, draw)
        elif m.kind == "unit":
            hidden = units(self.grid, m.copies, m.ratio, m.width, draw)
        elif m.kind == "mixed":
            hidden = mixed(self.grid, m.copies, m.share, m.ratios, m.smallest, m.aspect, draw)
        else:
            hidden = blocks(self.grid, m.copies, m.ratio, m.width, m.adjust, draw, m.inverse)
        return {"hidden": hidden}

    def _mask(self, hidden: Tensor | None, seeds: Tensor | None, shared: int | None) -> Mask | None:
        """The masks of a batch.

        Args:
            hidden: (B, M, L) bool, True = masked.  seeds: (B,) int64, of masks yet to be drawn.
            shared: seed of what the masks of an update have in common on all ranks.
        """
        m = self.mask
        if m is None or (hidden is None and seeds is None):
            return None
        if hidden is not None:
            return Mask.replacing(hidden.flatten(0, 1)) if m.kind == "mixed" else Mask.of(hidden.flatten(0, 1))
        assert seeds is not None
        each = seeds.tolist()
        # Where the update is known, what samples have in common is drawn for it, so that ranks agree; places are the sample's.
        u = torch.rand(2, generator=generator(each[0] if shared is None else shared, "sizes"), dtype=torch.float64).tolist()
        sizes = (
            block_size(self.grid, m.context_scale, (1.0, 1.0), u[0]),
            block_size(self.grid, m.target_scale, m.target_aspect, u[1]),
        )
        rest = (m.targets, m.min_keep)
        size = None if shared is None or m.published else usual_context(self.grid, *sizes, *rest)
        rows = [multiblock(self.grid, m.copies, *sizes, *rest, generator(seed, "places"), m.published, size) for seed in each]
        outside, wanted = equal_context(rows, each, m.published, size)
        return Mask.of(outside)._replace(wanted=wanted)

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[View]:
        """Stack; the masks of a sample stay adjacent. `shared` of a sample is the seed of what its update has in common."""
        views, seed = [], samples[0].get("shared")
        for i, prefix in enumerate([f"{i}." for i in range(len(self.kinds))] or [""]):
            names = [name for name in samples[0] if name.startswith(prefix) and name != "shared"]
            own = {name.removeprefix(prefix): torch.stack([sample[name] for sample in samples]) for name in names}
            shared = None if seed is None else key(int(seed), i)
            x, mask = own.pop("x"), self._mask(own.pop("hidden", None), own.pop("seed", None), shared)
            views.append(View(x, "vision", mask=mask, record=told(own["record"]) if own else {}))
        return views

    @torch.no_grad()
    def finish(self, views: list[View]) -> list[View]:
        """What the crops of workers still lack, each by its record: colours, flips and the like, then normalisation."""
        return [
            view._replace(x=self._finished(view, crop)) if view.x.dtype == torch.uint8 else view
            for view, crop in zip_longest(views, self.kinds[: len(views)])
        ]

    def _finished(self, view: View, crop: Crop) -> Tensor:
        with torch.autocast(view.x.device.type, enabled=False):
            x = changed(view.x, view.record, crop)
            for channel, (gain, shift) in enumerate(self.per_channel):
                x[:, channel].mul_(gain).add_(shift)
            return finished(x, view.record, crop)

    def plain(self, samples: Sequence[Image.Image]) -> View:
        """The shorter side resized to the image size, centre crop."""
        images = [self._in_mode(sample) for sample in samples]
        return View(torch.stack([self._normalised(self._full(i, centre_box(i.width, i.height))) for i in images]), "vision")

    def _in_mode(self, image: Image.Image) -> Image.Image:
        mode = "L" if self.channels == 1 else "RGB"
        return image if image.mode == mode else image.convert(mode)

    def _full(self, image: Image.Image, box: tuple[float, float, float, float]) -> Tensor:
        """Cut `box` and resize it to the image size in one go: (C, H, W) float32 from 0 to 255.

        Departs from torchvision, which cuts first: at the edge the filter sees the pixels around the box.
        """
        return floats(read(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)))

    def _normalised(self, x: Tensor) -> Tensor:
        """(C, H, W), in place."""
        return x.mul_(self.gain).add_(self.shift)  # addcmul takes four times as long where factors are few


def _check_mask(m: MaskOptions, grid: tuple[int, int]) -> None:
    """Whether masks can be drawn. Raises: ValueError that begins with the option."""
    length = grid[0] * grid[1]
    share = 1 - m.ratio if m.inverse and m.kind == "block" else m.ratio
    if m.kind == "mixed":
        if not (0 <= m.ratios[0] <= m.ratios[1] < 1 and m.ratios[1] * length >= 1):
            raise ValueError(
                f"mask.ratios: from {m.ratios[0]} to {m.ratios[1]}, must rise, stay below 1 and hide a patch or more"
            )
        if not 0 < m.share <= 1:
            raise ValueError(f"mask.share: {m.share}, must be above 0 and at most 1")
    elif m.kind != "multiblock" and not (0 < m.ratio < 1 and 0 < math.floor(length * share) < length):
        raise ValueError(f"mask.ratio: {m.ratio} of {length} patches leaves nothing or everything visible")
    fits = 1 <= m.width <= min(grid) or m.kind not in ("block", "unit")
    if not 1 <= m.copies <= 1024 or not fits or not -1 < m.adjust < 1:
        raise ValueError(f"mask: copies must be between 1 and 1024, width between 1 and {min(grid)}, adjust between -1 and 1")
    if m.kind == "unit" and (grid[0] % m.width or m.width == min(grid)):
        sides = [n for n in range(1, min(grid)) if min(grid) % n == 0]
        raise ValueError(
            f"mask.width: {m.width}, squares must divide the {grid[0]} x {grid[1]} patches; take one of "
            f"{', '.join(map(str, sides))}"
        )
    if m.smallest < 1 or not 0 < m.aspect <= 1:
        raise ValueError("mask: smallest must be at least 1 patch, aspect above 0 and at most 1")
    if m.kind == "multiblock":
        _check_multiblock(m, grid)


def _check_multiblock(m: MaskOptions, grid: tuple[int, int]) -> None:
    for name, (low, high) in {"target_scale": m.target_scale, "context_scale": m.context_scale}.items():
        if not 0 < low <= high <= 1:
            raise ValueError(f"mask.{name}: from {low} to {high}, must be above 0, rise, and be at most 1")
    if not 0 < m.target_aspect[0] <= m.target_aspect[1]:
        raise ValueError(f"mask.target_aspect: from {m.target_aspect[0]} to {m.target_aspect[1]}, must be above 0 and rise")
    if not 1 <= m.targets <= 64 or m.min_keep < 0:
        raise ValueError(f"mask: targets is {m.targets}, must be between 1 and 64; min_keep is {m.min_keep}, at least 0")
    for context in block_sizes(grid, m.context_scale, (1.0, 1.0)):
        for target in block_sizes(grid, m.target_scale, m.target_aspect):
            if trouble := why_not_multiblock(context, target, m.min_keep):
                raise ValueError(trouble)


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


def jitter(strength: float, draw: torch.Generator) -> tuple[list[float], list[int]]:
    """Factors of brightness, contrast and saturation, from 1 - strength to 1 + strength, and the order in which they come."""
    factors = (1 + strength * (2 * torch.rand(3, generator=draw, dtype=torch.float64) - 1)).tolist()
    return factors, torch.randperm(3, generator=draw).tolist()


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
