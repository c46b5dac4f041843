"""Crops that are changed in a batch where the model is, against crops changed one by one in a worker."""

from __future__ import annotations

import time
from typing import Any

import torch

from mmssl.config import Recipe
from mmssl.random import generator
from modalities.vision.data import decode
from tools.bench.turns import by_turns
from tools.bench.views import photo

DIFFERENT = 1e-3  # of the deviation of pixels


def run(device: str = "cpu", crops: str = "simclr", size: str = "224", images: str = "32", pairs: str = "5") -> dict[str, Any]:
    """A worker's share of JPEG photos of 500 x 375 pixels, one thread, with `views.on_device` against without.

    Args:
        device: where a batch is changed.  crops: a policy.  size: of full views.  images: of a batch.
    Returns: `time_ratio` of a worker (ours : theirs), images a second of both, and of the device, to which the rest is left.
    Raises: RuntimeError if both ways make different views.
    """
    torch.set_num_threads(1)
    ours, theirs = (
        Recipe.load(
            "vision/dino-small", f"views.crops={crops}", f"model.image_size={size}", f"views.on_device={on}"
        ).build_views()
        for on in ("true", "false")
    )
    photos = [photo(i) for i in range(int(images))]

    def made(views: Any) -> list[dict[str, torch.Tensor]]:
        samples = [decode(data) for data in photos]
        return [views(sample, lambda view, i=i: generator("bench", i, view)) for i, sample in enumerate(samples)]

    batch = [
        view._replace(x=view.x.to(device), record={name: told.to(device) for name, told in view.record.items()})
        for view in ours.collate(made(ours))
    ]
    for one, other in zip(ours.finish(batch), theirs.collate(made(theirs)), strict=True):
        apart = float((one.x.cpu() - other.x).abs().max())
        if apart > DIFFERENT:
            raise RuntimeError(f"the two ways make different views, by {apart:.2g}; there is nothing to time")
    turns = by_turns({"ours": lambda: made(ours), "theirs": lambda: made(theirs)}, int(pairs))
    found = turns.figures()
    return {
        "name": f"views of {crops}, {size} pixels, changed on {device} against in a worker",
        **found,
        "worker_images_a_second": {name: round(len(photos) / seconds, 1) for name, seconds in found["seconds"].items()},
        "device_images_a_second": round(len(photos) / _seconds(lambda: ours.finish(batch), device, int(pairs)), 1),
        "peer": "the same in a worker",
    }


def _seconds(work: Any, device: str, times: int) -> float:
    """The shortest of some runs, after one that is not counted."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])
