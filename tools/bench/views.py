"""Photos to two views by a policy: images a second of one core, against lightly and torchvision."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmssl.config import Recipe
from mmssl.random import generator
from modalities.vision.data import decode
from tools.bench.joint import lightly
from tools.bench.turns import by_turns

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(peer: str = "lightly", size: str = "224", images: str = "16", pairs: str = "7") -> dict[str, Any]:
    """SimCLR's policy at strength 1 on JPEG photos of 500 x 375 pixels, one thread, by turns.

    Args:
        peer: lightly, or torchvision: its transforms (v2) as lightly combines them.
        size: of the views.  images: of a turn, all different.
    Returns: `time_ratio` (ours : theirs), its inverse `images_ratio`, and images a second of both; that both make views of
        one kind is checked by their mean and deviation over the images, which must agree to 0.2.
    """
    torch.set_num_threads(1)
    photos = [photo(i) for i in range(int(images))]
    ways = {"ours": ours(int(size)), "theirs": {"lightly": of_lightly, "torchvision": of_torchvision}[peer](int(size))}
    told = {name: described(way, photos) for name, way in ways.items()}
    apart = max(abs(a - b) for a, b in zip(*told.values(), strict=True))
    if apart > 0.2:
        raise RuntimeError(f"the two sides make different views, mean and deviation are {told}; there is nothing to time")
    turns = by_turns({name: lambda way=way: [way(one) for one in photos] for name, way in ways.items()}, int(pairs))
    found = turns.figures()
    return {
        "name": f"two views of {size} pixels, SimCLR's policy, against {peer}",
        **found,
        "images_ratio": round(1 / found["time_ratio"], 2),
        "images_a_second": {name: round(len(photos) / seconds, 1) for name, seconds in found["seconds"].items()},
        "mean_and_deviation": told,
        "peer": peer,
        "peer_version": lightly().__version__ if peer == "lightly" else __import__("torchvision").__version__,
    }


def photo(number: int) -> bytes:
    """A JPEG of smooth colours with grain, as large as most of ImageNet."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (10, 14, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse) + draw.normal(0, 8, (375, 500, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def described(way: Callable[[bytes], list[Tensor]], photos: list[bytes], passes: int = 16) -> list[float]:
    """Mean and standard deviation of normalised views, and of their first differences."""
    views = torch.stack([view for _ in range(passes) for one in photos for view in way(one)])
    steps = views.diff(dim=-1)
    return [float(x) for x in (views.mean(), views.std(), steps.mean(), steps.std())]


def opened(data: bytes) -> Image.Image:
    """As data sets of torchvision and lightly read a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def ours(size: int) -> Callable[[bytes], list[Tensor]]:
    """What a worker does, draws and records included. The policy is the one with the peers' interpolation, bilinear."""
    words = ("views.crops=swav-two-crop", f"model.image_size={size}", f"views.mean={[*MEAN]}", f"views.std={[*STD]}")
    recipe = Recipe.load("vision/simclr-cifar10-cpu", *words)
    make, numbers = recipe.build_views(), count()

    def way(data: bytes) -> list[Tensor]:
        number = next(numbers)
        made = make(decode(data), lambda view: generator("bench", number, view))
        return [made["0.x"], made["1.x"]]

    return way


def of_lightly(size: int) -> Callable[[bytes], list[Tensor]]:
    """Its SimCLR transform as it comes."""
    transform = lightly("transforms").SimCLRTransform(input_size=size)
    return lambda data: transform(opened(data))


def of_torchvision(size: int) -> Callable[[bytes], list[Tensor]]:
    """The same steps on Pillow's images."""
    from torchvision.transforms import v2

    blur = v2.GaussianBlur(23, (0.1, 2.0))
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([blur], 0.5),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def way(data: bytes) -> Iterator[Tensor] | list[Tensor]:
        image = opened(data)
        return [transform(image) for _ in range(2)]

    return way  # type: ignore[return-value]
