"""Where in a model the classes are easiest to tell: a probe of each block, and of the projector that training left behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.config import load_recipe
from mmssl.config.recipe import Recipe
from mmssl.evaluate.knn import knn_accuracy
from mmssl.evaluate.linear import linear_accuracy
from mmssl.evaluate.protocols import Rows
from mmssl.hub.export import recommended
from mmssl.parts import Network

PROJECTOR = "projector"
LAYER = "layer."  # before its number or name, among the rows of an embedded set


def layer_scores(bank: Rows, test: Rows, neighbours: int) -> dict[str, dict[str, float]]:
    """Number of the block, 1 first, or layer of the projector -> `knn` and `linear`, 0..1. `all`: the blocks side by side."""
    names = [name for name in bank if name.startswith(LAYER)]
    blocks = [name for name in names if name.removeprefix(LAYER).isdigit()]

    def scores(these: list[str]) -> dict[str, float]:
        own, other = (torch.cat([rows[name] for name in these], 1) for rows in (bank, test))
        four = own, bank["label"], other, test["label"]
        return {"knn": knn_accuracy(*four, neighbours), "linear": linear_accuracy(*four)}

    found = {name.removeprefix(LAYER): scores([name]) for name in names}
    return found | ({"all": scores(blocks)} if len(blocks) > 1 else {})


def projector_of(place: str | Path) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """What the run that a model belongs to put after its encoder, from embeddings (B, D); None if there is none.

    It gives `projector.1` and so on, what enters each linear layer but the first, and `projector`, what leaves the last one.

    Args:
        place: `model` in the folder of a run of one kind of data.
    """
    run = Path(place).resolve().parent
    if not all((run / name).is_file() for name in ("config.yaml", "heads/heads.safetensors")):
        return None
    recipe = load_recipe(run / "config.yaml")
    if not isinstance(recipe, Recipe):
        return None
    network, saved = recipe.build().student, load_file(run / "heads" / "heads.safetensors")
    stem = {"student": "student.", "teacher": "teacher.network."}[recommended(recipe)]
    for name in network.heads:
        own = {n.removeprefix(f"{stem}{name}."): tensor for n, tensor in saved.items() if n.startswith(f"{stem}{name}.")}
        getattr(network, name).load_state_dict(own)
    return partial(_stages, network.eval()) if network.heads else None


@torch.no_grad()
def _stages(network: Network, h: Tensor) -> dict[str, Tensor]:
    """The layers of the heads, from embeddings (B, D)."""
    entered: list[Tensor] = []
    linear = [m for name in network.heads for m in getattr(network, name).modules() if isinstance(m, nn.Linear)]
    handles = [one.register_forward_pre_hook(lambda module, given: entered.append(given[0])) for one in linear]
    try:
        last = network.project(h)
    finally:
        for handle in handles:
            handle.remove()
    return {f"{PROJECTOR}.{i}": x for i, x in enumerate(entered[1:], 1)} | {PROJECTOR: last}
