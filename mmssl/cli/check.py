"""dry run: recipe, data, a few steps, memory, time; a plan for larger machines

mmssl check RECIPE [key=value ...] trains five updates in a temporary folder, times the last three
and says what the whole run would need. With --plan also what it would take on 1 to 512 devices,
by DDP and each stage of ZeRO: memory of a device, time of an update, bytes sent. Fewer samples
serve for that: mmssl check RECIPE train.global_batch=2 --plan batch=4096
With --largest also the largest train.micro_batch that this device has memory for.
"""

from __future__ import annotations

import json

from mmssl.cli.options import parse
from mmssl.errors import RecipeError

OPTIONS = {
    "json": (bool, False, "print JSON"),
    "largest": (bool, False, "how many samples fit the device at once; tried out on a GPU, computed elsewhere"),
    "plan": (bool, False, "memory and time on larger machines"),
    "batch": (int, 0, "of the plan: samples of an update; train.global_batch if 0"),
    "micro": (int, 0, "of the plan: samples on a device at once; all of its share if 0"),
    "peak": (float, 788.0, "of the plan: TFLOP/s of a device; that of an H200 in bf16, measured"),
    "use": (float, 0.4, "of the plan: share of it that a whole update reaches"),
    "link": (float, 400.0, "of the plan: GB/s between up to 8 devices of a node"),
    "network": (float, 50.0, "of the plan: GB/s of a device to other nodes"),
}


def run(arguments: list[str]) -> int:
    """`mmssl check RECIPE`."""
    given = parse(arguments, ("[RECIPE]",), OPTIONS, overrides=True)
    from mmssl.config import load_recipe

    recipe = load_recipe(given["recipe"], *given["overrides"])
    from mmssl.training.check import check, cost, largest
    from mmssl.training.plan import Machine, plan, table

    for name in ("peak", "use", "link", "network"):
        if not given[name] > 0:
            raise RecipeError(f"{name}: {given[name]}, must be above 0")
    if min(given["batch"], given["micro"]) < 0 or given["use"] > 1:
        raise RecipeError("batch, micro: at least 0; use: at most 1")
    facts, rows = check(recipe), []
    if given["largest"]:
        facts["largest_micro_batch"] = largest(recipe, facts)
    if given["plan"]:
        machine = Machine(given["peak"] * 1e12, given["use"], given["link"] * 1e9, given["network"] * 1e9)
        batch = given["batch"] or recipe.train.global_batch
        rows = plan(cost(facts), batch, micro=given["micro"] or recipe.train.micro_batch, machine=machine)
    if given["json"]:
        print(json.dumps(facts | ({"plan": [row._asdict() for row in rows]} if rows else {})))
        return 0
    width = max(map(len, facts)) + 2
    print("\n".join(f"{name.replace('_', ' '):{width}}{value}" for name, value in facts.items()))
    if rows:
        print(f"\nOf {batch} samples an update; weights, gradients, moments and teachers in float32.\n")
        print(table(rows, facts["updates"]))
    return 0
