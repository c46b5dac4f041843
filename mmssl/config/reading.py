"""Recipe files and overrides as plain dicts: safe YAML, the shipped recipes, `key.sub=value`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from mmssl.config.messages import nearest
from mmssl.errors import RecipeError

MAX_BYTES, MAX_DEPTH = 1_000_000, 32
ALIASES = {"method": "method.name", "data": "data.path", "model": "model.init"}


class _Loader(yaml.SafeLoader):
    """Safe, with `1e-3` a number, and duplicate keys an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", name.start_mark)
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name.value!r} is given twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML by the safe loader. Raises: RecipeError naming `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        if isinstance(error, yaml.reader.ReaderError):  # it counts characters
            line = f", line {text.count(chr(10), 0, error.position) + 1}"
            problem = f"the character {chr(error.character)!r} is not allowed"
        raise RecipeError(f"{where}{line}: not valid YAML: {' '.join(problem.split())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as a dict. Raises: RecipeError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_BYTES} bytes; a recipe fits one screen.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} holds {type(raw).__name__}, expected the blocks data, model, method, views, optim, train, watch."
        )
    return raw


def recipe_root() -> Path:
    """The folder of the shipped recipes."""
    return Path(__file__).resolve().parents[2] / "recipes"


def shipped_recipes(finetune: bool = False) -> list[str]:
    """Names of the shipped recipes, as `find_recipe` takes them; those for fine-tuning only if asked for."""
    root = recipe_root()
    others = ("accelerate",) if finetune else ("accelerate", "finetune")
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.yaml") if p.parent.name not in others)


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name. Raises: RecipeError with the nearest names."""
    path = Path(name)
    shipped = recipe_root() / (path.with_suffix(".yaml") if path.name else "-")
    for candidate in (path, shipped, recipe_root().parent / path):
        if candidate.is_file():
            return candidate
    names = shipped_recipes(finetune=True)
    raise RecipeError(
        f"{name}: no such recipe file, and no shipped recipe of that name{nearest(str(name), names)}. "
        f"Shipped: {', '.join(names)}."
    )


def dump_value(value: Any) -> str:
    """A Python value as a one-line YAML value."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Set `key.sub=value` in a raw recipe. Raises: RecipeError."""
    name, equals, value = text.partition("=")
    name = ALIASES.get(name, name)
    if not equals or not name:
        raise RecipeError(f"{text!r} is not understood: overrides are key.sub=value, for example optim.lr=1e-3.")
    if isinstance(raw.get("data"), str):
        raw["data"] = {"path": raw["data"]}
    *blocks, leaf = name.split(".")
    target = raw
    for block in blocks:
        if target.get(block) is None:  # a block that is unset
            target[block] = {}
        inner = target[block]
        if not isinstance(inner, dict):
            raise RecipeError(f"{name}: {block} is {inner!r} in the recipe, it has no key {leaf!r}.")
        target = inner
    target[leaf] = parse_yaml(value, name) if value else None
