"""The preprocessing a model was trained with, for whoever loads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from modalities.vision.views import IMAGENET_MEAN, IMAGENET_STD, ImageViews


def processor(config: Any, views: Any) -> Any:
    """An image processor that does what `ImageViews.plain` does: resize the shorter side, crop the centre, normalise."""
    from transformers import BitImageProcessor

    mean, std = (views.mean / 255).tolist(), (views.std / 255).tolist()
    channels = config.channels
    return BitImageProcessor(
        size={"shortest_edge": config.image_size},
        crop_size={"height": config.image_size, "width": config.image_size},
        resample=3,  # bicubic
        do_convert_rgb=channels == 3,
        image_mean=mean if len(mean) == channels else mean * channels,
        image_std=std if len(std) == channels else std * channels,
    )


def plain_views(model: Any, path: Any) -> ImageViews:
    """Views with the size and normalisation that a model's folder states; ImageNet's where it states none."""
    from transformers import AutoImageProcessor

    size, channels = getattr(model.config, "image_size", 224), getattr(model.config, "num_channels", 3)
    channels = getattr(model.config, "channels", channels)
    size = size if isinstance(size, int) else size[0]
    try:
        saved = AutoImageProcessor.from_pretrained(str(path))
        mean, std = tuple(saved.image_mean), tuple(saved.image_std)
    except (OSError, ValueError, TypeError, AttributeError):
        mean, std = IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]
    shape = SimpleNamespace(image_size=size, channels=channels, grid=(1, 1), length=1)
    return ImageViews(shape, mean=mean, std=std)
