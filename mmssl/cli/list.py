"""what there is to choose from: mmssl list methods|models|recipes|modalities

methods     the papers, with the kinds of data they take and their recipes
models      encoder sizes, those of the shipped recipes
recipes     the shipped recipes, those of `mmssl finetune` last; `mmssl copy` gives you one to edit
modalities  the kinds of data

With json=true, or --json, an array of objects.
"""

from __future__ import annotations

import json
from typing import Any

from mmssl.cli.options import nearest, parse
from mmssl.errors import RecipeError

OPTIONS = {"json": (bool, False, "print JSON")}


def run(arguments: list[str]) -> int:
    """`mmssl list WHAT`."""
    given = parse(arguments, ("WHAT",), OPTIONS)
    tables = {"methods": methods, "models": models, "recipes": all_recipes, "modalities": modalities}
    if given["what"] not in tables:
        raise RecipeError(f"list: found {given['what']!r}{nearest(given['what'], tables)}, expected {', '.join(tables)}.")
    rows = tables[given["what"]]()
    if given["json"]:
        print("[" + ",\n ".join(json.dumps(row) for row in rows) + "]")
    else:
        for row in rows:
            name, *rest = (_text(value) for value in row.values())
            print(f"{name:28}  {'  '.join(text for text in rest if text)}".rstrip())
    return 0


def methods() -> list[dict[str, Any]]:
    """One object a method; `coverage` are numbers of docs/coverage.md."""
    from mmssl.methods import METHODS

    used = [(recipe["method"], recipe["name"]) for recipe in recipes()]
    return [
        {
            "name": name,
            "modalities": [*method.modalities],
            "family": method.family,
            "paper": method.paper,
            "recipes": [recipe for other, recipe in used if name in other.split("+")],
            "coverage": [*method.coverage],
        }
        for name, method in METHODS.items()
    ]


def all_recipes() -> list[dict[str, Any]]:
    """One object a shipped recipe, of pretraining and then of fine-tuning, which has a `task` instead of a method."""
    from mmssl.config import find_recipe, read_yaml, shipped_recipes

    names = [name for name in shipped_recipes(finetune=True) if name not in shipped_recipes()]
    return recipes() + [{"name": name, "task": read_yaml(find_recipe(name))["task"]} for name in names]


def recipes() -> list[dict[str, Any]]:
    """One object a shipped recipe of pretraining."""
    from mmssl.config import find_recipe, read_yaml, shipped_recipes

    rows = []
    for name in shipped_recipes():
        raw = read_yaml(find_recipe(name))
        length = {key: value for key, value in raw.get("train", {}).items() if key in ("steps", "epochs")}
        several = raw.get("modalities")
        kind = "+".join(several) if several else raw["data"]["modality"]
        own = [one.get("method", {}).get("name") for one in (several or {}).values()]
        methods = dict.fromkeys(one or raw["method"]["name"] for one in own or [None])
        rows.append({"name": name, "modality": kind, "method": "+".join(methods), **length})
    return rows


def models() -> list[dict[str, Any]]:
    """One object for each encoder that a shipped recipe trains."""
    from mmssl.config import find_recipe, read_yaml

    rows: list[dict[str, Any]] = []
    for recipe in recipes():
        size = read_yaml(find_recipe(recipe["name"])).get("model", {})
        same = [row for row in rows if (row["modality"], row["model"]) == (recipe["modality"], size)]
        if same:
            same[0]["recipes"].append(recipe["name"])
        else:
            rows.append({"modality": recipe["modality"], "model": size, "recipes": [recipe["name"]]})
    return rows


def modalities() -> list[dict[str, Any]]:
    """One object for each installed kind of data."""
    from mmssl import registry

    found = [registry.modality(name) for name in registry.modalities()]
    return [{"name": kind.name, "columns": [*kind.columns], "suffixes": [*kind.suffixes]} for kind in found]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    return ", ".join(str(inner) for inner in value) if isinstance(value, (list, tuple)) else str(value)
