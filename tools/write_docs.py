"""Write docs/recipes.md and docs/recipe.schema.json from the code.

python tools/write_docs.py
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import create_model
from pydantic_core import PydanticUndefined

from mmssl.cli.list import recipes
from mmssl.config import FinetuneRecipe, options_of, recipe_class
from mmssl.config.joint import MemberOptions
from mmssl.config.pairs import BindOptions
from mmssl.config.recipe import BLOCKS
from mmssl.methods import METHODS
from mmssl.registry import modalities, modality

ROOT = Path(__file__).resolve().parent.parent
INTRO = """# Recipes

A recipe is one YAML file of seven blocks, and `modalities` in front of them where a run learns from several kinds of data, see
[below](#several-kinds-of-data). Every key can be set on the command line as `key.sub=value`, the value in YAML;
`1e-3` is a number. `data=X` means `data.path=X`, `method=X` means `method.name=X`, `model=X` means `model.init=X`. Unknown
keys and wrong types are refused, all at once. `mmssl copy NAME FILE` gives you a shipped recipe to edit;
[recipe.schema.json](recipe.schema.json), of data2vec 2 on images, serves editors that know JSON Schema. A relative `data.path`
is stored as it is: resume a run from the folder where it was started.

Processes: launch profiles lie in `recipes/accelerate/`, for two processes without a GPU (`cpu2-ddp`, `cpu2-zero1`,
`cpu2-zero2`, `cpu2-zero3`), for the GPUs of one machine (`gpu-ddp`, `gpu-zero2`, `gpu-zero3`; add `--num_processes N`) and of
several (`gpu-multinode`): `accelerate launch --config_file recipes/accelerate/PROFILE.yaml recipes/pretrain.py RECIPE`.
`slurm.sbatch` is a job that saves before its time is up, queues again and goes on. Each says in its first lines how it is
started. Those for GPUs have not been run on one yet.

## Shipped recipes

The name is `MODALITY/METHOD-SIZE`, with a METHOD for each where there are several, or `multimodal/METHOD-SIZE` for several
kinds of data in one run. base and large have the published settings, small is for one GPU, demo for two CPU cores; others are
named after a data set or a backbone.

"""
SEVERAL = """
## Several kinds of data

`modalities` names each kind of data that a run learns from, with blocks `data`, `model`, `method`, `views` and `watch` of
its own; what stands in these blocks beside it holds for all, unless a member says otherwise. The name is also its
`data.modality` if that is unset. The blocks of the transformer and its last norm are shared, so that `model.hidden_size`,
`depth`, `heads` and all else that they are made of must agree; features, positions, extra tokens, heads and decoders are
each member's own. Teachers of equal momentum share their trunk, too. Each update has samples of all members,
`train.global_batch` of them by their shares; the loss is the sum of theirs, times their weights.
`recipes/multimodal/data2vec2-demo.yaml` is an example.

"""
COMBINED = """
### method.name=NAME+NAME

Several methods on the same samples, see [methods.md](methods.md#several-methods-at-once). The block has a block for each of
them, `method.NAME`, with the options of that method and one more:

"""
PAIRS = """
`share_trunk: false` gives each member a transformer of its own, of any shape. The block `bind` holds together those whose
method is bind: rows of one table are pairs, see [multimodal.md](multimodal.md#pairs).

"""
HEAD = "| key | type | default | |\n|---|---|---|---|\n"


def shipped() -> str:
    """A row for each method, a column for each modality."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in recipes():
        modality, file = row["name"].split("/")
        size = file.removeprefix(f"{row['method'].replace('+', '-')}-")
        found.setdefault(row["method"], {}).setdefault(modality, []).append(size)
    order = [*modalities(), "multimodal"]
    columns = sorted({modality for sizes in found.values() for modality in sizes}, key=order.index)
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in sorted(found):
        cells = (", ".join(found[method].get(modality, [])) for modality in columns)
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def short(options: Any) -> str:
    """What is set in a dataclass otherwise than its own defaults."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if getattr(options, f.name) != f.default}
    return ", ".join(f"{name}: {value}" for name, value in given.items()).join("{}")


def rows(model: Any, prefix: str) -> list[str]:
    """One Markdown row for each option of a block."""
    lines = []
    for name, field in model.model_fields.items():
        default = field.default
        if default is PydanticUndefined:
            default = "empty" if field.default_factory else "required"
        elif default is None:
            default = "unset"
        elif dataclasses.is_dataclass(default):
            default = short(default)
        kind = str(field.annotation)
        if get_origin(field.annotation) is Literal:
            kind = " | ".join(get_args(field.annotation))
        elif isinstance(field.annotation, type) and not get_args(field.annotation):
            kind = field.annotation.__name__
        kind = re.sub(r"Annotated\[(\w+), FieldInfo\(.*?\]\)\]", r"\1", kind)
        for noise in ("typing.", "NoneType"):
            kind = kind.replace(noise, "")
        kind = re.sub(r"\b(?:mmssl|modalities)(?:\.\w+)+\.(\w+)", r"\1", kind)
        cells = (f"`{prefix}{name}`", f"`{kind}`".replace("|", "\\|"), f"`{default}`", field.description or "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def block_of(block: str, method: str, modality: str, wrapped: bool = False) -> Any:
    """The pydantic model of a block."""
    return recipe_class(method, modality, wrapped).model_fields[block].annotation


def member_of(method: str, name: str) -> Any:
    """The block of a method among several."""
    return block_of("method", method, "vision").model_fields[name].annotation


def by_modality(block: str) -> str:
    """What all modalities have in that block, and what each has of its own."""
    first = {kind: next(name for name, method in METHODS.items() if kind in method.modalities) for kind in modalities()}
    models = {kind: block_of(block, method, kind) for kind, method in first.items()}
    tables = {kind: rows(model, f"{block}.") for kind, model in models.items()}
    shared = [row for row in next(iter(tables.values())) if all(row in table for table in tables.values())]
    text = HEAD + "\n".join(shared) + "\n" if shared else ""
    for kind, table in tables.items():
        text += f"\n### {block}, {kind}\n\n{HEAD}" + "\n".join(row for row in table if row not in shared) + "\n"
    return text


def finetuning() -> str:
    """Keys of recipes for fine-tuning, and the views of each kind of data."""
    text = "\n## Fine-tuning\n\nRecipes of `mmssl finetune`, see [finetuning.md](finetuning.md).\n\n"
    blocks = {name: field.annotation for name, field in FinetuneRecipe.model_fields.items()}
    tables = [rows(model, f"{name}.") for name, model in blocks.items() if hasattr(model, "model_fields")]
    tables.insert(0, [row for row in rows(FinetuneRecipe, "") if row.startswith("| `task`")])
    text += HEAD + "\n".join(row for table in tables for row in table) + "\n"
    for kind, name in {modality(kind).tune: kind for kind in modalities()}.items():
        options: Any = options_of(importlib.import_module(str(kind)).Inputs, "path")
        views: Any = create_model("Views", **options)
        text += f"\n### views, fine-tuning on {name}\n\n{HEAD}" + "\n".join(rows(views, "views.")) + "\n"
    return text


def documents() -> dict[Path, str]:
    """File -> what it should hold."""
    recipe = recipe_class("data2vec2", "vision")
    text = INTRO + shipped()
    for block in (block for block in BLOCKS if block in recipe.model_fields):
        model: Any = recipe.model_fields[block].annotation
        if not hasattr(model, "model_fields"):
            continue
        text += f"\n## {block}\n\n"
        if block in ("model", "views"):
            text += by_modality(block)
        elif block == "method":
            text += "`method.name` chooses; the other options are those of the method.\n"
            for name, method in METHODS.items():
                own = [
                    row for row in rows(block_of("method", name, method.modalities[0]), "method.") if "`method.name`" not in row
                ]
                text += f"\n### method.name={name}\n\n{HEAD if own else ''}" + "\n".join(own) + ("\n" if own else "None.\n")
            weight = [row for row in rows(member_of("data2vec2+mae", "mae"), "method.NAME.") if "NAME.weight" in row]
            text += COMBINED + HEAD + "\n".join(weight) + "\n"
        else:
            text += f"{model.__doc__.splitlines()[0]}\n\n{HEAD}" + "\n".join(rows(model, f"{block}.")) + "\n"
        if block == "model":
            wrapped = rows(block_of("model", "simclr", "vision", True), "model.")
            text += (
                "\n### model, with a model of transformers (`model.backbone`), images\n\n" + HEAD + "\n".join(wrapped) + "\n"
            )
    text += SEVERAL + HEAD + "\n".join(rows(MemberOptions, "modalities.NAME.")) + "\n"
    text += PAIRS + HEAD + "\n".join(rows(BindOptions, "bind.")) + "\n"
    text += finetuning()
    schema = json.dumps(recipe.model_json_schema(), indent=1) + "\n"
    return {ROOT / "docs" / "recipes.md": text, ROOT / "docs" / "recipe.schema.json": schema}


if __name__ == "__main__":
    for path, content in documents().items():
        path.write_text(content, encoding="utf-8")
