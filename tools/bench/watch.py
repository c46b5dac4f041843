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
from mmssl.training.trainer import SelfSupervisedTrainer

WARM = 3  # updates that are not counted


class Timed(SelfSupervisedTrainer):
    """Keeps the processor seconds of each update, its share of logging included."""

    def begin_update(self) -> None:
        """Take the time."""
        self.times = [*getattr(self, "times", []), time.process_time()]
        super().begin_update()


def train(recipe: str, watched: bool, words: list[str]) -> tuple[float, list[float]]:
    """Processor seconds of an update, the mean, and of two watch steps, the first of which decodes what they look at."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(Recipe.load(recipe, f"out={folder}/run", f"watch.linear={str(watched).lower()}", *words), trainer=Timed)
        trainer: Any = run.trainer
        probe, trainer.probe, trainer.save_run = trainer.probe, lambda _: {}, lambda _: None
        if not watched:
            trainer._outputs = lambda: {}
            trainer.objective.method.judge = lambda line, first: []
        trainer.train()
        probes = []
        for _ in range(2 if watched else 0):
            start = time.process_time()
            probe(trainer)
            probes.append(time.process_time() - start)
    counted = trainer.times[WARM:]
    return (counted[-1] - counted[0]) / (len(counted) - 1), probes


def run(
    recipe: str = "vision/data2vec2-cifar10-cpu", data: str = "../shared/data/cifar10", updates: str = "30", pairs: str = "3"
) -> dict[str, Any]:
    """Short runs by turns with and without, all in one process, in processor seconds, at the default interval and samples.

    Returns: `time_ratio` ((an update + a watch step : `every`) : an update without, median over pairs), its spread, and the
        same with the online probe and health alone.
    """
    every, samples = (WatchOptions.model_fields[name].default for name in ("every", "samples"))
    words = [f"data.path={Path(data)}", f"train.steps={int(updates) + WARM}", "data.workers=0", f"watch.samples={samples}"]
    words += ["watch.every=0", "watch.change=false", "watch.pictures=false", "train.seed=0"]
    without, beside, first, later = [], [], [], []
    for _ in range(int(pairs)):
        without.append(train(recipe, False, words)[0])
        update, probes = train(recipe, True, words)
        beside.append(update)
        first.append(probes[0])
        later.append(probes[1])
    ratios = [(on + probe / every) / off for off, on, probe in zip(without, beside, later)]
    return {
        "name": f"watched : unwatched updates, {recipe}, every {every} updates, {samples} samples of each split",
        "time_ratio": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "updates_alone": round(statistics.median(on / off for off, on in zip(without, beside)), 4),
        "watch_step_share": round(statistics.median(later) / (every * statistics.median(without)), 4),
        "seconds": {
            "update_without": round(statistics.median(without), 4),
            "update_with": round(statistics.median(beside), 4),
            "first_watch_step": round(statistics.median(first), 2),
            "watch_step": round(statistics.median(later), 2),
        },
        "peer": "the same run without",
        "peer_version": torch.__version__,
        "threads": torch.get_num_threads(),
    }
