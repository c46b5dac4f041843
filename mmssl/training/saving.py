"""Saving a run and going on with it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from mmssl.distributed import all_sum, barrier, world
from mmssl.errors import CheckpointError, NonFiniteError
from mmssl.hub.export import export_encoder, export_heads
from mmssl.registry import Views
from mmssl.training import checkpoint
from mmssl.training.objective import Objective
from mmssl.training.run_folder import RunFolder, write_atomic
from mmssl.training.state import load_model_state, model_state, optimizer_state
from mmssl.training.trainer import SelfSupervisedTrainer


def reopen(path: Path) -> RunFolder:
    """A run to go on with, which no other process is training. Raises: RecipeError."""
    folder = RunFolder.open(path)
    folder.check_idle()
    checkpoint.clean(folder.checkpoints)
    for stale in (*folder.path.glob(".tmp-model-*"), *folder.path.glob(".del-model")):
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def has_saved(folder: RunFolder) -> bool:
    """Whether there is a checkpoint, whole or not, to go on from; a run that ended before its first one starts again."""
    found, rejected = checkpoint.find(folder.checkpoints, hashes=False)
    if found or rejected:
        return True
    if folder.is_main:
        print(f"mmssl: note: {folder.path} ended before its first checkpoint and starts again.", file=sys.stderr)
    folder.truncate_metrics(0)
    return False


def save_run(trainer: SelfSupervisedTrainer, views: Views, folder: RunFolder) -> None:
    """Checkpoint and `model/`, written by the main process from whole tensors."""
    tensors = {"model": model_state(trainer.objective), "optimizer": optimizer_state(trainer.objective, trainer.optimizer)}
    broken = [n for part in tensors.values() for n, t in part.items() if not bool(t.isfinite().all())]
    if broken:
        raise NonFiniteError(f"{broken[0]} is not finite at step {trainer.state.global_step}; nothing was saved.")
    problem: Exception | None = None
    if folder.is_main:
        step = trainer.state.global_step
        state = {
            "step": step,
            "applied": trainer.applied,
            "steps": trainer.steps,
            "world": world(),
            "samples": [trainer.bad, trainer.seen],
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
    path, reasons = checkpoint.find(folder.checkpoints)
    for reason in reasons if folder.is_main else []:
        print(f"mmssl: checkpoint left out: {reason}", file=sys.stderr)
    if path is None:
        raise CheckpointError(f"{folder.path} holds no usable checkpoint. Start again with overwrite=true.")
    tensors, state = checkpoint.load(path)
    if streaming and state["world"] != world():
        raise CheckpointError(f"A stream resumes on as many processes as it was saved on: {state['world']}, not {world()}.")
    load_model_state(objective, tensors["model"])
    folder.truncate_metrics(int(state["step"]))
    return tensors, state
