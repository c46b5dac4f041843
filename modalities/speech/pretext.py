"""What can be asked about sound without a label."""

from __future__ import annotations

from torch import Tensor


def backwards(wave: Tensor) -> Tensor:
    """The end first. (samples,)."""
    return wave.flip(0)


def swapped(wave: Tensor) -> Tensor:
    """The second half first. (samples,)."""
    return wave.roll(len(wave) // 2)


PRETEXTS = {"reversal": (backwards,), "order": (swapped,)}
