"""Rebuilt images for people to look at."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmssl.types import Rebuilt, View

GAP, SHORTEST, GREY = 2, 64, 0.5  # pixels between images; least side of an image; where nothing was seen
SKETCH = 96  # pixels, least side of an image that stands alone


def draw(rebuilt: Rebuilt, views: Any, features: Any) -> Image.Image:
    """A column a sample: the image, what was seen of it or instead of it, and what was made of the rest."""
    hidden = rebuilt.hidden[..., None]
    mean, std = ((torch.as_tensor(each) / 255).view(1, -1, 1, 1) for each in (views.mean, views.std))

    def shown(patches: Tensor) -> Tensor:  # (R, C, H, W) in 0..1
        return features.unraw(patches.float()) * std + mean

    whole = shown(rebuilt.truth)
    if rebuilt.seen is None:
        seen = whole.masked_fill(features.unraw(hidden.expand_as(rebuilt.truth).float()) > 0, GREY)
    else:
        seen = shown(rebuilt.seen)
    rows = [whole, seen, shown(torch.where(hidden, rebuilt.guess, rebuilt.truth))]
    times = -(-SHORTEST // whole.shape[-1])
    grid = torch.stack(rows).clamp(0, 1).repeat_interleave(times, -1).repeat_interleave(times, -2)  # (3, R, C, H, W)
    framed = torch.nn.functional.pad(grid, (0, GAP, 0, GAP), value=1.0)
    sheet = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, C)
    pixels = (sheet * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def sketch(view: View, views: Any, features: Any, colours: Tensor | None = None) -> list[Image.Image]:
    """Each image of a plain view; beside it the colours of its patches, (B, L, 3) in 0..1, if they are given."""
    mean, std = ((torch.as_tensor(each) / 255).view(1, -1, 1, 1) for each in (views.mean, views.std))
    whole = (view.x.float().cpu() * std + mean).clamp(0, 1)
    times = -(-SKETCH // whole.shape[-1])
    whole = whole.expand(-1, 3, -1, -1).repeat_interleave(times, -1).repeat_interleave(times, -2)
    if colours is None:
        return [_image(one) for one in whole]
    side = math.isqrt(colours.shape[1])
    maps = torch.nn.functional.interpolate(colours.mT.unflatten(2, (side, side)).float(), whole.shape[-2:])
    gap = torch.ones(3, whole.shape[-2], GAP)
    return [_image(torch.cat([one, gap, other], -1)) for one, other in zip(whole, maps, strict=True)]


def _image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
