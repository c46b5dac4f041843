"""Images for models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmssl.model.library import inputs_of

RESNET = {"model_type": "resnet", "embedding_size": 64}
BASIC = {**RESNET, "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}


@inputs_of("vision")
class Images:
    """Whole square images."""

    name = "pixel_values"
    presets = {
        "resnet18": {**BASIC, "depths": [2, 2, 2, 2]},
        "resnet34": {**BASIC, "depths": [3, 4, 6, 3]},
        "resnet50": {
            **RESNET,
            "layer_type": "bottleneck",
            "hidden_sizes": [256, 512, 1024, 2048],
            "depths": [3, 4, 6, 3],
        },
    }
    grid, length = (1, 1), 1  # nothing that could be masked

    def __init__(self, image_size: int = 224, channels: int = 3):
        if image_size < 1:
            raise ValueError(f"image_size: {image_size}, must be at least 1 pixel")
        if channels not in (1, 3):
            raise ValueError(f"channels: {channels}, must be 1 (grey) or 3 (colour)")
        self.image_size, self.channels = image_size, channels

    def facts(self) -> dict[str, Any]:
        """As transformers calls them."""
        return {"image_size": self.image_size, "num_channels": self.channels}

    def example(self) -> Tensor:
        """(1, C, H, W)."""
        return torch.zeros(1, self.channels, self.image_size, self.image_size)
