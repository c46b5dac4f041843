"""Image files to RGB images: every common format, header checked before any pixel is allocated."""

from __future__ import annotations

import io
import os
import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmssl.types import Rejected

COLUMNS = ("image", "img", "file_name", "path", "file")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
MAX_PIXELS, MAX_SIDE = 64_000_000, 32_768

# Only formats that Pillow reads by itself: it would run an interpreter on PostScript, for example.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def decode(value: Any) -> Image.Image:
    """An RGB image: first frame, upright, transparent parts on white, deeper greys scaled to 8 bits.

    Args:
        value: path, bytes of a file, dict with `bytes` or `path`, or an image.
    Raises: Rejected; `too_large` above 64 megapixels or 32768 pixels a side, by the header alone.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        return _rgb(_loaded(value))
    with _opened(value) as image:
        return _rgb(_loaded(image))


def numbers(value: Any) -> Image.Image:
    """The class numbers of pixels that a mask holds, in grey or as a palette. Raises: Rejected."""
    with _opened(value) as image:
        loaded = _loaded(image)
    if loaded.mode not in ("1", "L", "P", "I", "I;16"):
        raise Rejected("wrong_type", f"a mask of mode {loaded.mode}; pixels must be class numbers, in grey or as a palette")
    return Image.fromarray(np.asarray(loaded).astype(np.int32))


def sizes(sample: Image.Image) -> dict[str, float]:
    """Width and height in pixels."""
    return {"width": sample.width, "height": sample.height}


def raw(sample: Image.Image, size: int = 32) -> Tensor:
    """Pixels of the image resized to size x size. (3*size*size,) float32 in [0, 1]."""
    small = sample.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(small, np.float32).flatten() / 255)


def _opened(value: Any) -> Image.Image:
    """Header read, pixels not yet."""
    _forbid_bombs()
    try:
        if isinstance(value, (bytes, bytearray, memoryview)):
            size, file = len(value), io.BytesIO(value)
        elif isinstance(value, (str, os.PathLike)):
            if not os.path.isfile(value):  # a pipe would block for ever
                raise Rejected("unreadable", "no such file")
            size, file = os.path.getsize(value), value
        else:
            raise Rejected("wrong_type", f"{type(value).__name__} is no path, bytes or image")
        if size == 0:
            raise Rejected("empty", "zero bytes")
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise Rejected("unreadable", "not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too_large", str(error)) from None
    except Rejected:
        raise
    except Exception as error:  # Pillow's readers raise almost anything on malformed files
        raise _rejected(error) from None


def _loaded(image: Image.Image) -> Image.Image:
    """Pixels of the first frame, turned as EXIF says."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise Rejected(
            "too_large", f"{width} x {height} pixels; at most {MAX_PIXELS // 10**6} megapixels and {MAX_SIDE} a side"
        )
    if not width * height:
        raise Rejected("empty", f"{width} x {height} pixels")
    try:
        image.load()
    except Exception as error:
        raise _rejected(error) from None
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # which copies what stands upright
    except Exception:  # broken EXIF: the pixels are good all the same
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise Rejected("wrong_type", f"mode {image.mode}: {error}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, integer or float grey to 8 bits by the first usual range that holds it (Pillow's own conversion clips)."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise Rejected("non_finite", "NaN or infinite pixels")
    low, high = float(pixels.min()), float(pixels.max())
    usual = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    top = next((top for top in usual if low >= 0 and high <= top), None)
    low, high = (0.0, top) if top is not None else (low, high)
    return Image.fromarray(np.round((pixels - low) * (255 / ((high - low) or 1))).astype(np.uint8))


def _rejected(error: Exception) -> Rejected:
    if isinstance(error, MemoryError):
        return Rejected("too_large", "does not fit into memory")
    text = str(error)
    short = isinstance(error, EOFError) or any(word in text.lower() for word in ("truncated", "end of file", "not enough"))
    return Rejected("truncated" if short else "unreadable", text or type(error).__name__)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _forbid_bombs() -> None:
    """Make Pillow's warning about huge images an exception, so that it is reported once, as a rejection.

    Looked up each time rather than set in a `catch_warnings` block: that would make every other warning repeat itself.
    """
    rule = ("error", None, Image.DecompressionBombWarning, None, 0)
    if rule not in warnings.filters:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
