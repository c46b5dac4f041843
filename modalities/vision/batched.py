"""The same changes for a whole batch at once, where the model is; each image by what was drawn for it in a worker."""

from __future__ import annotations

import torch
from torch import Tensor

from modalities.vision.augment import COLOURS, UNCHANGED, Crop
from modalities.vision.pixels import blur_each, gradients, grey, solarize


def changed(pixels: Tensor, told: dict[str, Tensor], crop: Crop) -> Tensor:
    """What `Change.applied` makes of each image, but for noise.

    All images go through every step that the crop's options allow, with neutral numbers where theirs is not due: what is due
    for how many of them would have to be asked of the device.

    Args:
        pixels: (B, C, H, W) from 0 to 255, of any type.
        told: of each image, see `augment.told`.
    Returns: (B, C, H, W) float32 from 0 to 255, not rounded.
    """
    x = _where(told["flip"], pixels.flip(-1), pixels).to(torch.float32, copy=True)
    for step in crop.order:
        if step == "jitter":
            x = _recoloured(x, told, crop)
        elif step == "grey" and crop.grey:
            x = _where(told["grey"], grey(x), x)
        elif step == "blur" and crop.blur:
            x = blur_each(x, told["blur"], crop.blur_sigma[1])
        elif step == "solarize" and crop.solarize:
            x = _where(told["solarize"], solarize(x), x)
    for quarters in (1, 2, 3) if crop.rotate else ():
        # On each turn the images that are not there yet go on by a quarter.
        x = _where(told["rotation"] >= quarters, x.rot90(1, (-2, -1)), x)
    return x


def finished(x: Tensor, told: dict[str, Tensor], crop: Crop) -> Tensor:
    """What `Change.finished` makes of each normalised image, (B, C, H, W)."""
    if crop.cutout:
        height, width = x.shape[-2:]
        side = round(crop.cutout_side * width)
        across, down, due = told["cutout"].unbind(1)
        columns = _within((across * width).int() - side // 2, side, width)
        rows = _within((down * height).int() - side // 2, side, height)
        x = x.masked_fill((rows[:, :, None] & columns[:, None] & (due > 0)[:, None, None]).unsqueeze(1), 0)
    return _where(told["sobel"], gradients(x), x) if crop.sobel else x


def _recoloured(x: Tensor, told: dict[str, Tensor], crop: Crop) -> Tensor:
    """Each image's colours in its own sequence, in place."""
    for place in range(len(COLOURS)):
        for i, change in enumerate(COLOURS):
            if crop.jitter[i]:
                due = told["sequence"][:, place] == i
                factor = torch.where(due, told["colour"][:, i], UNCHANGED[i])
                x = change(x, factor.view(-1, 1, 1, 1))
    return x


def _within(first: Tensor, count: int, length: int) -> Tensor:
    """(B, length) bool, True from `first` (B,) on for `count` places."""
    places = torch.arange(length, device=first.device) - first[:, None]
    return (places >= 0) & (places < count)


def _where(due: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Of each image the one or the other. due: (B,) bool, or numbers of which 0 is no."""
    return torch.where(due.bool().view(-1, 1, 1, 1), one, other)
