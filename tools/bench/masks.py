"""What more masks per sample cost: M = 8 against M = 1, data2vec 1 or MAE, at the shapes of vision/data2vec2-base."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from mmssl.config import Recipe
from mmssl.masks import blocks, uniform
from mmssl.parts import Teacher
from mmssl.random import generator
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer
from mmssl.training.plan import counting_flops
from mmssl.types import Batch, Clock, Mask, View
from tools.bench.machine import peak, waits
from tools.bench.turns import by_turns


def run(recipe: str = "vision/data2vec2-base", masks: str = "8", batch: str = "2", pairs: str = "5", peer: str = "one",
        device: str = "cpu", precision: str = "fp32", compiled: str = "false", best: str = "") -> dict[str, Any]:  # fmt: skip
    """Whole steps (forward, backward, optimizer, teacher), by turns.

    Args:
        peer: `one`, the same step with a single mask; or a recipe with one mask a sample such as vision/data2vec1-base or
            vision/mae-base, of as many images as there are masked views here, without the dropout that data2vec 2 lacks, too.
        precision: fp32, or bf16 for autocast.  compiled: whether blocks are compiled, on both sides, as by `train.compile`.
        best: TFLOP a second of the device in that precision; those of a product of large matrices if empty.
    Returns: `time_ratio` (many masks : the other, median over pairs), its spread, and the check that teachers ran once a
        sample in both; with one mask the arithmetic, and against others how many times as many masked views a second. Of
        the many masks `utilisation`, the share of `best` that their products have, and how often the host waits in a step.
    """
    where = _Where(device, precision, compiled == "true")
    mine = _Side(Recipe.load(recipe), int(batch), int(masks), where)
    with counting_flops() as flops:
        mine.loss().backward()
    mine.optimizer.zero_grad()
    products, most = flops(), float(best) * 1e12 if best else peak(device, precision)
    if peer == "one":
        other = _Side(mine.setting, int(batch), 1, where, mine)
    else:
        plain = ("model.drop_path=0", "model.dropout=0", "model.attention_dropout=0")
        other = _Side(Recipe.load(peer, *plain), int(batch) * int(masks), 1, where)
    for side in (mine, other)[: 1 if peer == "one" else 2]:
        side.compile()
    told = ("1 mask, the same" if peer == "one" else peer) + f", batch {other.samples}"
    turns = by_turns({f"{masks} masks": mine.step, told: other.step}, int(pairs))
    figures = turns.figures()
    if peer == "one":
        more = {"tokens_ratio": round(_tokens(mine.setting, int(masks)) / _tokens(mine.setting, 1), 3)}
    else:
        more = {"views_ratio": round(1 / figures["time_ratio"], 2), "views_a_step": int(batch) * int(masks)}
    return {
        "name": f"{masks} masks, {recipe}, batch {batch} : {told}, {device}, {precision}{', compiled' * where.compiled}",
        **figures,
        **more,
        "utilisation": round(products / figures["seconds"][f"{masks} masks"] / most, 3),
        "best_teraflops": round(most / 1e12, 3),
        "host_waits": waits(mine.step),
        "peer": "the same step with one mask" if peer == "one" else peer,
        "peer_version": torch.__version__,
    }


class _Where(NamedTuple):
    """What a step runs on, and how."""

    device: str
    precision: str
    compiled: bool


class _Side:
    """A method with its optimizer and a batch; of another side, if one is given, with as many masks of its own."""

    def __init__(self, setting: Recipe, samples: int, copies: int, where: _Where, of: _Side | None = None):
        self.setting, self.samples, self.where = setting, samples, where
        self.objective = Objective(setting.build()).to(where.device) if of is None else of.objective
        self.optimizer = build_optimizer(self.objective, setting.optim) if of is None else of.optimizer
        self.calls: list[int] = [] if of is None else of.calls
        method: Any = self.objective.method
        self.taught = hasattr(method, "teacher")
        if of is None and self.taught:
            method.teacher.encoder.transformer.register_forward_hook(lambda _, given, out: self.calls.append(len(given[0])))
        tensors, keys = _batch(setting, method, samples, copies)
        self.batch = {name: tensor.to(where.device) for name, tensor in tensors.items()}, keys

    def compile(self) -> None:
        """As `train.compile`, if that is wanted."""
        method: Any = self.objective.method
        teachers = [part.encoder for part in method.parts() if isinstance(part, Teacher)]
        for block in (b for e in (method.student.encoder, *teachers) for b in e.compilable() if self.where.compiled):
            block.compile()

    def loss(self) -> torch.Tensor:
        """Of the batch."""
        with torch.autocast(self.where.device, torch.bfloat16, enabled=self.where.precision == "bf16"):
            return self.objective(*self.batch, Clock(0, 100))["total"]

    def step(self) -> None:
        """Forward, backward, optimizer, teacher."""
        self.calls.clear()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.method.after_step(Clock(1, 100))
        assert self.calls == [self.samples] * self.taught, "the teacher must run once per sample, whatever the number of masks"


def _batch(setting: Recipe, method: Any, samples: int, copies: int) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    features, m = method.student.encoder.features, setting.views.mask  # type: ignore[attr-defined]
    draw = generator("bench")
    x = torch.randn(samples, features.channels, features.image_size, features.image_size, generator=draw)
    if m.kind == "block" and method.drops:
        hidden = blocks(features.grid, samples * copies, m.ratio, m.width, m.adjust, draw, m.inverse)
    else:
        hidden = uniform(features.length, samples * copies, m.ratio, draw)
    mask = Mask.of(hidden) if method.drops else Mask.replacing(hidden)
    batch = Batch([View(x, "vision", mask=mask)], torch.arange(samples))
    return batch.tensors(), tuple(range(samples))


def _tokens(setting: Recipe, copies: int) -> int:
    """Tokens of a step and sample in the trunk, a backward pass counted as two forward passes."""
    length = (setting.model.image_size // setting.model.patch_size) ** 2  # type: ignore[attr-defined]
    kept = math.floor(length * (1 - setting.views.mask.ratio))  # type: ignore[attr-defined]
    return length + 1 + 3 * copies * (kept + 1)
