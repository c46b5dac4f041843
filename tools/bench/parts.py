"""Samples that pass the encoder in parts, each computed again in the backward pass, against all at once: time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.config import Recipe
from mmssl.methods.families import embed_in_parts
from mmssl.random import generator
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer, schedule
from mmssl.types import Batch, Clock, View
from tools.bench.turns import by_turns, forget_peak, high_water, resident

SIDES = ("parts", "whole")


class Side(NamedTuple):
    """A method with its optimizer, and a batch."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    batch: tuple[dict[str, Tensor], tuple[int, ...]]
    precision: str

    def loss(self) -> Tensor:
        """Of the batch."""
        device = self.batch[0]["index"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.objective(*self.batch, Clock(0, 100))["total"]

    def step(self) -> None:
        """Forward, backward, optimizer, teacher."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.method.after_step(Clock(1, 100))


def run(recipe: str = "vision/moco_v3-small", batch: str = "32", rows: str = "8", pairs: str = "3", device: str = "cpu",
        precision: str = "fp32", words: str = "") -> dict[str, Any]:  # fmt: skip
    """Whole steps by turns, of a method that compares whole samples and has no batch normalisation in its encoder.

    Args:
        batch: samples of a step.  rows: of them at once in `parts`, see `train.encoder_batch`.
        words: of the recipe, for other shapes: "model.depth=2 model.hidden_size=384".
    Returns: `time_ratio` (parts : whole, median over pairs), its spread, `memory_ratio` (at the peak, with weights, gradients
        and moments, in a process for each), and the losses of both, which must agree to 1e-4.
    """
    sides = {name: _side(name, recipe, batch, rows, device, precision, words) for name in SIDES}
    losses = {name: float(side.loss().detach()) for name, side in sides.items()}
    if abs(losses["parts"] - losses["whole"]) > 1e-4 * abs(losses["whole"]):
        raise RuntimeError(f"the two sides compute different losses, {losses}; there is nothing to time")
    peaks = {name: _peak(name, recipe, batch, rows, device, precision, words) for name in SIDES}
    return {
        "name": f"{rows} samples at once : {batch}, {recipe}, {device}, {precision}",
        **by_turns({name: side.step for name, side in sides.items()}, int(pairs)).figures(),
        "memory_ratio": round(peaks["parts"] / peaks["whole"], 3),
        "mebibytes": {name: round(value / 2**20) for name, value in peaks.items()},
        "loss": {name: round(value, 6) for name, value in losses.items()},
        "peer": "the same step with all samples at once",
        "peer_version": torch.__version__,
    }


def _side(name: str, recipe: str, batch: str, rows: str, device: str, precision: str, words: str) -> Side:
    setting = Recipe.load(recipe, *words.split())
    torch.manual_seed(0)
    objective = Objective(setting.build()).to(device)
    if name == "parts" and not embed_in_parts(objective, int(rows)):
        sys.exit(f"{recipe}: its method compares no whole samples")
    method: Any = objective.method
    features = method.student.encoder.features
    shape = (int(batch), features.channels, features.image_size, features.image_size)
    views = [View(torch.randn(shape, generator=generator("bench", view)), "vision") for view in range(method.views)]
    tensors = {key: value.to(device) for key, value in Batch(views, torch.arange(int(batch))).tensors().items()}
    optimizer = build_optimizer(objective, setting.optim, schedule(setting.optim, int(batch), 1.0))
    return Side(objective, optimizer, (tensors, tuple(range(int(batch)))), precision)


def _peak(*words: str) -> int:
    """Bytes beyond what stood before the model was built, in a fresh process."""
    done = subprocess.run([sys.executable, "-m", __name__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(*words: str) -> int:
    """Two steps of one side; moments exist in the second."""
    before = resident()
    side = _side(*words)
    forget_peak()
    for _ in range(2):
        side.step()
    return high_water() - before if words[4] == "cpu" else torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
