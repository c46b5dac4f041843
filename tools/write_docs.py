"""Write docs/recipes.md and docs/recipe.schema.json from the code.

python tools/write_docs.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from mmssl.config import recipe_class, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
INTRO = """# Recipes

A recipe is one YAML file of seven blocks. Every key can be set on the command line as `key.sub=value`, the value in YAML;
`1e-3` is a number. `data=X` means `data.path=X`, `method=X` means `method.name=X`, `model=X` means `model.init=X`. Unknown
keys and wrong types are refused, all at once. `mmssl copy NAME FILE` gives you a shipped recipe to edit;
[recipe.schema.json](recipe.schema.json) serves editors that know JSON Schema. The blocks `model`, `method` and `views` depend
on modality and method; below are those of data2vec 2 on images. A relative `data.path` is stored as it is: resume a run
from the folder where it was started.

Shipped: {names}.

Processes: `recipes/accelerate/cpu2-ddp.yaml` and `cpu2-zero3.yaml` are launch profiles for two processes without a GPU;
`accelerate launch --config_file PROFILE recipes/pretrain.py RECIPE`. ZeRO on CPU compiles a small extension and needs a C++
compiler.
"""


def rows(model: Any, prefix: str) -> list[str]:
    """One Markdown row for each option of a block."""
    lines = []
    for name, field in model.model_fields.items():
        default = field.default
        if default is PydanticUndefined:
            default = "empty" if field.default_factory else "required"
        elif default is None:
            default = "unset"
        kind = str(field.annotation)
        if get_origin(field.annotation) is Literal:
            kind = " | ".join(get_args(field.annotation))
        elif isinstance(field.annotation, type) and not get_args(field.annotation):
            kind = field.annotation.__name__
        kind = re.sub(r"Annotated\[(\w+), FieldInfo\(.*?\]\)\]", r"\1", kind)
        for noise in ("typing.", "mmssl.schedules.", "mmssl.model.decoder.", "modalities.vision.views.", "NoneType"):
            kind = kind.replace(noise, "")
        cells = (f"`{prefix}{name}`", f"`{kind}`".replace("|", "\\|"), f"`{default}`", field.description or "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def documents() -> dict[Path, str]:
    """File -> what it should hold."""
    recipe = recipe_class("data2vec2", "vision")
    text = INTRO.format(names=", ".join(f"`{name}`" for name in shipped_recipes()))
    for block, field in recipe.model_fields.items():
        model: Any = field.annotation
        if not hasattr(model, "model_fields"):
            continue
        text += f"\n## {block}\n\n"
        if model.__doc__ and block not in ("model", "method", "views"):
            text += f"{model.__doc__.splitlines()[0]}\n\n"
        text += "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows(model, f"{block}.")) + "\n"
    schema = json.dumps(recipe.model_json_schema(), indent=1) + "\n"
    return {ROOT / "docs" / "recipes.md": text, ROOT / "docs" / "recipe.schema.json": schema}


if __name__ == "__main__":
    for path, content in documents().items():
        path.write_text(content, encoding="utf-8")
