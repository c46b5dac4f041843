"""Ways to do the same thing, measured by turns, so that what disturbs one disturbs the other."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Turns(NamedTuple):
    """Seconds of each way, one for each turn."""

    seconds: dict[str, list[float]]

    def figures(self) -> dict[str, Any]:
        """`time_ratio`, the first way : the second, median over turns, its spread, and the median seconds of both."""
        first, second = ([*self.seconds.values()][i] for i in (0, 1))
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        return {
            "time_ratio": round(statistics.median(ratios), 3),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            "seconds": {name: round(statistics.median(values), 4) for name, values in self.seconds.items()},
            "threads": torch.get_num_threads(),
        }


def by_turns(ways: Mapping[str, Callable[[], Any]], turns: int, warm: int = 1, before: Callable[[], Any] = gc.collect) -> Turns:
    """Run all ways `warm` times uncounted, then `turns` times; each other turn begins with the last one.

    Args:
        before: called before each, uncounted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm + turns):
        for name in [*ways][:: 1 if turn % 2 else -1]:
            before()
            start = _now()
            ways[name]()
            if turn >= warm:
                seconds[name].append(_now() - start)
    return Turns(seconds)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident() -> int:
    """Bytes that this program holds."""
    return _status("VmRSS")


def high_water() -> int:
    """Bytes that it has held at most, since `forget_peak`; the kernel's figure, where `getrusage` starts with its parent's."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Give back what is free, and begin the high-water marks anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
