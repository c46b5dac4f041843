"""One run, from a checked recipe to a folder with a model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mmssl import report, stage
from mmssl.allocator import keep_freed_memory
from mmssl.config import JointRecipe, Recipe, Settings
from mmssl.data.quarantine import Quarantine, Quarantines
from mmssl.distributed import world
from mmssl.errors import DataError, MmsslError, RecipeError, storage_error
from mmssl.hub.export import modelling_code
from mmssl.methods.families import embed_in_parts
from mmssl.model.recompute import recompute
from mmssl.model.regressor import CrossBlock
from mmssl.model.transformer import Block
from mmssl.parts import Teacher
from mmssl.training import checkpoint
from mmssl.training.change import change, told
from mmssl.training.choice import Watched, watched
from mmssl.training.export import export
from mmssl.training.launch import launched, main_first, out, training_arguments, unpartitioned
from mmssl.training.member import Member, Together
from mmssl.training.objective import JointObjective, Objective
from mmssl.training.outcome import leave, record_failure
from mmssl.training.pairs import Crossing, check_pairs
from mmssl.training.peers import Peers
from mmssl.training.progress import Progress
from mmssl.training.pushing import Pusher, reach
from mmssl.training.replay import record
from mmssl.training.resuming import added
from mmssl.training.retention import Retention
from mmssl.training.run_folder import RunFolder
from mmssl.training.saving import Proof, complete, has_saved, load_run, newest, reopen, rewind, save_run, warn
from mmssl.training.signals import Signals
from mmssl.training.state import model_state
from mmssl.training.trackers import following
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.training.watchdog import Watchdog


def pretrain(recipe: Settings, overwrite: bool = False, resume: bool = False, allow_changed: Collection[str] = ()) -> Path:
    """Train as the recipe says.

    Args:
        recipe: checked; `recipe.out` is the run folder.
        overwrite: remove an earlier run in that folder.
        resume: go on from the newest complete checkpoint in that folder, from the start if there was none yet.
        allow_changed: keys of the recipe, or blocks, that may differ from those that the run was saved with.
    Returns: the run folder; `model/` in it is the encoder.
    Raises: MmsslError with the exit status of the contract.
    """
    run = prepare(recipe, overwrite, resume, allow_changed=allow_changed)
    log, handler = logging.getLogger("mmssl"), run.folder.log_handler()
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        run.train()
    finally:
        log.removeHandler(handler)
    return run.folder.path


def prepare(
    recipe: Settings,
    overwrite: bool = False,
    resume: bool = False,
    trainer: type[SelfSupervisedTrainer] = SelfSupervisedTrainer,
    allow_changed: Collection[str] = (),
) -> Run:
    """Everything up to the first step: processes, data, folder, model. Raises: MmsslError."""
    args = training_arguments(recipe)
    stage.enter("preparation", 0)
    peers, at = Peers(), out(recipe)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if args.device.type == "cpu":
        keep_freed_memory()
    folder: RunFolder | None = None

    def opened() -> RunFolder:
        nonlocal folder  # known from here on, whatever becomes of the other ranks
        if recipe.hub.repo:
            reach(recipe.hub, resume)
        folder = peers.make_place(reopen(at) if resume else RunFolder.create(at, overwrite))
        return folder

    with Signals(lambda _: leave(folder, peers)), unpartitioned():
        try:
            members = [Member(name, one, args) for name, one in recipe.members.items()]  # before the folder
            if isinstance(recipe, JointRecipe) and recipe.bind:
                check_pairs(members, recipe.bind)
            peers.folder = folder = main_first(opened, args) or RunFolder(at, is_main=False)
            going_on = resume and has_saved(folder)
            return Run(recipe, args, members, folder, peers, going_on, trainer, allow_changed)
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
        recipe: Settings,
        args: TrainingArguments,
        members: list[Member],
        folder: RunFolder,
        peers: Peers,
        resume: bool = False,
        trainer: type[SelfSupervisedTrainer] = SelfSupervisedTrainer,
        allow_changed: Collection[str] = (),
    ):
        self.recipe, self.args, self.folder, self.peers = recipe, args, folder, peers
        self.members = members
        alone = members[0] if isinstance(recipe, Recipe) else None
        # Passes over several data sets are of unlike length; such a run counts as one.
        self.epoch_steps = alone.epoch_steps if alone else recipe.train.steps or 1
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
        found = newest(folder) if resume else None
        new = added(checkpoint.state_of(found)["recipe"], recipe) if found is not None else set()
        self.objective: Objective | JointObjective
        self.quarantine: Quarantine
        self.crossing: Crossing | None = None
        if isinstance(recipe, JointRecipe):
            modelling_code([*recipe.members.values()])  # what cannot be exported is told now
            methods, given = recipe.build(), recipe.modalities
            balanced = recipe.balance == "magnitude"
            learned = {
                m.name: m.learn(methods[m.name], folder, resume and m.name not in new, given[m.name].weight, balanced)
                for m in members
            }
            binding = recipe.bind.build() if recipe.bind else None
            self.crossing = Crossing(members, recipe.bind) if recipe.bind else None
            self.objective, self.quarantine = JointObjective(learned, binding), Quarantines([m.quarantine for m in members])
        else:
            self.objective = members[0].learn(members[0].recipe.build(), folder, resume)
            self.quarantine = members[0].quarantine
        if recipe.train.recompute and not recompute(self.objective, (Block, CrossBlock)):
            raise RecipeError("train.recompute: nothing here has blocks that could do so; leave it out.")
        if recipe.train.encoder_batch:
            self._embed_in_parts(recipe.train.encoder_batch)
        if recipe.train.compile:
            parts = self.objective.method.parts()
            students = [member.method.student.encoder for member in members]
            encoders = [*students, *(part.encoder for part in parts if isinstance(part, Teacher))]
            decoders = [module for module in self.objective.method.modules() if isinstance(module, (Block, CrossBlock))]
            for block in dict.fromkeys([*(b for e in encoders for b in e.compilable()), *decoders]):
                block.compile()
        tensors, state = {}, {}
        streaming = any(member.source.streaming for member in members)
        if found is not None:
            tensors, state = load_run(self.objective, folder, found, recipe, streaming, allow_changed, self._next_batch)
        for part in self.objective.method.parts() if recipe.train.split_teacher else ():
            if isinstance(part, Teacher):
                part.split()
        folder.write_identity(recipe.dump(), sys.argv, self.facts)
        self.start = int(state.get("step", 0))
        show = partial(report.refresh, folder, recipe)
        self.progress = Progress(folder, self.steps, self.start, quiet=not folder.is_main, probed=show)
        self.trainer = trainer(
            self.objective,
            recipe,
            args,
            self.steps,
            self.epoch_steps,
            self._loader,
            self.progress.report,
            self.measure,
            self._save,
            self.quarantine,
            self.start,
            state.get("applied", 0),
            tuple(state.get("samples", (0, 0))),
            tensors.get("optimizer"),
            alone.describe if alone and not streaming else None,
            lambda trainer: record(trainer, folder, {member.name: member.place for member in members}),
            self._rewind,
            folder.read_status().get("rollbacks") or 0 if resume else 0,
            self.conclude,
        )
        self.trainer.metrics = state.get("metrics", {})
        self.trainer.first = folder.first_metrics() if self.start else {}
        self.trainer.recent = state.get("skipped", [])
        self.trainer.retention = Retention(self.steps, recipe.save, state.get("retention"))
        self.trainer.chosen = self._chosen()
        self.trainer.take_choices(state)
        self.last = found if self.start >= self.steps or self.trainer.early else None  # with no update after it
        if found is not None and self.last is None:
            self.trainer.add_callback(Proof(self.trainer, found))
        self.pusher = Pusher(folder, recipe.hub) if recipe.hub.repo and folder.is_main else None
        if self.pusher is not None:
            self.trainer.add_callback(self.pusher)

    def _embed_in_parts(self, rows: int) -> None:
        try:
            if not embed_in_parts(self.objective, rows):
                raise ValueError("nothing here compares whole samples; take train.micro_batch")
        except ValueError as error:
            raise RecipeError(f"train.encoder_batch: {error}.") from None

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the data."""
        found = {member.name: member.source.facts for member in self.members}
        return found.get("", found)

    @property
    def views(self) -> dict[str, Any]:
        """Of each member."""
        return {member.name: member.views for member in self.members}

    def _loader(self, start: int) -> Iterable[Any]:
        """Batches of this rank from update `start` to the end."""
        loaders = {member.name: member.loader(start, self.steps) for member in self.members}
        return loaders.get("") or Together(loaders)

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
                self._let_end()
                known = storage_error(cause, self.folder.path) if isinstance(cause, Exception) else None
                if known and not isinstance(cause, MmsslError):
                    raise known from error
                if cause is not error:
                    raise cause from error
                raise
            finally:
                self.progress.probed()

    def _let_end(self) -> None:
        """What was begun to be written is worth its end, but not for ever."""
        writing, self.trainer.writing = self.trainer.writing, None
        if writing is not None:
            try:
                problem = writing.problem(self.recipe.train.hang_timeout)
            except TimeoutError:
                problem = TimeoutError("it takes too long.")
            if problem is not None:
                warn(f"Step {writing.step} was not saved: {problem}")

    def _train(self) -> None:
        ended = self.last is not None and self.trainer.early
        with self.progress, following(self.recipe, self.folder, self.trainer):
            try:
                if not ended:
                    self.trainer.train()
            except DataError as error:  # from a worker it comes with a traceback before its text
                raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
        if self.last is not None:
            complete(self.recipe, self.views, self.folder, self.last)
        step = self.start if ended else self.trainer.state.global_step
        state = "finished" if step >= self.steps or self.trainer.early else "preempted"
        best = self.trainer.chosen.get("best")
        if best is not None and best.step is not None and self.folder.is_main:
            export(self.folder.path, checkpoint="best")
        if self.pusher is not None and state == "finished":
            self.pusher.finish(step, self.recipe.train.hang_timeout, lambda: self.trainer.stop_signal is not None)
        kept = best and {name: best.state()[name] for name in ("metric", "value", "step")}
        facts = {"change": told(self.trainer.metrics), "best": kept, "early": self._early}
        self.folder.status(state, step=step, steps=self.steps, **facts)

    def record(self, error: BaseException) -> None:
        """Leave the cause of a failure in status.json."""
        record_failure(self.folder, self.peers, error, step=self.trainer.state.global_step, steps=self.steps)

    def measure(self, trainer: SelfSupervisedTrainer) -> dict[str, float]:
        """Pictures, and the metrics of all members and of what binds them; a collective."""
        found = {name: value for member in self.members for name, value in member.measure(trainer).items()}
        return found | (self.crossing.measure(trainer) if self.crossing else {})

    def _chosen(self) -> dict[str, Watched]:
        """The metrics that decide what is kept, and when to end. Raises: RecipeError if they are not measured."""
        names = [name for member in self.members for name in member.probes.names(member.objective)]
        found = {
            "best": watched(self.recipe.save.best, "save.best", names),
            "stop": watched(self.recipe.watch.stop, "watch.stop", names),
        }
        return {name: one for name, one in found.items() if one is not None}

    @property
    def _early(self) -> str | None:
        """Why the run ended before its last update."""
        if not self.trainer.early:
            return None
        stop = self.trainer.chosen["stop"]
        return f"{stop.metric} was no better than at step {stop.step} in {stop.waited} measurements (watch.stop)"

    def conclude(self, trainer: SelfSupervisedTrainer) -> dict[str, float]:
        """How the exported encoder compares with what the run started from, if that is watched; a collective."""
        sets = {member.name: member.probes.sets if member.recipe.watch.change else None for member in self.members}
        return change(trainer, self.recipe, sets, model_state(trainer.objective)) if any(sets.values()) else {}

    def _save(self, trainer: SelfSupervisedTrainer) -> None:
        save_run(trainer, self.views, self.folder, self._next_batch(trainer.state.global_step))
        if self.pusher is not None and not trainer.failed_saves:
            self.pusher.saved(trainer.state.global_step)

    def _next_batch(self, step: int) -> dict[str, str | None]:
        """Member -> identity of the update after `step`; None where it is not a function of the data alone."""
        return {member.name: member.next_batch(step) for member in self.members}

    def _rewind(self, trainer: SelfSupervisedTrainer, why: MmsslError) -> None:
        rewind(trainer, self.folder, why)
        self.progress.back(trainer.state.global_step)
