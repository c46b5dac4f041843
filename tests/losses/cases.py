"""Reference numbers of tests/vectors, and what several tests of losses need."""

import json
from pathlib import Path

import torch

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "joint-embedding.json").read_text())["cases"]
MASKED = json.loads((VECTORS / "masked-prediction.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def inputs(case, *names):
    """Float64 leaves."""
    return [tensor(CASES[case]["inputs"][name]).requires_grad_() for name in names]


def expected(case):
    return CASES[case]["expected"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)
