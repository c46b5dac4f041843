"""Images for a model with a head: prepared as its folder says, cropped, changed and mixed in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmssl.random import drawn
from modalities.vision.processor import side as processed_side


class Inputs:
    """Images to `pixel_values`. Augmentations are torchvision's, drawn from the seed of each sample.

    Args:
        path: of the model, whose folder says how images are resized and normalised.
        side: pixels, where the model takes another size than its folder says.
        scale: shares of the area that crops have; [1, 1] resizes as in the test.
        randaugment: operations on each image (arXiv:1909.13719), at `magnitude` of 30.
        erase: chance of a grey rectangle (arXiv:1708.04896).
        mixup, cutmix: how strongly pairs are mixed (arXiv:1710.09412, arXiv:1905.04899); with both, either by chance.
    Raises: ValueError if the folder does not say how to prepare images.
    """

    def __init__(
        self,
        path: Any,
        side: int | None = None,
        scale: tuple[float, float] = (0.6, 1.0),
        flip: float = 0.5,
        randaugment: int = 0,
        magnitude: int = 9,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ):
        from torchvision.transforms import v2
        from transformers import AutoImageProcessor

        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: {list(scale)}, must be shares of the area, the smaller first")
        for name, value, most in (("flip", flip, 1), ("erase", erase, 1), ("magnitude", magnitude, 30)):
            if not 0 <= value <= most:
                raise ValueError(f"{name}: {value}, must be between 0 and {most}")
        if min(randaugment, mixup, cutmix) < 0:
            raise ValueError("randaugment, mixup and cutmix: must be at least 0")
        self.processor = AutoImageProcessor.from_pretrained(str(path), trust_remote_code=False)
        if side is not None:
            self.processor.size = {"shortest_edge": side}
            self.processor.crop_size = {"height": side, "width": side}
        self.side = processed_side(self.processor) or 224
        crop = [] if tuple(scale) == (1.0, 1.0) else [v2.RandomResizedCrop(self.side, (scale[0], scale[1]), antialias=True)]
        changes = [v2.RandAugment(randaugment, magnitude)] if randaugment else []
        self.change = v2.Compose([*crop, v2.RandomHorizontalFlip(flip), *changes])
        self.erase = v2.RandomErasing(erase) if erase else None
        self.alphas = {name: alpha for name, alpha in (("MixUp", mixup), ("CutMix", cutmix)) if alpha}

    def __call__(self, samples: Sequence[Image.Image], seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """(B, C, H, W). seeds: one of each sample in training, None in the test."""
        if seeds is None:
            return {"pixel_values": self._prepared(samples)}
        changed = []
        for sample, seed in zip(samples, seeds):
            with drawn(seed, "views"):
                changed.append(self.change(sample))
        pixels = self._prepared(changed)
        for i, seed in enumerate(seeds if self.erase else ()):
            with drawn(seed, "erase"):
                pixels[i] = self.erase(pixels[i])  # type: ignore[misc]
        return {"pixel_values": pixels}

    def mix(self, batch: dict[str, Tensor], labels: Tensor, classes: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Pairs of a batch mixed with one another. labels (B,) -> shares of classes (B, classes) float32."""
        from torchvision.transforms import v2

        if not self.alphas:
            return batch, labels
        with drawn(seed, "mix"):
            names = [*self.alphas]
            name = names[int(torch.randint(len(names), ()))]
            mixer = getattr(v2, name)(alpha=self.alphas[name], num_classes=classes)
            pixels, shares = mixer(batch["pixel_values"], labels)
        return {**batch, "pixel_values": pixels}, shares

    def _prepared(self, images: Sequence[Image.Image]) -> Tensor:
        return self.processor([*images], return_tensors="pt")["pixel_values"]
