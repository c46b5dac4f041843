"""copy a shipped recipe to a file of your own: mmssl copy RECIPE FILE

RECIPE is a name that `mmssl list recipes` shows, FILE a path or an existing folder.
"""

from __future__ import annotations

from pathlib import Path

from mmssl.cli.options import parse
from mmssl.errors import RecipeError
from mmssl.training.run_folder import storing, write_atomic

OPTIONS = {"overwrite": (bool, False, "replace FILE if it exists")}


def run(arguments: list[str]) -> int:
    """`mmssl copy RECIPE FILE`."""
    given = parse(arguments, ("RECIPE", "FILE"), OPTIONS)
    from mmssl.config import find_recipe

    source, target = find_recipe(given["recipe"]), Path(given["file"])
    if target.is_dir():
        target /= source.name
    if target.exists() and not given["overwrite"]:
        raise RecipeError(f"{target} exists. Choose another file, or add overwrite=true.")
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, source.read_text(encoding="utf-8"))
    verb = "finetune" if source.parent.name == "finetune" else "pretrain"
    print(f"wrote {target}; train with: mmssl {verb} {target}")
    return 0
