"""Before there is a run folder: what must be known of all samples, and whether the method can learn from them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch.nn import Module
from transformers import TrainingArguments

from mmssl.config import Recipe, keyed
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import Source
from mmssl.distributed import rank, world
from mmssl.errors import DataError, RecipeError
from mmssl.methods import Method
from mmssl.registry import Modality, Views
from mmssl.schedules import Schedule
from mmssl.training.batches import key_batches
from mmssl.training.launch import batch_split, main_first
from mmssl.types import Clock

T = TypeVar("T")


class Early(Quarantine):
    """What is rejected before there is a folder for the ledger."""

    def __init__(self, share: float, least: int):
        super().__init__(None, share, least)
        self.rejected: list[tuple[str, str, str]] = []

    def record(self, identity: str, kind: str, reason: str = "") -> None:
        """Count and keep."""
        super().record(identity, kind, reason)
        self.rejected.append((identity, kind, reason))

    def hand_over(self, later: Quarantine) -> None:
        """Count and name in `later` what was counted and kept here."""
        later.seen(self.totals()[1])
        for rejected in self.rejected:
            later.record(*rejected)


class Survey(NamedTuple):
    """The data after the modality has looked at all of them."""

    source: Source
    rejected: Early
    same_rows: bool = True  # whether row numbers still mean the same as without the survey


def survey(recipe: Recipe, args: TrainingArguments, kind: Modality, views: Views, source: Source) -> Survey:
    """Let the modality find out what it must know of all samples first.

    The main process goes first, so that the others find what it left on disk. Raises: RecipeError; DataError if more samples
    are bad than the recipe tolerates.
    """
    quarantine, prepare = Early(recipe.data.max_bad, recipe.data.min_bad), kind.prepare
    if prepare is None:
        return Survey(source, quarantine)

    def measured() -> Source:
        found = as_recipe_error("data", lambda: prepare(source, views, quarantine))
        if quarantine.over():
            raise DataError(quarantine.message())
        return found

    found = main_first(measured, args)
    found = measured() if found is None else found
    same = found.rows is source.rows
    if source.paired and not (same and found.lengths is None):
        raise RecipeError(f"data.modality: {kind.name} orders its samples anew, which parts the rows of pairs; take another.")
    return Survey(found, quarantine, same)


def as_recipe_error(block: str, make: Callable[[], T]) -> T:
    """What `make` makes; its ValueErrors are about the recipe."""
    try:
        return make()
    except ValueError as error:
        raise RecipeError(keyed(block, error)) from None


def check_method(recipe: Recipe, source: Source, views: Views, alone: bool = True) -> int:
    """Whether the method can learn from these data in such batches, found without memory.

    Args:
        alone: whether these are all data of the run; otherwise it has no passes, as data sets are of unlike length.
    Returns: samples of the smallest micro-batch of all ranks.
    Raises: RecipeError.
    """
    if alone and recipe.paired:
        raise RecipeError(
            "method.name: bind compares several kinds of data; name them in a recipe with `modalities`, such as "
            "multimodal/bind."
        )
    with torch.device("meta"):
        method = recipe.build()
        if source.streaming:
            check_stream(method, recipe)
        elif not alone:
            check_stream(method, recipe, "modalities", "a run of several kinds of data")
        else:
            as_recipe_error("method", lambda: method.attach(source.size, recipe.train.seed))
    sizes = {batch_split(recipe, world())[0] * world()}
    if not source.streaming:
        keys = key_batches(recipe, source, views)
        sizes = {(last - first) // keys.accumulation for first, last in pairwise(keys.plan.cuts)}
    notes = [note for size in sorted(sizes) for note in as_recipe_error("method", lambda size=size: method.check_batch(size))]
    notes = notes[:1]
    if not source.streaming:
        steps = recipe.train.steps or round((recipe.train.epochs or 1) * keys.epoch_length)
        notes += never_begun(method, steps, keys.epoch_length)
        if keys.accumulation > 1 and method.family == "joint embedding":
            notes.append(
                f"train.micro_batch: the loss compares the {max(sizes)} samples of a micro-batch (of all ranks); accumulating "
                f"{keys.accumulation} of them does not enlarge that number"
            )
    for note in notes if rank() == 0 else []:
        print(f"mmssl: note: {note}.", file=sys.stderr)
    return min(sizes)


def never_begun(method: Method, steps: int, epoch_steps: int) -> list[str]:
    """What is to begin after some passes, in a run that has fewer."""
    found = []
    for place, name, module in _modules(method):
        for key in ("freeze_epochs", "queue_from_epoch"):
            if steps <= vars(module).get(key, 0) * epoch_steps:
                what = f"{name} is never trained" if key == "freeze_epochs" else "queues are never used"
                found.append(f"{place}.{key}: {vars(module)[key]}, the run has {steps / epoch_steps:.2g} passes; {what}")
    return found


def _modules(method: Method) -> Iterator[tuple[str, str, Module]]:
    """Block of the recipe, name and module, of all of a method and of each that it is made of."""
    for own, one in method.methods():
        yield from ((f"method.{own}".rstrip("."), name, module) for name, module in one.named_modules())


def check_stream(method: Method, recipe: Recipe, key: str = "data.streaming", what: str = "a stream") -> None:
    """Whether a method can do without passes over the data and their size. Raises: RecipeError."""
    if method.chooses or method.slots or method.needs_description(Clock()):
        raise RecipeError(
            f"{key}: this method keeps something for every sample; it needs data of known size, gone through alone."
        )
    for place, name, module in _modules(method):
        for option, value in vars(module).items():
            if option in ("freeze_epochs", "queue_from_epoch") and value:
                where = f", and {name} would never be trained" if option == "freeze_epochs" else ""
                raise RecipeError(f"{place}.{option}: {value}, {what} has no passes{where}; set it to 0.")
            if isinstance(value, Schedule) and value.by == "epoch" and value.start != value.end:
                raise RecipeError(
                    f"{place}.{option}: changes by the epoch, and {what} has none; set it to a number, or by: step."
                )
    if recipe.optim.by == "epoch":
        raise RecipeError(f"optim.by: epoch, and {what} has none; set it to step, with warmup and hold in updates.")
