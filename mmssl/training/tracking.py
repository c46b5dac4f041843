"""One run in a tracker, however often it was resumed."""

from __future__ import annotations

import os
from typing import Any

from mmssl.training.run_folder import RunFolder
from mmssl.training.trainer import SelfSupervisedTrainer


def track(trainer: SelfSupervisedTrainer, folder: RunFolder) -> None:
    """Before training: give the trackers of `train.report_to` the id that the run has had since it was created."""
    run: Any = folder.read_status().get("tracker")
    if not run:  # of an older version
        return
    trainer.args.run_name = f"{folder.path.name}-{run}"  # Trackio resumes by name
    if "wandb" in (trainer.args.report_to or ()):
        os.environ |= {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback":
            callback.logging_dir = str(folder.path / "runs" / run)
