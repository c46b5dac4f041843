"""dry run: recipe, data, three steps, memory, throughput, time

mmssl check RECIPE [key=value ...] trains four updates in a temporary folder, times the last three
and says what the whole run would need.
"""

from __future__ import annotations

import json

from mmssl.cli.options import parse

OPTIONS = {"json": (bool, False, "print JSON")}


def run(arguments: list[str]) -> int:
    """`mmssl check RECIPE`."""
    given = parse(arguments, ("[RECIPE]",), OPTIONS, overrides=True)
    from mmssl.config import load_recipe

    recipe = load_recipe(given["recipe"], *given["overrides"])
    from mmssl.training.check import check

    facts = check(recipe)
    if given["json"]:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts)) + 2
        print("\n".join(f"{name.replace('_', ' '):{width}}{value}" for name, value in facts.items()))
    return 0
