"""How long a save stops training: `save_run` without the export, against torch.save and fsync of the same bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.config import Recipe
from mmssl.training import checkpoint
from mmssl.training.guards import broken
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer, schedule
from mmssl.training.state import model_state, optimizer_state
from tools.bench.turns import by_turns


def run(recipe: str = "vision/data2vec2-base", folder: str | None = None, pairs: str = "5") -> dict[str, Any]:
    """Save a model with its moments by turns in both ways, each into an empty folder.

    Args:
        folder: on the disk to measure; the system's temporary one if unset.
    Returns: `time_ratio` (a checkpoint, collected, checked, hashed and synced : torch.save and fsync of the same tensors,
        median over pairs), its spread, seconds of both, bytes.
    """
    setting = Recipe.load(recipe)
    objective = Objective(setting.build())
    optimizer = build_optimizer(objective, setting.optim, schedule(setting.optim, setting.train.global_batch, 1.0))
    for parameter in objective.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sizes = []

    def write(way: Callable[[Path, dict[str, dict[str, Tensor]]], None]) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            way(Path(place), collect(objective, optimizer))
            sizes.append(sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file()))

    ways = {"checkpoint": lambda: write(save), "torch.save": lambda: write(plain)}
    turns = by_turns(ways, int(pairs), before=os.sync)  # or one would wait for what the other left
    return {
        "name": f"a checkpoint : torch.save and fsync of the same bytes, {recipe}",
        **turns.figures(),
        "bytes": sizes[-1],
        "peer": "torch.save",
        "peer_version": torch.__version__,
    }


def collect(objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds."""
    return {"model": model_state(objective), "optimizer": optimizer_state(objective, optimizer)}


def save(place: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """As a run does it."""
    for part in tensors.values():
        if name := broken(part):
            raise ValueError(f"{name} is not finite")
    checkpoint.save(place / "checkpoints", 1, tensors, {"step": 1}, keep=1)


def plain(place: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """As one would do it in a line."""
    with (place / "checkpoint.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
