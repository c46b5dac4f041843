"""What more masks per sample cost: M = 8 against M = 1 at the shapes of vision/data2vec2-base."""

from __future__ import annotations

import math
from typing import Any

import torch

from mmssl.config import Recipe
from mmssl.masks import blocks
from mmssl.random import generator
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer
from mmssl.types import Batch, Clock, Mask, View
from tools.bench.turns import by_turns


def run(recipe: str = "vision/data2vec2-base", masks: str = "8", batch: str = "2", pairs: str = "5") -> dict[str, Any]:
    """Whole steps (forward, backward, optimizer, teacher), by turns, on the CPU in fp32.

    Returns: `time_ratio` (many masks : one, median over pairs), its spread, the arithmetic, and the check that the teacher
        ran once in both.
    """
    setting = Recipe.load(recipe)
    objective = Objective(setting.build())
    method: Any = objective.method
    optimizer = build_optimizer(objective, setting.optim)
    calls: list[int] = []
    method.teacher.encoder.transformer.register_forward_hook(lambda _, given, out: calls.append(len(given[0])))
    batches = {copies: _batch(setting, method, int(batch), copies) for copies in (int(masks), 1)}

    def step(copies: int) -> None:
        calls.clear()
        objective(*batches[copies], Clock(0, 100))["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.method.after_step(Clock(1, 100))
        assert calls == [int(batch)], "the teacher must run once per sample, whatever the number of masks"

    turns = by_turns({f"{copies} masks": lambda copies=copies: step(copies) for copies in batches}, int(pairs))
    return {
        "name": f"{masks} masks : 1 mask, {recipe}, batch {batch}",
        **turns.figures(),
        "tokens_ratio": round(_tokens(setting, int(masks)) / _tokens(setting, 1), 3),
        "peer": "the same step with one mask",
        "peer_version": torch.__version__,
    }


def _batch(setting: Recipe, method: Any, samples: int, copies: int) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    features, m = method.student.encoder.features, setting.views.mask  # type: ignore[attr-defined]
    draw = generator("bench")
    x = torch.randn(samples, features.channels, features.image_size, features.image_size, generator=draw)
    hidden = blocks(features.grid, samples * copies, m.ratio, m.width, m.adjust, draw, m.inverse)
    batch = Batch([View(x, "vision", mask=Mask.of(hidden))], torch.arange(samples))
    return batch.tensors(), tuple(range(samples))


def _tokens(setting: Recipe, copies: int) -> int:
    """Tokens of a step and sample in the trunk, a backward pass counted as two forward passes."""
    length = (setting.model.image_size // setting.model.patch_size) ** 2  # type: ignore[attr-defined]
    kept = math.floor(length * (1 - setting.views.mask.ratio))  # type: ignore[attr-defined]
    return length + 1 + 3 * copies * (kept + 1)
