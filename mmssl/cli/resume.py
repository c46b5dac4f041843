"""continue a run from its newest complete checkpoint

mmssl resume RUN goes on as if nothing had happened: same data, same augmentations, same losses. A checkpoint that does not
match its manifest is left out, and said so.
"""

from __future__ import annotations

from mmssl.cli.options import parse


def run(arguments: list[str]) -> int:
    """`mmssl resume RUN`."""
    given = parse(arguments, ("RUN",))
    from mmssl.config import Recipe, read_yaml
    from mmssl.errors import RecipeError
    from mmssl.training.run_folder import RunFolder

    folder = RunFolder.open(given["run"])
    if not folder.config.exists():
        raise RecipeError(
            f"{folder.path}: this run ended before it began. Start it again with mmssl pretrain, and overwrite=true."
        )
    recipe = Recipe.check({**read_yaml(folder.config), "out": str(given["run"])}, str(folder.config))
    from mmssl.training.outcome import finish
    from mmssl.training.pretrain import pretrain

    return finish(pretrain(recipe, resume=True))
