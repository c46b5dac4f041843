"""Which samples make which batch of this rank, pass after pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mmssl.config import Recipe
from mmssl.data.loading import Restarting
from mmssl.data.sampler import KeyBatches
from mmssl.data.sources import Source
from mmssl.distributed import rank, world
from mmssl.registry import Views
from mmssl.training.launch import batch_split


def steps_per_epoch(recipe: Recipe, source: Source, views: Views) -> int:
    """Updates in one pass over the data; of a stream, in the whole run. Raises: RecipeError if the data do not fill a batch."""
    return (recipe.train.steps or 1) if source.streaming else key_batches(recipe, source, views).epoch_length


def key_batches(
    recipe: Recipe,
    source: Source,
    views: Views,
    steps: int = 0,
    start: int = 0,
    order: Callable[[int], torch.Tensor | None] | None = None,
) -> KeyBatches:
    """The order of samples on this rank. Raises: RecipeError if the data do not fill a batch."""
    return KeyBatches(
        source.size,
        recipe.train.global_batch,
        batch_split(recipe, world())[0],
        rank(),
        world(),
        steps,
        recipe.train.seed,
        start,
        source.lengths,
        views.longest,
        recipe.data.buckets,
        recipe.data.budget,
        order,
    )


class PassByPass:
    """Loaders of one pass after the other, each made when the pass begins: its order may depend on what was learned before."""

    def __init__(self, make: Callable[[int, int], Restarting], start: int, steps: int, epoch_steps: int):
        self.make, self.start, self.steps, self.epoch_steps = make, start, steps, epoch_steps

    def __len__(self) -> int:
        """Micro-batches of the whole run."""
        return len(self.make(0, self.steps))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        first = self.start
        while first < self.steps:
            last = min(self.steps, (first // self.epoch_steps + 1) * self.epoch_steps)
            yield from self.make(first, last)
            first = last
