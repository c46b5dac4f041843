"""Which samples make which batch of this rank, pass after pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch

from mmssl.config import Recipe
from mmssl.data.dataset import KeyedStream
from mmssl.data.loading import Restarting
from mmssl.data.quarantine import Quarantine
from mmssl.data.sampler import KeyBatches
from mmssl.data.sources import Source
from mmssl.distributed import rank, world
from mmssl.registry import Modality, Views
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
    micro: int | None = None,
    place: tuple[int, int] | None = None,
) -> KeyBatches:
    """The order of samples on this rank, or on `place` = (rank, world). Raises: RecipeError if the data do not fill a batch."""
    mine, of = place or (rank(), world())
    return KeyBatches(
        source.size,
        recipe.train.global_batch,
        micro or batch_split(recipe, of)[0],
        mine,
        of,
        steps,
        recipe.train.seed,
        start,
        source.lengths,
        views.longest,
        recipe.data.buckets,
        recipe.data.budget,
        order,
    )


def key_stream(
    recipe: Recipe,
    source: Source,
    kind: Modality,
    views: Views,
    quarantine: Quarantine,
    micro: int,
    batches: int,
    start: int,
    place: tuple[int, int] | None = None,
) -> KeyedStream:
    """The batches of a rank in a stream, from micro-batch `start` on; of this one, or of `place` = (rank, world)."""
    mine, of = place or (rank(), world())
    return KeyedStream(
        source,
        kind,
        views,
        recipe.train.seed,
        quarantine,
        micro_batch=micro,
        batches=batches,
        start=start,
        rank=mine,
        world=of,
        readers=recipe.data.readers,
        block=recipe.data.block,
    )


def identity(recipe: Recipe, source: Source, views: Views, step: int) -> str:
    """A name for the samples of the update after `step`, in their order: the same on any number of processes, and wherever
    the data lie.
    """
    micro = batch_split(recipe, world())[0]
    update = key_batches(recipe, source, views, step + 1, step, micro=micro, place=(0, 1))
    names = [source.identity(index).removeprefix(source.root or "") for keys in update for _, index, *_ in keys]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


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
