"""Rebuilt spectrograms for people to look at."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from mmssl.types import Rebuilt

GAP, TALLEST = 3, 160  # pixels between spectrograms; least height of one
STOPS = torch.tensor([[0.0, 0.0, 0.1], [0.4, 0.1, 0.5], [0.9, 0.3, 0.3], [1.0, 0.8, 0.3], [1.0, 1.0, 0.9]])  # dark to bright


def draw(rebuilt: Rebuilt, views: Any, features: Any) -> Image.Image:
    """A column a sample, low bands below: the log-mel spectrogram, what was seen of it or instead of it, and what was made of
    the rest.
    """
    hidden = rebuilt.hidden[..., None]
    heard = rebuilt.truth if rebuilt.seen is None else rebuilt.seen
    each = rebuilt.truth, heard, torch.where(hidden, rebuilt.guess, rebuilt.truth)
    truth, seen, guess = (features.unraw(cells.float()) for cells in each)  # (R, T, F)
    low, high = truth.quantile(0.01), truth.quantile(0.99)
    rows = torch.stack([truth, seen, guess]).sub(low).div((high - low).clamp(min=1e-6)).clamp(0, 1)
    colours = _coloured(rows)  # (3, R, T, F, 3)
    if rebuilt.seen is None:
        colours[1][features.unraw(hidden.expand_as(rebuilt.truth).float()) > 0] = 0.5
    sheet = colours.flip(3).transpose(2, 3)  # (3, R, F, T, 3)
    times = -(-TALLEST // sheet.shape[2])
    sheet = sheet.repeat_interleave(times, 2).repeat_interleave(times, 3)
    framed = torch.nn.functional.pad(sheet, (0, 0, 0, GAP, 0, GAP), value=1.0)
    pixels = framed.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, 3)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


def _coloured(x: torch.Tensor) -> torch.Tensor:
    """(...) between 0 and 1 -> (..., 3), linear between stops."""
    place = x * (len(STOPS) - 1)
    below = place.floor().clamp(max=len(STOPS) - 2).long()
    share = (place - below)[..., None]
    return STOPS[below] * (1 - share) + STOPS[below + 1] * share
