"""What a step costs against tokens, width, depth, batch, masks and ranks, one at a time."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmssl.config import Recipe
from mmssl.masks import blocks
from mmssl.random import generator
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer
from mmssl.training.plan import counting_activations, counting_flops
from mmssl.types import Batch, Clock, Mask, View

USUAL = {"image": 160, "width": 384, "depth": 6, "batch": 4, "masks": 4}
VARIED = {
    "tokens": [{"image": size} for size in (96, 160, 224, 320)],
    "width": [{"width": width} for width in (192, 384, 768)],
    "depth": [{"depth": depth} for depth in (3, 6, 12)],
    "batch": [{"batch": batch} for batch in (2, 4, 8)],
    "masks": [{"masks": masks} for masks in (1, 2, 4, 8, 16)],
}
PORT = "29547"


class Step:
    """data2vec 2.0 of some shape, its optimizer, and a batch."""

    def __init__(self, recipe: str, image: int, width: int, depth: int, batch: int, masks: int, ranks: int = 1):
        shape = {
            "image_size": image,
            "patch_size": 16,
            "hidden_size": width,
            "heads": width // 64,
            "depth": depth,
            "prenet_depth": 0,
        }
        words = [f"model.{name}={value}" for name, value in shape.items()]
        words += [f"method.top_k={depth}", f"method.decoder.dim={width}", f"views.mask.copies={masks}"]
        setting: Any = Recipe.load(recipe, *words)
        torch.manual_seed(0)
        self.objective: Any = Objective(setting.build())
        self.net: nn.Module = DistributedDataParallel(self.objective) if ranks > 1 else self.objective
        self.optimizer = build_optimizer(self.objective, setting.optim)
        features, mask = self.objective.method.student.encoder.features, setting.views.mask
        draw = generator("bench")
        hidden = blocks(features.grid, batch * masks, mask.ratio, mask.width, mask.adjust, draw, mask.inverse)
        view = View(torch.randn(batch, 3, image, image, generator=draw), "vision", mask=Mask.of(hidden))
        self.batch = Batch([view], torch.arange(batch)).tensors(), tuple(range(batch))
        self.tokens, self.masks = features.length, batch * masks

    def __call__(self) -> None:
        """Forward, backward, optimizer, teacher."""
        self.net(*self.batch, Clock(0, 100))["total"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.method.after_step(Clock(1, 100))

    def seconds(self, times: int) -> float:
        """Median, after one that is not counted."""
        self()
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            self()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def counted(self) -> tuple[int, int]:
        """Products of a step, and bytes that wait for its backward pass."""
        with counting_flops() as flops:
            self()
        with counting_activations(self.objective) as bytes_:
            self.net(*self.batch, Clock(0, 100))
        return flops(), bytes_()


def run(recipe: str = "vision/data2vec2-small", times: str = "3", ranks: str = "2", only: str = "") -> dict[str, Any]:
    """Whole steps in fp32 on the CPU, of data2vec 2.0 with convolutional decoder, everything else at its usual value.

    Args:
        times: steps of each shape, of which the median counts.  ranks: processes of one thread each, with a batch each.
        only: some of tokens, width, depth, batch, masks, ranks, by commas; all if empty.
    Returns: for each: seconds, GFLOP, MiB that wait for the backward pass; and the exponents of the three, from the first shape
        to the last. For ranks the seconds of one process and of several, each with a batch of its own.
    """
    wanted = only.split(",") if only else [*VARIED, "ranks"]
    found: dict[str, Any] = {"name": f"a step of {recipe}, fp32, usually {USUAL}", "threads": torch.get_num_threads()}
    for name in wanted:
        if name != "ranks":
            found |= _curve(name, recipe, int(times))
    if "ranks" in wanted:
        found |= _several(recipe, int(times), int(ranks))
    return found | {"peer": "the same step of another shape", "peer_version": torch.__version__}


def _curve(name: str, recipe: str, times: int) -> dict[str, Any]:
    rows, sizes = [], []
    for changed in VARIED[name]:
        step = Step(recipe, **USUAL | changed)
        flops, bytes_ = step.counted()
        size = step.tokens if name == "tokens" else next(iter(changed.values()))
        sizes.append(size)
        rows.append((size, *(float(f"{value:.4g}") for value in (step.seconds(times), flops / 1e9, bytes_ / 2**20))))
    whole = math.log(sizes[-1] / sizes[0])
    exponents = [round(math.log(rows[-1][i] / rows[0][i]) / whole, 2) for i in (1, 2, 3)]
    return {**{f"{name} {size}": row for size, *row in rows}, f"{name}, exponents": exponents}


def _several(recipe: str, times: int, ranks: int) -> dict[str, Any]:
    context = torch.multiprocessing.get_context("spawn")
    alone, together = context.SimpleQueue(), context.SimpleQueue()
    for count, answers in ((1, alone), (ranks, together)):
        torch.multiprocessing.spawn(_rank, (count, recipe, times, answers), nprocs=count)
    one, several = alone.get(), max(together.get() for _ in range(ranks))
    return {
        f"1 process, {ranks} processes": (round(one, 3), round(several, 3), f"{ranks * one / several:.2f} of the speed of one")
    }


def _rank(rank: int, count: int, recipe: str, times: int, answers: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{PORT}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    answers.put(Step(recipe, **USUAL, ranks=count).seconds(times))
    torch.distributed.destroy_process_group()
