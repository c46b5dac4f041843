"""Self-supervised pretraining of encoders for images, speech and text."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmssl.model.register import when_transformers_loads

if TYPE_CHECKING:
    from mmssl.config import Recipe
    from mmssl.evaluate.embedding import embed
    from mmssl.evaluate.probe import probe
    from mmssl.hub.export import load_encoder
    from mmssl.methods import Method
    from mmssl.model.configuration import MmsslConfig
    from mmssl.model.modeling import MmsslModel
    from mmssl.training.export import export

__version__ = "0.15.1"

# Large tensors of the CPU in huge pages, where the system has them: torch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    "Recipe": "mmssl.config",
    "Method": "mmssl.methods",
    "MmsslConfig": "mmssl.model.configuration",
    "MmsslModel": "mmssl.model.modeling",
    "load_encoder": "mmssl.hub.export",
    "export": "mmssl.training.export",
    "probe": "mmssl.evaluate.probe",
    "embed": "mmssl.evaluate.embedding",
}

__all__ = ["Method", "MmsslConfig", "MmsslModel", "Recipe", "embed", "export", "load_encoder", "pretrain", "probe"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmssl' has no attribute {name!r}")


def pretrain(recipe: Any, **overrides: Any):
    """Train an encoder.

    Args:
        recipe: a YAML file, the name of a shipped recipe, or a `Recipe` (of several kinds of data, what `load_recipe` gives).
        overrides: recipe keys with `__` for the dot (`optim__lr=1e-3`), and `overwrite=True` or `resume=True`.
    Returns: the run folder (a Path); `model/` in it is the encoder.
    """
    from mmssl.config import load_recipe
    from mmssl.config.recipe import Settings
    from mmssl.training.pretrain import pretrain as run

    how = {name: overrides.pop(name) for name in ("overwrite", "resume") if name in overrides}
    if isinstance(recipe, Settings) and overrides:
        raise TypeError(f"overrides belong to Recipe.load, this recipe is checked already: {', '.join(overrides)}")
    return run(recipe if isinstance(recipe, Settings) else load_recipe(recipe, **overrides), **how)


when_transformers_loads()
