"""Masks of segmentation, as patches see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmssl.types import Rejected
from modalities.vision.data import numbers
from modalities.vision.views import ImageViews, centre_box


def segments(value: Any, image: Image.Image, views: ImageViews) -> Tensor:
    """(H, W) int64: the class number of each pixel of `views.plain`, that of the nearest pixel of the mask.

    Args:
        value: path or bytes of the mask.  image: that it belongs to.
    Raises: Rejected if it cannot be read, holds colours instead of numbers, or has another size.
    """
    mask = numbers(value)
    if mask.size != image.size:
        raise Rejected("wrong_type", "a mask of {} x {} pixels for an image of {} x {}".format(*mask.size, *image.size))
    box = centre_box(*mask.size)
    return torch.from_numpy(np.asarray(mask.resize((views.size, views.size), Image.Resampling.NEAREST, box)).astype(np.int64))
