"""train an encoder: mmssl pretrain RECIPE [key=value ...]

RECIPE is a YAML file or the name of a shipped recipe (`mmssl list recipes`). Any key of it can be given as key.sub=value,
for example data.path=scans/ optim.lr=1e-3; data=X means data.path=X and method=X method.name=X. The run folder is `out`.
Without RECIPE, model.init=MODEL data=PATH goes on from a released or own encoder by the method that suits it.
The same words follow `accelerate launch recipes/pretrain.py` on several processes.
"""

from __future__ import annotations

from mmssl.cli.options import parse

OPTIONS = {"overwrite": (bool, False, "remove an earlier run in the same folder first")}


def run(arguments: list[str]) -> int:
    """`mmssl pretrain RECIPE`."""
    given = parse(arguments, ("[RECIPE]",), OPTIONS, overrides=True)
    from mmssl.config import load_recipe

    recipe = load_recipe(given["recipe"], *given["overrides"])
    from mmssl.training.outcome import finish
    from mmssl.training.pretrain import pretrain

    return finish(pretrain(recipe, overwrite=given["overwrite"]))
