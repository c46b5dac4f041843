"""What a loss over a whole batch costs as the batch, or its vectors, grow: seconds and memory at sizes four times as large."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl import losses
from mmssl.random import generator
from tools.bench.turns import forget_peak, high_water, resident

QUEUE, PROTOTYPES = 65_536, 3_000


class Case(NamedTuple):
    """A loss, and the rows and dimensions at which it is measured."""

    loss: Callable[[list[Tensor]], Tensor]  # of tensors (N, D), the same samples in each row
    sizes: tuple[tuple[int, int], ...]  # N, D
    tensors: int = 2
    more: tuple[int, ...] = ()  # rows of a last tensor that has no gradient
    gradient: bool = True


def _variance(z: list[Tensor]) -> Tensor:
    found = losses.vicreg(z[0], z[1])
    return 25 * found.invariance + 25 * found.variance + found.covariance


ROWS, WIDTHS = ((256, 8192), (1024, 8192), (4096, 8192)), ((1024, 512), (1024, 2048), (1024, 8192))
CASES = {
    "nt_xent": Case(
        lambda z: losses.nt_xent(z[0], z[1], 0.5), ((512, 256), (2048, 256), (8192, 256))
    ),  # as many again in view two
    "info_nce": Case(lambda z: losses.info_nce(z[0], z[1], z[2], 0.2), ((1024, 256), (4096, 256), (16384, 256)), more=(QUEUE,)),
    "vicreg": Case(_variance, ROWS),
    "vicreg, wider": Case(_variance, WIDTHS),
    "barlow_twins": Case(lambda z: losses.barlow_twins(z[0], z[1]), ROWS),
    "barlow_twins, wider": Case(lambda z: losses.barlow_twins(z[0], z[1]), WIDTHS),
    "sinkhorn": Case(lambda s: losses.sinkhorn(s[0]), tuple((n, PROTOTYPES) for n in (4096, 16384, 65536)), 1, gradient=False),
}


def run(only: str = "", times: str = "3", device: str = "cpu") -> dict[str, Any]:
    """Value and gradient in fp32, in a fresh process for each size.

    Args:
        only: some of nt_xent, info_nce, vicreg, barlow_twins, sinkhorn, by commas, each with a colon and the largest N if it
            has one; all if empty.  times: of which the median counts.
    Returns: for each loss and size (N of a view, D): seconds, and MiB at the peak beyond its tensors; and the exponents of
        both over the last step. NT-Xent compares N rows of each view with all 2 N; InfoNCE has a queue of 65 536; Sinkhorn
        assigns to 3 000 prototypes, three iterations, without a gradient.
    """
    wanted = {name: int(most or 0) for name, _, most in (word.partition(":") for word in only.split(",") if word)}
    found: dict[str, Any] = {"name": f"losses as their batch grows, fp32, {device}", "threads": torch.get_num_threads()}
    for name, case in CASES.items():
        most = wanted.get(name.partition(",")[0], None if wanted else 0)
        sizes = [size for size in case.sizes if most is not None and size[0] <= (most or math.inf)]
        rows = []
        for n, d in sizes:
            seconds, bytes_ = _fresh(name, n, d, int(times), device)
            rows.append((float(f"{seconds:.3g}"), round(bytes_ / 2**20, 1)))
            found[f"{name}, {n} x {d}"] = rows[-1]
        if len(rows) > 1:
            (n1, d1), (n2, d2) = sizes[-2:]
            grown = math.log(n2 * d2 / (n1 * d1))
            found[f"{name}, exponents"] = [round(math.log(b / a) / grown, 2) if a > 0 else None for a, b in zip(*rows[-2:])]
    return found | {"peer": "the same loss of another size", "peer_version": torch.__version__}


def _fresh(*words: Any) -> tuple[float, int]:
    """Seconds, and bytes beyond the tensors."""
    done = subprocess.run([sys.executable, "-m", __name__, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(name: str, n: str, d: str, times: str, device: str) -> tuple[float, int]:
    case = CASES[name]
    _once(case, _tensors(case, 64, int(d), device))  # what libraries take once
    tensors = _tensors(case, int(n), int(d), device)
    forget_peak()
    before = resident() if device == "cpu" else torch.cuda.memory_allocated()
    taken = []
    for _ in range(int(times)):
        start = time.perf_counter()
        _once(case, tensors)
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    most = high_water() if device == "cpu" else torch.cuda.max_memory_allocated()
    return statistics.median(taken), most - before


def _tensors(case: Case, n: int, d: int, device: str) -> list[Tensor]:
    rows = (*((n,) * case.tensors), *case.more)
    return [torch.randn(count, d, generator=generator("bench", i)).to(device) for i, count in enumerate(rows)]


def _once(case: Case, tensors: list[Tensor]) -> None:
    if case.gradient:
        leaves = [z.detach().requires_grad_(i < case.tensors) for i, z in enumerate(tensors)]
        case.loss(leaves).backward()
    else:
        case.loss(tensors)


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
