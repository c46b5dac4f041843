"""What online watching costs: updates with the online probe and health, and a watch step at each interval, against neither."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmssl.config import Recipe
from mmssl.config.blocks import WatchOptions
from mmssl.training.pretrain import prepare
from mmssl.training.trainer import HEALTHY, SelfSupervisedTrainer

WARM = 3  # updates that are not counted


class ByTurns(SelfSupervisedTrainer):
    """Every other update is without the online probe and without health; keeps the processor seconds at which each began."""

    def begin_update(self) -> None:
        """Take the time, and turn watching on or off."""
        if not hasattr(self, "began"):
            self.began: list[float] = []
            self.online: Any = self.objective.probe
        self.began.append(time.process_time())
        self.watching = len(self.began) % 2 == 0
        self.objective.probe = self.online if self.watching else None  # type: ignore[union-attr]
        super().begin_update()

    def _outputs(self) -> dict[str, float]:
        return super()._outputs() if self.watching else {}


def run(
    recipe: str = "vision/data2vec2-cifar10-cpu", data: str = "../shared/data/cifar10", pairs: str = "20"
) -> dict[str, Any]:
    """One run whose updates are by turns with and without, then two watch steps, the first of which decodes what they look at.

    In processor seconds; every update is logged, where a run logs every tenth by default.

    Returns: `time_ratio` ((an update with + a watch step : `watch.every`) : the update before without; the median), the 5th and
        95th percentile, and the shares of both parts.
    """
    every, samples = (WatchOptions.model_fields[name].default for name in ("every", "samples"))
    steps = WARM + 1 + 2 * int(pairs)
    words = [f"data.path={Path(data)}", f"train.steps={steps}", "data.workers=0", "train.log_every=1", "watch.linear=true"]
    words += ["watch.every=0", f"watch.samples={samples}", "watch.change=false", "watch.pictures=false"]
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = prepare(Recipe.load(recipe, f"out={folder}/run", *words), trainer=ByTurns).trainer
        probe, trainer.probe, trainer.save_run = trainer.probe, lambda _: {}, lambda _: None
        judge, method = trainer.objective.method.judge, trainer.objective.method
        method.judge = lambda line, first: judge(line, first) if trainer.watching else [HEALTHY]
        trainer.train()
        trainer.objective.probe = trainer.online
        steps_of_watch = []
        for _ in range(2):
            start = time.process_time()
            probe(trainer)
            steps_of_watch.append(time.process_time() - start)
    each = [after - before for before, after in zip(trainer.began, trainer.began[1:])]  # the first one without
    first = WARM + WARM % 2
    without, beside = each[first::2], each[first + 1 :: 2]
    whole = statistics.median(without)
    ratios = sorted((on + steps_of_watch[1] / every) / off for off, on in zip(without, beside))
    return {
        "name": f"watched : unwatched updates, {recipe}, every {every} updates, {samples} samples of each split",
        "time_ratio": round(statistics.median(ratios), 4),
        "spread": [round(ratios[round(share * (len(ratios) - 1))], 4) for share in (0.05, 0.95)],
        "updates_alone": round(statistics.median(beside) / whole, 4),
        "watch_step_share": round(steps_of_watch[1] / (every * whole), 4),
        "seconds": {
            "update_without": round(whole, 4),
            "update_with": round(statistics.median(beside), 4),
            "first_watch_step": round(steps_of_watch[0], 2),
            "watch_step": round(steps_of_watch[1], 2),
        },
        "peer": "updates of the same run without",
        "peer_version": torch.__version__,
        "threads": torch.get_num_threads(),
    }
