"""Saving a run and going on with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from mmssl import __version__, stage
from mmssl.config import Settings
from mmssl.distributed import all_sum, barrier, gather_objects, world
from mmssl.errors import CheckpointError, CollapseError, MmsslError, NonFiniteError, RecipeError, StorageError, storage_error
from mmssl.hub.export import export_encoders, export_heads
from mmssl.registry import Views
from mmssl.training import checkpoint, resuming
from mmssl.training.guards import broken
from mmssl.training.objective import JointObjective, Objective
from mmssl.training.run_folder import RunFolder, remove, write_atomic
from mmssl.training.state import load_model_state, load_optimizer_state, model_state, optimizer_state, restore_model_state
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.training.writing import Writing, copied


def reopen(path: Path) -> RunFolder:
    """A run to go on with, which no other process is training. Raises: RecipeError."""
    folder = RunFolder.open(path)
    folder.check_idle()
    checkpoint.clean(folder.checkpoints)
    for stale in (*folder.path.glob(".tmp-*"), *folder.path.glob(".del-*"), *folder.heads.glob(".tmp-*")):
        remove(stale)
    return folder


def has_saved(folder: RunFolder) -> bool:
    """Whether a checkpoint was ever written, whole or not; a run that ended before its first one starts again."""
    if checkpoint.written(folder.checkpoints):
        return True
    if folder.is_main:
        print(f"mmssl: note: {folder.path} ended before its first checkpoint and starts again.", file=sys.stderr)
    folder.truncate_metrics(0)
    return False


def save_run(
    trainer: SelfSupervisedTrainer,
    views: Mapping[str, Views],
    folder: RunFolder,
    next_batch: Mapping[str, str | None] | None = None,
) -> None:
    """Checkpoint and `model/`, written by the main process from whole tensors.

    With `save.background` the checkpoint is only begun here, and what becomes of it is known at the next save.

    Args:
        views: of each member of the recipe.
        next_batch: of each member, identity of the update that comes next, see `batches.identity`.
    Raises: NonFiniteError if anything of it is not finite; StorageError if the disk is full or read-only for the
        `save.max_failed`th time in a row, or when the run ends. Before that it is said, and the run goes on.
    """
    tensors = {"model": model_state(trainer.objective), "optimizer": optimizer_state(trainer.objective, trainer.optimizer)}
    for part in tensors.values():
        if name := broken(part):
            raise NonFiniteError(f"{name} is not finite at step {trainer.state.global_step}; nothing was saved.")
    step, problem, ending = trainer.state.global_step, None, trainer.ending  # a signal may come at any time
    if folder.is_main:
        try:
            step, problem = settle(trainer, folder)
            _save(trainer, views, folder, tensors, next_batch, background=trainer.recipe.save.background and not ending)
            problem = None if trainer.writing is None else problem  # whatever became of the one before, this one is there
        except Exception as error:  # whatever it is, the other ranks must hear of it
            step, problem = trainer.state.global_step, storage_error(error, folder.path) or error
    mine = [problem is not None, problem is not None and not isinstance(problem, StorageError), ending]
    failed, fatal, ending = all_sum(torch.tensor(mine, dtype=torch.float32, device=trainer.args.device)).tolist()
    trainer.failed_saves = trainer.failed_saves + 1 if failed else 0
    if failed and not fatal and trainer.failed_saves < trainer.recipe.save.max_failed and not ending:
        if problem is not None:
            left = trainer.recipe.save.max_failed - trainer.failed_saves
            warn(
                f"{problem} Step {step} was not saved, older checkpoints are as they were; the run stops "
                f"when {left} more saves fail (save.max_failed)."
            )
        return
    if problem is not None:
        raise problem
    if failed:
        raise StorageError("The main process could not save; its message says why.")


def _save(
    trainer: SelfSupervisedTrainer,
    views: Mapping[str, Views],
    folder: RunFolder,
    tensors: dict[str, dict[str, torch.Tensor]],
    next_batch: Mapping[str, str | None] | None,
    background: bool,
) -> None:
    step, recipe = trainer.state.global_step, trainer.recipe
    also_keep = trainer.retention.at(step)
    if "best" in trainer.chosen and trainer.chosen["best"].step is not None:
        also_keep.add(trainer.chosen["best"].step)
    state = {
        "step": step,
        "applied": trainer.applied,
        "steps": trainer.steps,
        "world": world(),
        "samples": [trainer.bad, trainer.seen],
        "skipped": trainer.recent,
        "retention": trainer.retention.state(),
        "chosen": {name: one.state() for name, one in trainer.chosen.items()},
        "next_batch": dict(next_batch or {}),
        "metrics": trainer.metrics,
        "recipe": resuming.facts(recipe),
        "tracker": folder.read_status().get("tracker"),
        "versions": {"mmssl": __version__, "torch": torch.__version__},
    }
    rest = (state, recipe.save.keep, also_keep)
    if background:
        # On a processor, and under DeepSpeed, which may keep moments there, they are the trained tensors themselves.
        own = trainer.args.device.type == "cpu" or trainer.is_deepspeed_enabled
        trainer.writing = Writing.begin(folder.checkpoints, step, copied(tensors) if own else tensors, *rest)
    else:
        checkpoint.save(folder.checkpoints, step, tensors, *rest)
    _publish(recipe, views, folder, tensors["model"], trainer.metrics, step)
    if trainer.writing is None:
        folder.status("running", step=step, steps=trainer.steps)


def settle(trainer: SelfSupervisedTrainer, folder: RunFolder) -> tuple[int, Exception | None]:
    """Wait for a checkpoint that is being written. Returns: its step, and what went wrong with it, if anything did."""
    writing, trainer.writing = trainer.writing, None
    if writing is None:
        return trainer.state.global_step, None
    error: Any = writing.problem()
    if error is None:
        folder.status("running", step=writing.step, steps=trainer.steps)
    return writing.step, error and (storage_error(error, folder.path) or error)


def _publish(
    recipe: Settings,
    views: Mapping[str, Views],
    folder: RunFolder,
    tensors: dict[str, torch.Tensor],
    metrics: dict[str, float],
    step: int,
) -> None:
    """What others read of a run: its encoder, heads and card."""
    export_encoders(recipe, views, tensors, folder.model, metrics=metrics, step=step)
    export_heads(tensors, folder.heads)
    write_atomic(folder.card, (folder.model / "README.md").read_text("utf-8"))


def complete(recipe: Settings, views: Mapping[str, Views], folder: RunFolder, path: Path) -> None:
    """For a run that goes on from its last checkpoint: it may have been lost right after that. Only the main process writes.

    Raises: MmsslError if the checkpoint cannot be read; OSError if nothing can be written.
    """
    if folder.is_main:
        tensors, state = checkpoint.load(path)
        _publish(recipe, views, folder, tensors["model"], state["metrics"], int(state["step"]))


def load_run(
    objective: Objective | JointObjective,
    folder: RunFolder,
    path: Path,
    recipe: Settings,
    streaming: bool,
    allowed: Collection[str] = (),
    next_batch: Callable[[int], dict[str, str | None]] = lambda _: {},
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Tensors and state of a checkpoint; the weights are loaded already.

    Args:
        allowed: keys of the recipe that may differ from the saved ones.
        next_batch: step -> identity of the update that comes next, of each kind of data.
    Raises: CheckpointError if it does not fit; RecipeError if the recipe or the data are others than those of the run.
    """
    tensors, state = checkpoint.load(path)
    resuming.check_changes(state.get("recipe", {}), recipe, allowed, folder.is_main)
    if streaming and state["world"] != world():
        raise CheckpointError(f"A stream resumes on as many processes as it was saved on: {state['world']}, not {world()}.")
    now, saved = next_batch(int(state["step"])), state.get("next_batch") or {}
    saved = saved if isinstance(saved, dict) else {"": saved}  # as runs of one kind of data wrote it before version 0.9
    moved = [name for name, batch in saved.items() if None not in (batch, now.get(name)) and batch != now[name]]
    if moved and not any(resuming.within(key, ["data"]) for key in allowed):
        key = f"modalities.{moved[0]}.data.path" if moved[0] else "data.path"
        raise RecipeError(
            f"{key}: the batch after step {state['step']} holds other samples than when the run was saved: the data have "
            "changed, or the number of processes where train.micro_batch is unset. Go on all the same with "
            f"mmssl resume {folder.path} allow_changed=data."
        )
    load_model_state(objective, tensors["model"], resuming.added(state.get("recipe", {}), recipe))
    barrier()  # all have read it
    if folder.is_main:
        folder.truncate_metrics(int(state["step"]))
    return tensors, state


class Proof(TrainerCallback):
    """Notes that the run tries to go on from a checkpoint, and then that it got through an update from there.

    Raises: StorageError if the first cannot be written.
    """

    def __init__(self, trainer: SelfSupervisedTrainer, path: Path):
        self.trainer = trainer
        self.path: Path | None = path
        if trainer.is_world_process_zero():
            checkpoint.note_try(path)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The first time that one was applied."""
        if self.path is not None and not self.trainer.skips:
            if state.is_world_process_zero:
                checkpoint.forget_tries(self.path)
            self.path = None


def newest(folder: RunFolder) -> Path:
    """The checkpoint to go on from; a collective. Raises: CheckpointError."""
    path = choose(folder)
    if path is None:
        raise CheckpointError(f"{folder.path} holds no usable checkpoint. Start again with overwrite=true.")
    return path


def choose(folder: RunFolder, most: int | None = None) -> Path | None:
    """The newest usable checkpoint of a step up to `most`. The main process verifies them, the others are told its name.

    Raises: CheckpointError if the main process could not.
    """
    name, problem = None, None
    if folder.is_main:
        try:
            path, reasons = checkpoint.find(folder.checkpoints, most=most)
            for reason in reasons:
                print(f"mmssl: checkpoint left out: {reason}", file=sys.stderr)
            name = path and path.name
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = error
    name, failed = gather_objects((name, problem is not None))[0]
    if problem is not None:
        raise problem
    if failed:
        raise CheckpointError("The main process could not look for checkpoints; its message says why.")
    return name and folder.checkpoints / name


def rewind(trainer: SelfSupervisedTrainer, folder: RunFolder, why: MmsslError) -> None:
    """Go back to a checkpoint, in this process; what was logged since is dropped.

    It is the newest one; after a collapse, the last that proved healthy if there is one, and later ones are removed, as they
    hold what led there. Raises: `why` if there is none.
    """
    folder.status("running", rollbacks=trainer.rollbacks)  # first, so that a resume takes the same rate
    stage.enter("save", trainer.state.global_step)
    _, problem = settle(trainer, folder)
    if problem is not None:
        warn(str(problem))
    healthy = trainer.retention.healthy if isinstance(why, CollapseError) else None
    path = choose(folder, healthy) or choose(folder)
    if path is None:
        raise type(why)(f"{why} There is no checkpoint to go back to.")
    tensors, state = checkpoint.load(path)
    restore_model_state(trainer.objective, tensors["model"], resuming.added(state.get("recipe", {}), trainer.recipe))
    load_optimizer_state(trainer.objective, trainer.optimizer, tensors["optimizer"])
    trainer.stand_at(state)
    best = trainer.chosen.get("best")
    if best is not None and best.step is not None and not checkpoint.place(folder.checkpoints, best.step).exists():
        best.load(None)  # a later one, which the run left just now, had taken its place
    barrier()  # all have read it
    if folder.is_main:
        folder.truncate_metrics(int(state["step"]))
        checkpoint.drop_after(path)
        factor = trainer.recipe.watch.rollback_factor**trainer.rollbacks
        warn(f"{why} Going on from step {state['step']} with {factor:g} of the learning rate (watch.rollback_factor).")


def warn(text: str) -> None:
    """On the terminal and in log.txt."""
    logging.getLogger("mmssl").warning(text)
    print(f"mmssl: note: {text}", file=sys.stderr)
