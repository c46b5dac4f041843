"""The trackers of `train.report_to` follow a run through its interruptions: a resumed run is the same one there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmssl.config import Settings
from mmssl.training.run_folder import RunFolder
from mmssl.training.trainer import SelfSupervisedTrainer


@contextmanager
def following(recipe: Settings, folder: RunFolder, trainer: SelfSupervisedTrainer) -> Iterator[None]:
    """Have trackers go on with the run that status.json names as `tracker`, or begin one with a new name.

    wandb goes by its own variables, which the environment may already set, trackio by the run's name, TensorBoard by the
    folder, where what a killed run has logged after its last checkpoint is passed over.
    """
    if not recipe.train.report_to:
        yield
        return
    name = folder.read_status().get("tracker") or f"{folder.path.name}-{secrets.token_hex(4)}"
    folder.status("running", tracker=name)
    trainer.args.run_name = name
    if "tensorboard" in recipe.train.report_to:
        _to_tensorboard(folder, trainer)
    variables = {"WANDB_RUN_ID": name, "WANDB_RESUME": "allow"}
    ours = {variable: value for variable, value in variables.items() if variable not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for variable in ours:
            os.environ.pop(variable, None)


def _to_tensorboard(folder: RunFolder, trainer: SelfSupervisedTrainer) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    trainer.remove_callback(TensorBoardCallback)
    if folder.is_main:
        writer: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=trainer.start + 1 if trainer.start else None)
        trainer.add_callback(TensorBoardCallback(writer))
