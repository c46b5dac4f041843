"""What a device can do at best, and how often a step makes the host wait for it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak(device: str, precision: str, side: int = 0) -> float:
    """FLOP a second in a product of square matrices, the best of ten.

    Args:
        side: of a matrix; 2 048 on a processor and 8 192 elsewhere if 0.
    """
    side = side or (2048 if device == "cpu" else 8192)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(11):  # the first one warms up, and is the slowest
        start = time.perf_counter()
        torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def waits(work: Callable[[], object]) -> int:
    """How often it makes the host wait for the CUDA device, by torch's own count; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(one.message) for one in heard)
