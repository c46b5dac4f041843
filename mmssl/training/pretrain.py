"""One run, from a checked recipe to a folder with a model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mmssl import stage
from mmssl.config import Recipe
from mmssl.data.dataset import KeyedDataset, KeyedStream, start_worker
from mmssl.data.loading import Restarting
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import open_source
from mmssl.distributed import rank, world
from mmssl.errors import DataError, MmsslError, storage_error
from mmssl.hub.export import load_weights
from mmssl.parts import Teacher
from mmssl.registry import Modality, Views, modality
from mmssl.training.batches import PassByPass, key_batches, steps_per_epoch
from mmssl.training.launch import launched, main_first, out, training_arguments
from mmssl.training.objective import Objective
from mmssl.training.outcome import leave, record_failure
from mmssl.training.peers import Peers
from mmssl.training.pictures import Pictures
from mmssl.training.probes import Probes, describe
from mmssl.training.progress import Progress
from mmssl.training.run_folder import RunFolder
from mmssl.training.saving import has_saved, load_run, reopen, save_run
from mmssl.training.signals import Signals
from mmssl.training.survey import Survey, as_recipe_error, check_method, survey
from mmssl.training.trackers import following
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.training.watchdog import Watchdog
from mmssl.types import Clock


def pretrain(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> Path:
    """Train as the recipe says.

    Args:
        recipe: checked; `recipe.out` is the run folder.
        overwrite: remove an earlier run in that folder.
        resume: go on from the newest complete checkpoint in that folder.
    Returns: the run folder; `model/` in it is the encoder.
    Raises: MmsslError with the exit status of the contract.
    """
    run = prepare(recipe, overwrite, resume)
    log, handler = logging.getLogger("mmssl"), run.folder.log_handler()
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        run.train()
    finally:
        log.removeHandler(handler)
    return run.folder.path


def prepare(
    recipe: Recipe, overwrite: bool = False, resume: bool = False, trainer: type[SelfSupervisedTrainer] = SelfSupervisedTrainer
) -> Run:
    """Everything up to the first step: processes, data, folder, model. Raises: MmsslError."""
    args = training_arguments(recipe)
    stage.enter("preparation", 0)
    peers, at = Peers(), out(recipe)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    kind = modality(recipe.data.modality)
    folder: RunFolder | None = None

    def opened() -> RunFolder:
        nonlocal folder  # known from here on, whatever becomes of the other ranks
        folder = peers.make_place(reopen(at) if resume else RunFolder.create(at, overwrite))
        return folder

    with Signals(lambda _: leave(folder, peers)):
        try:
            # All this before the folder: a wrong path leaves no trace.
            views = as_recipe_error("views", recipe.build_views)
            data = survey(recipe, args, kind, views, open_source(recipe.data, kind, recipe.data.split))
            check_method(recipe, data.source, views)
            peers.folder = folder = main_first(opened, args) or RunFolder(at, is_main=False)
            return Run(recipe, args, kind, views, data, folder, peers, resume and has_saved(folder), trainer)
        except BaseException as error:
            cause = peers.explain(error)
            if folder is not None:
                record_failure(folder, peers, cause)
            if cause is not error:
                raise cause from error
            raise


class Run:
    """The pieces of one run and what happens at its turning points."""

    def __init__(
        self,
        recipe: Recipe,
        args: TrainingArguments,
        kind: Modality,
        views: Views,
        data: Survey,
        folder: RunFolder,
        peers: Peers,
        resume: bool = False,
        trainer: type[SelfSupervisedTrainer] = SelfSupervisedTrainer,
    ):
        self.recipe, self.args, self.views, self.folder, self.peers = recipe, args, views, folder, peers
        self.source = source = data.source
        self.micro, self.accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.epoch_steps = steps_per_epoch(recipe, source, views)
        self.steps = recipe.train.steps or max(1, round((recipe.train.epochs or 1) * self.epoch_steps))
        args.max_steps = self.steps
        whole = -(-self.steps // self.epoch_steps) if recipe.optim.by == "epoch" else self.steps
        if recipe.optim.warmup + recipe.optim.hold >= whole and folder.is_main:
            reached = "the rate never reaches optim.lr" if recipe.optim.warmup >= whole else "the rate never falls"
            hold = f" and optim.hold={recipe.optim.hold}" if recipe.optim.hold else ""
            print(
                f"mmssl: note: optim.warmup={recipe.optim.warmup}{hold} fill the run of {whole} {recipe.optim.by}s; {reached}.",
                file=sys.stderr,
            )
        self.quarantine = Quarantine(folder.quarantine, recipe.data.max_bad, recipe.data.min_bad)
        if folder.is_main and not resume:  # each rank has surveyed the same samples, and a checkpoint has counted them
            data.rejected.hand_over(self.quarantine)
        self.probes = Probes(recipe, kind, views, source.streaming, folder)
        self.pictures = Pictures(source, kind, views, folder, recipe.train.seed)
        classes, source = self.probes.labels(data)
        if source.streaming:
            self.dataset: Any = None
            self.stream = lambda first: KeyedStream(
                source,
                kind,
                self.views,
                recipe.train.seed,
                self.quarantine,
                micro_batch=self.micro,
                batches=self.steps * self.accumulation,
                start=first,
                rank=rank(),
                world=world(),
                readers=recipe.data.readers,
                block=recipe.data.block,
            )
        else:
            self.dataset = KeyedDataset(source, kind, self.views, recipe.train.seed, self.quarantine)
        method = recipe.build()
        if not source.streaming:
            method.attach(source.size, recipe.train.seed)
        if recipe.model.init and not resume:  # type: ignore[attr-defined]
            load_weights(method.student.encoder, recipe.model.init)  # type: ignore[attr-defined]
            for part in method.parts():
                part.restart()
        if recipe.train.compile:
            encoders = [method.student.encoder, *(part.encoder for part in method.parts() if isinstance(part, Teacher))]
            for block in (b for e in encoders for b in e.compilable()):
                block.compile()
        self.objective = Objective(method, classes)
        tensors, state = load_run(self.objective, folder, source.streaming) if resume else ({}, {})
        folder.write_identity(recipe.dump(), sys.argv, source.facts)
        self.start = int(state.get("step", 0))
        self.progress = Progress(folder, self.steps, self.start, quiet=not folder.is_main)
        self.trainer = trainer(
            self.objective,
            recipe,
            args,
            self.steps,
            self.epoch_steps,
            self._loader,
            self.progress.report,
            self._measure,
            self._save,
            self.quarantine,
            self.start,
            state.get("applied", 0),
            tuple(state.get("samples", (0, 0))),
            tensors.get("optimizer"),
            self.views.ragged,
            None if self.source.streaming else self._describe,
        )
        self.trainer.metrics = state.get("metrics", {})

    def _loader(self, start: int) -> Restarting | PassByPass:
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
            begin = start * self.accumulation
            return restarting(lambda done: DataLoader(self.stream(begin + done), batch_size=None, **common))

        def keyed(first: int, last: int) -> Restarting:
            keys = key_batches(self.recipe, self.source, self.views, last, first, self._order if self._chooses else None)

            def make(done: int) -> DataLoader:
                due: Any = islice(keys, done, None) if done else keys
                return DataLoader(self.dataset, batch_sampler=due, collate_fn=self.dataset.collate, **common)

            return restarting(make)

        return PassByPass(keyed, start, self.steps, self.epoch_steps) if self._chooses else keyed(start, self.steps)

    @property
    def _chooses(self) -> bool:
        return self.objective.method.chooses

    def _order(self, epoch: int) -> torch.Tensor | None:
        """The samples of a pass, which the method chooses."""
        return self.objective.method.order(Clock(epoch * self.epoch_steps, self.steps, epoch))

    def launch(self) -> dict[str, Any]:
        """How the run was really started, as seen from inside."""
        plugin = getattr(self.trainer.accelerator.state, "deepspeed_plugin", None)
        return {
            "distributed": self.trainer.accelerator.distributed_type.name,
            "processes": {"accelerate": self.trainer.accelerator.num_processes, "torch": world(), "launcher": launched()},
            "zero_stage": plugin.zero_stage if plugin else None,
            "clip": plugin.deepspeed_config["gradient_clipping"] if plugin else self.args.max_grad_norm,
            "device": str(self.args.device),
        }

    def train(self) -> None:
        """To the end, or until SIGTERM, SIGINT or SIGUSR1 stops all ranks; a second signal ends the process at once.

        Raises: MmsslError, the first cause where ranks have ended one after the other.
        """
        self.folder.status("running", step=self.trainer.start, steps=self.steps, launch=self.launch())
        with Signals(self.trainer.hear):
            try:
                with Watchdog(self.peers, self.folder, self.recipe.train.hang_timeout, self.record):
                    self._train()
                self.peers.part()
            except BaseException as error:
                cause = self.peers.explain(error)
                logging.getLogger("mmssl").error("stopped: %s: %s", type(cause).__name__, cause)
                self.record(cause)
                known = storage_error(cause, self.folder.path) if isinstance(cause, Exception) else None
                if known and not isinstance(cause, MmsslError):
                    raise known from error
                if cause is not error:
                    raise cause from error
                raise

    def _train(self) -> None:
        with self.progress, following(self.recipe, self.folder, self.trainer):
            try:
                self.trainer.train()
            except DataError as error:  # from a worker it comes with a traceback before its text
                raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
        step = self.trainer.state.global_step
        self.folder.status("preempted" if step < self.steps else "finished", step=step, steps=self.steps)

    def record(self, error: BaseException) -> None:
        """Leave the cause of a failure in status.json."""
        record_failure(self.folder, self.peers, error, step=self.trainer.state.global_step, steps=self.steps)

    def _measure(self, trainer: SelfSupervisedTrainer) -> dict[str, float]:
        self.pictures.draw(trainer)
        return self.probes.measure(trainer)

    def _describe(self, trainer: SelfSupervisedTrainer) -> torch.Tensor:
        return describe(trainer, self.source, self.dataset.kind, self.views, self.micro)

    def _save(self, trainer: SelfSupervisedTrainer) -> None:
        save_run(trainer, self.views, self.folder)
