"""Saving a run and going on with it."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from mmssl.distributed import all_sum, barrier, gather_objects, world
from mmssl.errors import CheckpointError, MmsslError, NonFiniteError
from mmssl.hub.export import export_encoder, export_heads
from mmssl.registry import Views
from mmssl.training import checkpoint
from mmssl.training.guards import broken
from mmssl.training.objective import Objective
from mmssl.training.run_folder import RunFolder, write_atomic
from mmssl.training.state import load_model_state, load_optimizer_state, model_state, optimizer_state, restore_model_state
from mmssl.training.trainer import SelfSupervisedTrainer


def reopen(path: Path) -> RunFolder:
    """A run to go on with, which no other process is training. Raises: RecipeError."""
    folder = RunFolder.open(path)
    folder.check_idle()
    checkpoint.clean(folder.checkpoints)
    for stale in (*folder.path.glob(".tmp-model-*"), *folder.path.glob(".del-model")):
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def save_run(trainer: SelfSupervisedTrainer, views: Views, folder: RunFolder) -> None:
    """Checkpoint and `model/`, written by the main process from whole tensors."""
    tensors = {"model": model_state(trainer.objective), "optimizer": optimizer_state(trainer.objective, trainer.optimizer)}
    for part in tensors.values():
        if name := broken(part):
            raise NonFiniteError(f"{name} is not finite at step {trainer.state.global_step}; nothing was saved.")
    problem: Exception | None = None
    if folder.is_main:
        step = trainer.state.global_step
        state = {
            "step": step,
            "applied": trainer.applied,
            "steps": trainer.steps,
            "world": world(),
            "samples": [trainer.bad, trainer.seen],
            "skipped": trainer.recent,
            "metrics": trainer.metrics,
        }
        try:
            checkpoint.save(folder.checkpoints, step, tensors, state, trainer.recipe.save.keep)
            export_encoder(trainer.recipe, views, tensors["model"], folder.model, metrics=trainer.metrics, step=step)
            export_heads(tensors["model"], folder.heads)
            write_atomic(folder.card, (folder.model / "README.md").read_text("utf-8"))
            folder.status("running", step=step, steps=trainer.steps)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = error
    failed = float(all_sum(torch.tensor(float(problem is not None), device=trainer.args.device)))
    if problem is not None:
        raise problem
    if failed:
        raise CheckpointError("The main process could not save; its message says why.")
    barrier()


def load_run(
    objective: Objective, folder: RunFolder, streaming: bool
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Tensors and state of the newest usable checkpoint; the weights are loaded already. Raises: CheckpointError."""
    path = choose(folder)
    if path is None:
        raise CheckpointError(f"{folder.path} holds no usable checkpoint. Start again with overwrite=true.")
    tensors, state = checkpoint.load(path)
    if streaming and state["world"] != world():
        raise CheckpointError(f"A stream resumes on as many processes as it was saved on: {state['world']}, not {world()}.")
    load_model_state(objective, tensors["model"])
    folder.truncate_metrics(int(state["step"]))
    return tensors, state


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
    """Go back to the newest checkpoint, in this process; what was logged since is dropped. Raises: `why` if there is none."""
    folder.status("running", rollbacks=trainer.rollbacks)  # first, so that a resume takes the same rate
    path = choose(folder)
    if path is None:
        raise type(why)(f"{why} There is no checkpoint to go back to.")
    tensors, state = checkpoint.load(path)
    restore_model_state(trainer.objective, tensors["model"])
    load_optimizer_state(trainer.objective, trainer.optimizer, tensors["optimizer"])
    trainer.stand_at(state)
    folder.truncate_metrics(int(state["step"]))
    if folder.is_main:
        factor = trainer.recipe.watch.rollback_factor**trainer.rollbacks
        text = f"{why} Going on from step {state['step']} with {factor:g} of the learning rate (watch.rollback_factor)."
        logging.getLogger("mmssl").warning(text)
        print(f"mmssl: note: {text}", file=sys.stderr)
    barrier()
