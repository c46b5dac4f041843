"""The preprocessing a model was trained with, for whoever loads it."""

from __future__ import annotations

from typing import Any

from modalities.vision.backbone import Images
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

    size, channels = getattr(model.config, "image_size", None), getattr(model.config, "num_channels", 3)
    channels = getattr(model.config, "channels", channels)
    try:
        saved = AutoImageProcessor.from_pretrained(str(path), trust_remote_code=False)
        mean, std = tuple(saved.image_mean), tuple(saved.image_std)
        size = size or side(saved)  # a network of convolutions takes any size, its config names none
    except (OSError, ValueError, TypeError, AttributeError):
        mean, std = IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]
    size = size or 224
    return ImageViews(Images(size if isinstance(size, int) else size[0], channels), (0.08, 1.0), mean=mean, std=std)


def stated(path: str, model: dict[str, Any]) -> dict[str, Any]:
    """View options: mean and standard deviation of the pixels, where the model's folder states them; their means for grey
    images where it was trained with coloured ones, and the other way round.
    """
    from transformers import AutoImageProcessor

    try:
        saved = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        found = {"mean": [*saved.image_mean], "std": [*saved.image_std]}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    channels = model.get("channels") or len(found["mean"])
    if channels == len(found["mean"]):
        return found
    return {name: [sum(values) / len(values)] * channels for name, values in found.items()}


def side(saved: Any) -> int | None:
    """What an image processor leaves of an image, in pixels; None if it does not say."""
    cropped, resized = (dict(getattr(saved, name, None) or {}) for name in ("crop_size", "size"))
    return cropped.get("height") or resized.get("shortest_edge") or resized.get("height")
