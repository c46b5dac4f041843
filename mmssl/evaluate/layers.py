"""Where in a model the classes are easiest to tell: a probe of each block, and of the projector that training left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from mmssl.config import load_recipe
from mmssl.config.recipe import Recipe
from mmssl.evaluate.knn import knn_accuracy
from mmssl.evaluate.linear import linear_accuracy
from mmssl.evaluate.protocols import Rows
from mmssl.hub.export import recommended

LAYER = "layer."  # before its number or name, among the rows of an embedded set


def layer_scores(bank: Rows, test: Rows, neighbours: int) -> dict[str, dict[str, float]]:
    """Number of the block, 1 first, or `projector` -> `knn` and `linear`, 0..1."""
    found = {}
    for name in (name for name in bank if name.startswith(LAYER)):
        four = bank[name], bank["label"], test[name], test["label"]
        found[name.removeprefix(LAYER)] = {"knn": knn_accuracy(*four, neighbours), "linear": linear_accuracy(*four)}
    return found


def projector_of(place: str | Path) -> Callable[[Tensor], Tensor] | None:
    """What the run that a model belongs to put after its encoder, from embeddings (B, D); None if there is none.

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
    return network.eval().project if network.heads else None
