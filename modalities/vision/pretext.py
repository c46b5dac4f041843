"""What can be asked about images without a label."""

from __future__ import annotations

from functools import partial

from PIL import Image, ImageChops

TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def turned(image: Image.Image, by: Image.Transpose) -> Image.Image:
    """By quarters of a turn."""
    return image.transpose(by)


def swapped(image: Image.Image) -> Image.Image:
    """The left half on the right."""
    return ImageChops.offset(image, image.width // 2, 0)


PRETEXTS = {"rotation": tuple(partial(turned, by=turn) for turn in TURNS), "order": (swapped,)}
