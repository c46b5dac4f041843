"""Operations on the pixels of images: float (..., C, H, W) from 0 to 255, in place where they can be, and not rounded.

They are what torchvision's of the same name do. Factors are one number for all images, or (N, 1, 1, 1) for images (N, C, H, W).
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyarrow
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's

with warnings.catch_warnings():  # torch warns once that memory must not be written to; better here than at a user's first image
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))


def read(image: Image.Image) -> Tensor:
    """(C, H, W) uint8, not to be written to: Pillow's own memory where an image lies in one piece, else a copy.

    The channels of a pixel lie side by side, and a fourth that means nothing beside those of RGB; resizing reads that fastest.
    """
    try:
        pixels = np.frombuffer(pyarrow.array(image).buffers()[-1], np.uint8)
    except (ValueError, TypeError):  # larger than one of Pillow's blocks (16 MiB), or a Pillow before 11.2
        pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).permute(2, 0, 1)


def cut(pixels: Tensor, box: tuple[int, int, int, int], size: int, interpolation: str) -> Tensor:
    """A box of an image, resized to a square with antialiasing.

    Args:
        pixels: of `read`.  box: left, top, width, height.  interpolation: bicubic or bilinear.
    Returns: (C, size, size) uint8.
    """
    left, top, width, height = box
    part = pixels[None, :, top : top + height, left : left + width]
    return F.interpolate(part, (size, size), mode=interpolation, align_corners=False, antialias=True)[0]


def floats(pixels: Tensor) -> Tensor:
    """A copy of an image (C, H, W) in float32, one channel after the other: of red, green and blue, or grey."""
    return pixels[:3].to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def grey(x: Tensor) -> Tensor:
    """Luma (..., 1, H, W)."""
    if x.shape[-3] == 1:
        return x.clone()
    red, green, blue = x.unbind(-3)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(-3)


def brightness(x: Tensor, factor: float | Tensor) -> Tensor:
    """Away from black."""
    return _within(x.mul_(factor), factor)


def contrast(x: Tensor, factor: float | Tensor) -> Tensor:
    """Away from the mean luma of the image."""
    return _away(x, grey(x.mean((-2, -1), keepdim=True)), factor)


def saturation(x: Tensor, factor: float | Tensor) -> Tensor:
    """Away from the luma of the pixel; grey images have no colour to be changed."""
    return x if x.shape[-3] == 1 else _away(x, grey(x), factor)


def _away(x: Tensor, plain: Tensor, factor: float | Tensor) -> Tensor:
    """What `factor` leaves of the way from `plain`, which is written to, in place."""
    plain.mul_(1 - factor)
    x = x.mul_(factor).add_(plain) if isinstance(factor, Tensor) else torch.add(plain, x, alpha=factor, out=x)
    return _within(x, factor)


def _within(x: Tensor, factor: float | Tensor) -> Tensor:
    """Cut off at black and white; a factor of at most 1 leads nowhere beyond them."""
    return x.clamp_(0, 255) if isinstance(factor, Tensor) or factor > 1 else x


def hue(x: Tensor, turns: float | Tensor) -> Tensor:
    """Colours turned around the circle, with the same extremes: by half a turn red becomes cyan, and so does by -0.5."""
    if x.shape[-3] == 1:
        return x
    turns = turns.squeeze(-3) if isinstance(turns, Tensor) else turns
    red, green, blue = x.unbind(-3)
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    range_ = high - low
    low.sub_(range_)
    high.add_(range_)
    # Sixths of a turn from red, times the range. From red over yellow and green to cyan, green rises, then red falls, then blue
    # rises, each by the range in a sixth: what green and blue have gained and red has lost is the way so far. Back over magenta
    # and blue it is the same, with green and blue exchanged, and counted downwards.
    way = (green + blue).sub_(red).sub_(low).copysign_(green - blue)
    way.div_(range_.clamp_min_(1e-6)).mul_(1 / 6).add_(turns % 1 + 1).frac_()
    # Each channel goes from end to end between a sixth and two from red's opposite or from its own hue.
    for channel, own in ((red, 1 / 2), (green, 1 / 3), (blue, 2 / 3)):
        torch.sub(way, own, out=channel).abs_()
    x.clamp_(1 / 6, 1 / 3)
    torch.addcmul(low, range_, red, value=6, out=red)
    torch.addcmul(high, range_, green, value=-6, out=green)
    torch.addcmul(high, range_, blue, value=-6, out=blue)
    return x


def solarize(x: Tensor) -> Tensor:
    """Pixels of the brighter half inverted."""
    return torch.minimum(x, 255 - x)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian, cut off at three sigma; the outermost pixels continue beyond the edge.

    Args:
        sigma: in pixels, above 0.
    """
    reach = round(3 * sigma)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(reach + 1)]
    total = 2 * sum(weights) - weights[0]
    height, width = x.shape[-2:]
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    for dim, n in ((-1, width), (-2, height)):
        # Slices added up: on a processor a fraction of the time of a convolution with as many channels as groups.
        wide, x = x, x.narrow(dim, reach, n) * (weights[0] / total)
        for i in range(1, reach + 1):
            for start in (reach - i, reach + i):
                x.add_(wide.narrow(dim, start, n), alpha=weights[i] / total)
    return x


def blur_each(x: Tensor, sigma: Tensor, widest: float) -> Tensor:
    """`blur` of images (N, C, H, W), each as wide as its own sigma says; none where that is 0.

    Args:
        sigma: (N,), not read on the host.  widest: no sigma is above it.
    """
    reach = round(3 * widest)
    steps = torch.arange(-reach, reach + 1, device=x.device)
    wide = sigma.clamp_min(1e-6)[:, None]
    weights = torch.exp(-0.5 * (steps / wide).square()) * (steps.abs() <= torch.round(3 * wide))
    weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype)[..., None, None, None]
    height, width = x.shape[-2:]
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    for dim, n in ((-1, width), (-2, height)):
        x = sum(x.narrow(dim, i, n) * weights[:, i] for i in range(2 * reach + 1))  # type: ignore[assignment]
    return x


def noise(x: Tensor, std: float, draw: torch.Generator) -> Tensor:
    """Independent Gaussian noise on each pixel and channel, cut off at black and white. std: as a share of the range."""
    return x.add_(torch.randn(x.shape, generator=draw), alpha=255 * std).clamp_(0, 255)


def cut_out(x: Tensor, across: float, down: float, side: float) -> Tensor:
    """A normalised image (C, H, W) with a square of zeros, its mean; the square may reach beyond the image.

    Args:
        across, down: the centre, as shares of width and height, below 1.
        side: as a share of the width.
    Source: arXiv:1708.04552, section 3.
    """
    height, width = x.shape[1:]
    pixels = round(side * width)
    left, top = int(across * width) - pixels // 2, int(down * height) - pixels // 2
    x = x.clone()
    x[:, max(top, 0) : top + pixels, max(left, 0) : left + pixels] = 0
    return x


def gradients(x: Tensor) -> Tensor:
    """Sobel gradients of the mean channel of a normalised image, with zeros around it.

    Args:
        x: (..., C, H, W).
    Returns: (..., C, H, W): the gradient's length if C is 1; else its components across and down, and its length.
    Source: arXiv:1807.05520, whose code has these filters. Departs from the paper: there the network holds them and reads two
        channels, without the length; here they are an augmentation, and plain views and exported models see the image itself.
    """
    wide = F.pad(x.mean(-3), (1, 1, 1, 1))
    left, above = wide[..., :-2] - wide[..., 2:], wide[..., :-2, :] - wide[..., 2:, :]
    across = left[..., :-2, :] + 2 * left[..., 1:-1, :] + left[..., 2:, :]
    down = above[..., :-2] + 2 * above[..., 1:-1] + above[..., 2:]
    length = torch.hypot(across, down)
    return length.unsqueeze(-3) if x.shape[-3] == 1 else torch.stack([across, down, length], -3)
