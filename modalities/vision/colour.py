"""Colour apart from lightness, and the classes of colours that colourisation predicts (arXiv:1603.08511)."""

from __future__ import annotations

import torch
from torch import Tensor

# Linear sRGB to CIE XYZ, and the white of D65 there.
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)


def lab(rgb: Tensor) -> Tensor:
    """CIE L*a*b* of sRGB colours.

    Args:
        rgb: (..., 3) from 0 to 1.
    Returns: (..., 3): lightness from 0 to 100, a (green to red) and b (blue to yellow), about -110 to 110.
    Source: IEC 61966-2-1; CIE 15.
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ rgb.new_tensor(XYZ).T / rgb.new_tensor(WHITE)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def colour_bins(width: float = 10.0, steps: int = 64) -> Tensor:
    """(Q, 2) the centres, a and b, of the squares of the ab plane that some sRGB colour falls into.

    Args:
        width: of a square.  steps: values of each channel that are tried.
    Returns: rows ascending; 261 of width 10. Departs from the authors' code, whose list has 313: no sRGB colour falls into
        the others.
    """
    values = torch.linspace(0, 1, steps, dtype=torch.float64)
    return width * (lab(torch.cartesian_prod(values, values, values))[:, 1:] / width).round().unique(dim=0)


def soft_bins(ab: Tensor, bins: Tensor, neighbours: int = 5, sigma: float = 5.0) -> Tensor:
    """Targets: each colour as shares of the nearest bins, by a Gaussian of the distance.

    Args:
        ab: (..., 2).  bins: (Q, 2).  sigma: of the Gaussian, in units of ab.
    Returns: (..., Q), rows sum to 1.
    Source: arXiv:1603.08511, section 2.1.
    """
    apart = (ab.unsqueeze(-2) - bins).square().sum(-1)  # (..., Q)
    near, which = apart.topk(neighbours, largest=False)
    return torch.zeros_like(apart).scatter(-1, which, (-near / (2 * sigma**2)).softmax(-1))


def rare_colours(share: Tensor, uniform: float = 0.5) -> Tensor:
    """Weights that let rare colours count more, on average 1.

    Args:
        share: (Q,) of the pixels in each bin, smoothed; sums to 1.
        uniform: how much of a uniform share is mixed in, from 0 to 1, where all weights are 1.
    Returns: (Q,), whose mean by `share` is 1.
    Source: arXiv:1603.08511, Eq. 4, where this share is lambda.
    """
    weight = 1 / ((1 - uniform) * share + uniform / len(share))
    return weight / (share * weight).sum()


def annealed_mean(logits: Tensor, bins: Tensor, temperature: float = 0.38) -> Tensor:
    """One colour of a distribution over bins, between its mean (temperature 1) and its mode (towards 0).

    Args:
        logits: (..., Q).  bins: (Q, 2), or (Q, n) of anything that is averaged.
    Returns: (..., 2).
    Source: arXiv:1603.08511, Eq. 5.
    """
    return (logits / temperature).softmax(-1) @ bins
