"""What can be asked about text without a label."""

from __future__ import annotations

import numpy as np


def swapped(text: str | np.ndarray) -> str | np.ndarray:
    """The second half first, cut between words, or between tokens if they are ids."""
    if not isinstance(text, str):
        return np.roll(text, len(text) // 2)
    words = text.split()
    half = len(words) // 2
    return " ".join([*words[half:], *words[:half]])


PRETEXTS = {"order": (swapped,)}
