"""What more masks per sample cost: M = 8 against M = 1 at the shapes of vision/data2vec2-base."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from mmssl.config import Recipe
from mmssl.masks import blocks
from mmssl.random import generator
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer
from mmssl.types import Batch, Clock, Mask, View


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
    seconds: dict[int, list[float]] = {1: [], int(masks): []}
    for turn in range(int(pairs) + 1):
        for copies in seconds:
            tensors, keys = _batch(setting, method, int(batch), copies)
            calls.clear()
            start = time.perf_counter()
            objective(tensors, keys, Clock(turn, 100))["total"].backward()
            optimizer.step()
            optimizer.zero_grad()
            objective.method.after_step(Clock(turn + 1, 100))
            if turn:  # the first turn warms up
                seconds[copies].append(time.perf_counter() - start)
            assert calls == [int(batch)], "the teacher must run once per sample, whatever the number of masks"
    ratios = [many / one for one, many in zip(*seconds.values())]
    return {
        "name": f"{masks} masks : 1 mask, {recipe}, batch {batch}",
        "time_ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "tokens_ratio": round(_tokens(setting, int(masks)) / _tokens(setting, 1), 3),
        "seconds": {copies: round(statistics.median(values), 3) for copies, values in seconds.items()},
        "peer": "the same step with one mask",
        "peer_version": torch.__version__,
        "threads": torch.get_num_threads(),
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
