"""NT-Xent in blocks against the usual one, which holds the matrix of all views with all views."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.losses import nt_xent
from mmssl.random import generator
from tools.bench.turns import by_turns, high_water


def plain(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """The whole matrix, and the cross entropy of its rows."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"blocks": nt_xent, "plain": plain}


def run(samples: str = "16384", dim: str = "128", pairs: str = "3", device: str = "cpu") -> dict[str, Any]:
    """Value and gradient in fp32, by turns; memory beyond the inputs at its peak, on the CPU in a process for each.

    Returns: `time_ratio` (blocks : plain, median over pairs), its spread, `memory_ratio`, and the largest difference of
        gradients over the largest gradient.
    """
    z1, z2 = (torch.randn(int(samples), int(dim), generator=generator("bench", view)).to(device) for view in range(2))
    gradients: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        gradients[name] = _gradient(name, z1, z2)

    turns = by_turns({name: lambda name=name: keep(name) for name in LOSSES}, int(pairs))
    bytes_ = {name: _peak(name, samples, dim, device) for name in LOSSES}
    difference = (gradients["blocks"] - gradients["plain"]).abs().max() / gradients["plain"].abs().max()
    return {
        "name": f"NT-Xent in blocks : plain, N = {samples}, D = {dim}, {device}",
        **turns.figures(),
        "memory_ratio": round(bytes_["blocks"] / bytes_["plain"], 4),
        "mebibytes": {name: round(value / 2**20, 1) for name, value in bytes_.items()},
        "gradient_difference": float(difference),
        "peer": "the same loss from the whole matrix",
        "peer_version": torch.__version__,
    }


def _gradient(name: str, z1: Tensor, z2: Tensor) -> Tensor:
    leaf = z1.clone().requires_grad_()
    LOSSES[name](leaf, z2).backward()
    if z1.is_cuda:
        torch.cuda.synchronize()
    assert leaf.grad is not None
    return leaf.grad


def _peak(name: str, samples: str, dim: str, device: str) -> int:
    """Bytes beyond what stood before the loss."""
    words = [sys.executable, "-m", __name__, name, samples, dim, device]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def _measure(name: str, samples: str, dim: str, device: str) -> int:
    z1, z2 = (torch.randn(int(samples), int(dim), generator=generator("bench", view)).to(device) for view in range(2))
    _gradient(name, z1[:8], z2[:8])  # what libraries take once
    if device == "cpu":
        before = high_water()
        _gradient(name, z1, z2)
        return high_water() - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _gradient(name, z1, z2)
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
