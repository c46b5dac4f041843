"""continue a run from its newest complete checkpoint

mmssl resume RUN [key=value ...] goes on as if nothing had happened: same data, same augmentations, same losses. A checkpoint
that does not match its manifest is left out, and said so. Keys of the recipe can be given a new value, such as
train.steps=20000; what would make it another run (model, method, data, seed, global batch) only with allow_changed=KEY,KEY.
"""

from __future__ import annotations

from mmssl.cli.options import parse

OPTIONS = {"allow_changed": (str, "", "keys or blocks of the recipe that may differ from the saved ones")}


def run(arguments: list[str]) -> int:
    """`mmssl resume RUN`."""
    given = parse(arguments, ("RUN",), OPTIONS, overrides=True)
    from mmssl.config import check_recipe, read_yaml
    from mmssl.config.reading import apply_override
    from mmssl.errors import RecipeError
    from mmssl.training.run_folder import RunFolder

    folder = RunFolder.open(given["run"])
    if not folder.config.exists():
        raise RecipeError(f"{folder.path}: this run ended before it began. Start it again with mmssl pretrain.")
    raw = read_yaml(folder.config)
    for text in given["overrides"]:
        apply_override(raw, text)
    if "task" in raw:  # of mmssl finetune
        from mmssl.cli.finetune import go_on

        return go_on({**raw, "out": str(given["run"])}, str(folder.config))
    recipe = check_recipe({**raw, "out": str(given["run"])}, str(folder.config))
    from mmssl.training.outcome import finish
    from mmssl.training.pretrain import pretrain

    allowed = [key for key in given["allow_changed"].split(",") if key]
    return finish(pretrain(recipe, resume=True, allow_changed=allowed))
