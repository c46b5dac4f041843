"""Rebuilt spectrograms for people to look at."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from mmssl.types import Rebuilt, View

GAP, TALLEST = 3, 160  # pixels between spectrograms; least height of one
WIDE, TALL, STRIPE = 240, 96, 24  # pixels of a recording that stands alone, and of the colours of its frames
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


def sketch(view: View, views: Any, features: Any, colours: torch.Tensor | None = None) -> list[Image.Image]:
    """The spectrogram of each sample of a plain view, low bands below, as long as its recording.

    Below it the colours of its tokens, (B, L, 3) in 0..1, if they are given: of frames of speech a stripe, of patches of a
    spectrogram as the patches lie.
    """
    columns = getattr(features, "columns", 1)
    return [_upright(*_own(view, row, colours), columns, view.x.ndim == 2) for row in range(len(view.x))]


def _own(view: View, row: int, colours: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A sample and the colours of its tokens, without what is padding."""
    x, own = view.x[row].float().cpu(), None if colours is None else colours[row]
    if view.pad is None:
        return x, own
    share = float((~view.pad[row]).float().mean())
    return x[: max(1, round(share * len(x)))], None if own is None else own[: int((~view.pad[row]).sum())]


def _upright(x: torch.Tensor, own: torch.Tensor | None, columns: int, wave: bool) -> Image.Image:
    cells = _spectrogram(x) if wave else x  # (T, F)
    low, high = cells.quantile(0.01), cells.quantile(0.99)
    parts = [_scaled(_coloured(((cells - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)), TALL)]
    if own is not None:
        parts.append(_scaled(own.unflatten(0, (-1, columns)), STRIPE if columns == 1 else TALL))
    sheet = Image.new("RGB", (WIDE, sum(part.height for part in parts) + GAP * (len(parts) - 1)), "white")
    for part in parts:
        sheet.paste(part, (0, 0 if part is parts[0] else parts[0].height + GAP))
    return sheet


def _spectrogram(wave: torch.Tensor) -> torch.Tensor:
    """(n,) at 16 kHz -> (T, 64) log energies of 64 bands of equal width, 100 frames a second."""
    wave = torch.nn.functional.pad(wave, (0, max(0, 512 - len(wave))))
    found = torch.stft(wave, 512, 160, window=torch.hann_window(512), return_complex=True).abs().square()[1:]  # (256, T)
    return (found.unflatten(0, (64, 4)).mean(1) + 1e-6).log().T


def _scaled(cells: torch.Tensor, height: int) -> Image.Image:
    """(T, F, 3) in 0..1, frames to the right and bands upwards, WIDE times `height` pixels."""
    pixels = (cells.flip(1).transpose(0, 1) * 255).round().to(torch.uint8).contiguous()
    return Image.fromarray(pixels.numpy()).resize((WIDE, height), Image.Resampling.NEAREST)
