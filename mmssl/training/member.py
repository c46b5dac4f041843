"""What a run has of each kind of data that it learns from: samples, views, probes and a method of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mmssl.config import Recipe
from mmssl.data.dataset import KeyedDataset, start_worker
from mmssl.data.loading import Restarting
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import Source, open_source
from mmssl.hub.export import load_weights
from mmssl.methods import Method
from mmssl.parts import Magnitude
from mmssl.registry import Views, modality
from mmssl.training.batches import PassByPass, identity, key_batches, key_stream, steps_per_epoch
from mmssl.training.launch import batch_split
from mmssl.training.objective import Objective, called
from mmssl.training.pictures import Pictures
from mmssl.training.probes import Probes, describe
from mmssl.training.run_folder import RunFolder
from mmssl.training.survey import as_recipe_error, check_method, survey
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.types import Clock


class Member:
    """One kind of data; the only one of most runs, and then without a name.

    Made before there is a run folder: a wrong path leaves no trace. Raises: MmsslError.
    """

    def __init__(self, name: str, recipe: Recipe, args: TrainingArguments):
        self.name, self.recipe, self.args = name, recipe, args
        self.kind = modality(recipe.data.modality)
        self.views = as_recipe_error("views", recipe.build_views)
        source = open_source(recipe.data, self.kind, recipe.data.split)._replace(paired=recipe.paired)
        self.survey = survey(recipe, args, self.kind, self.views, source)
        self.source = self.survey.source
        self.smallest = check_method(recipe, self.source, self.views, alone=not name)
        self.epoch_steps = steps_per_epoch(recipe, self.source, self.views)

    def learn(self, method: Method, folder: RunFolder, resume: bool, scale: float = 1.0, balanced: bool = False) -> Objective:
        """What is trained, with the method that was built for it; data and probes are ready then.

        Args:
            resume: whether a checkpoint will be loaded into it.
            scale: what its loss counts.
            balanced: whether its loss is divided by its running mean.
        """
        recipe = self.recipe
        self.method = method
        for _, one in method.methods():
            one.smallest = self.smallest
        self.quarantine = quarantine = Quarantine(folder.quarantine, recipe.data.max_bad, recipe.data.min_bad)
        if folder.is_main and not resume:  # each rank has surveyed the same samples, and a checkpoint has counted them
            self.survey.rejected.hand_over(quarantine)
        self.probes = Probes(recipe, self.kind, self.views, self.source.streaming, folder, self.name)
        self.pictures = Pictures(self.source, self.probes.sets, self.kind, self.views, folder, recipe.train.seed, self.name)
        classes, source = self.probes.labels(self.survey)
        self.dataset: Any = None
        if not source.streaming:
            self.dataset = KeyedDataset(source, self.kind, self.views, recipe.train.seed, quarantine)
            method.attach(source.size, recipe.train.seed)
        self.source = source
        if recipe.model.init and not resume:  # type: ignore[attr-defined]
            load_weights(method.student.encoder, recipe.model.init)  # type: ignore[attr-defined]
            for part in method.parts():
                part.restart()
        magnitude = Magnitude() if balanced else None
        self.objective = Objective(method, classes, self.views.ragged, scale, magnitude, self.views.finish)
        return self.objective

    def loader(self, start: int, steps: int) -> Restarting | PassByPass:
        """Batches of this rank from update `start` to the end."""
        workers = self.recipe.data.workers
        common: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": self.args.device.type == "cuda",
            "persistent_workers": False,
            "prefetch_factor": 4 if workers else None,
            "worker_init_fn": start_worker if workers else None,
        }

        def restarting(make: Callable[[int], DataLoader]) -> Restarting:
            return Restarting(make, self.quarantine, self.source.identity)

        if self.source.streaming:
            micro, accumulation = batch_split(self.recipe, self.args.world_size)
            begin, total = start * accumulation, steps * accumulation

            def stream(done: int) -> DataLoader:
                place = (self.recipe, self.source, self.kind, self.views, self.quarantine, micro, total)
                return DataLoader(key_stream(*place, begin + done), batch_size=None, **common)

            return restarting(stream)

        def keyed(first: int, last: int) -> Restarting:
            keys = key_batches(self.recipe, self.source, self.views, last, first, self._order if self.chooses else None)

            def make(done: int) -> DataLoader:
                due: Any = islice(keys, done, None) if done else keys
                return DataLoader(self.dataset, batch_sampler=due, collate_fn=self.dataset.collate, **common)

            return restarting(make)

        return PassByPass(keyed, start, steps, self.epoch_steps) if self.chooses else keyed(start, steps)

    @property
    def chooses(self) -> bool:
        """Whether the method chooses the samples of a pass."""
        return self.method.chooses

    def _order(self, epoch: int) -> torch.Tensor | None:
        steps = self.recipe.train.steps or max(1, round((self.recipe.train.epochs or 1) * self.epoch_steps))
        return self.method.order(Clock(epoch * self.epoch_steps, steps, epoch))

    @property
    def place(self) -> tuple[Recipe, Source, Views]:
        """What a record of one of its batches is written with."""
        return self.recipe, self.source, self.views

    def measure(self, trainer: SelfSupervisedTrainer) -> dict[str, float]:
        """Pictures and metrics; a collective."""
        self.pictures.draw(trainer, self.objective)
        return self.probes.measure(trainer, self.objective)

    def describe(self, trainer: SelfSupervisedTrainer) -> torch.Tensor:
        """(n, F) what the method makes of every sample; a collective."""
        batch = trainer.args.per_device_train_batch_size
        return describe(trainer, self.source, self.kind, self.views, batch, self.recipe.data.workers)

    def next_batch(self, step: int) -> str | None:
        """Identity of the update after `step`; None where it is not a function of the data alone."""
        return None if self.source.streaming or self.chooses else identity(self.recipe, self.source, self.views, step)


class Together:
    """The batches of several loaders side by side, each tensor called MEMBER.NAME."""

    def __init__(self, loaders: dict[str, Restarting | PassByPass]):
        self.loaders = loaders

    def __len__(self) -> int:
        """Micro-batches of the whole run."""
        return min(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batches in zip(*self.loaders.values(), strict=True):
            parts = [called(batch, name) for name, batch in zip(self.loaders, batches, strict=True)]
            yield {name: tensor for part in parts for name, tensor in part.items()}
