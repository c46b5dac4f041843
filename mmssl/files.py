"""Small things about files that several floors need."""

from __future__ import annotations

import os


def umask() -> int:
    """The mode bits that new files lose."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
