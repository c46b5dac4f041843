"""What a run would need, measured on its first updates."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmssl.config import Settings
from mmssl.config.blocks import HubOptions
from mmssl.errors import RecipeError
from mmssl.training.pretrain import prepare
from mmssl.training.trainer import SelfSupervisedTrainer

UPDATES = 3


class Stopwatch(SelfSupervisedTrainer):
    """Notes when each update ends and the samples seen by then, and stops after a few."""

    times: list[tuple[float, int]] = []

    def end_update(self, control: Any) -> None:
        """As always, then stop."""
        super().end_update(control)
        self.times = [*self.times, (time.perf_counter(), self.samples)]
        control.should_log = control.should_evaluate = control.should_save = False
        control.should_training_stop = len(self.times) > UPDATES


def check(recipe: Settings) -> dict[str, Any]:
    """Decode samples, make four updates, measure the last three.

    Returns: parameters, samples, losses, seconds a step, samples a second, peak memory in MiB, hours for the whole run.
    Raises: MmsslError as `pretrain` would.
    """
    with tempfile.TemporaryDirectory() as temporary:
        quiet = recipe.train.model_copy(update={"report_to": []})
        own = {"out": str(Path(temporary) / "run"), "train": quiet, "hub": HubOptions()}  # type: ignore[call-arg]
        run = prepare(recipe.model_copy(update=own), trainer=Stopwatch)
        run.trainer.train()
        trainer: Any = run.trainer
    if len(trainer.times) < 2:
        raise RecipeError("train.steps: check needs a run of at least two updates to time one.")
    facts = [member.source.facts for member in run.members]
    (begin, before), *_, (end, after) = trainer.times
    step = (end - begin) / (len(trainer.times) - 1)
    cuda = run.args.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    losses = {n: float(v) / trainer.terms for n, v in trainer.sums.items() if n.startswith("loss")} if trainer.terms else {}
    return {
        "data": "; ".join(f"{one.get('path')}, {one.get('count', 'unknown number of')} samples" for one in facts),
        "unreadable": run.quarantine.summary(),
        "trained_parameters": sum(p.numel() for p in run.objective.method.parameters() if p.requires_grad),
        "encoder_parameters": sum(p.numel() for p in {p for m in run.members for p in m.method.student.parameters()}),
        "updates": run.steps,
        **{name: round(value, 4) for name, value in losses.items()},
        "seconds_per_update": round(step, 4),
        "samples_per_second": round(trainer.seen_by_all(after - before) / (end - begin), 1),
        "peak_memory_mib": peak >> 20,
        "hours_for_the_run": round(step * run.steps / 3600, 2),
    }
