"""What is said of a wrong recipe: one line for each error, with the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from typing import Any

from pydantic import BaseModel

SECRET = re.compile(r"(?i)(hub|hf|access|auth|api|wandb)_?(token|key)|^token$|secret|password")
CHOICES = ("function-", "Schedule", "float", "list[")  # how pydantic names the choices of a union


def nearest(found: Any, names: typing.Iterable[str]) -> str:
    """' (did you mean X?)' or ''."""
    close = difflib.get_close_matches(str(found), list(names), 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def told(issues: list[Any]) -> list[Any]:
    """Those issues that are about what was given: a list that is wrong inside is not also wrong for being no name."""
    return [issue for issue in issues if issue["loc"][-1:] != ("str",) or not isinstance(issue["input"], list)]


def explain(issue: Any, model: type[BaseModel]) -> str:
    """One line for one pydantic error: key, finding, what is allowed, the nearest valid name."""
    location = tuple(part for part in issue["loc"] if isinstance(part, int) or not str(part).startswith(CHOICES))
    where = ".".join(str(part) for part in location) or "recipe"
    kind, message = issue["type"], issue["msg"].removeprefix("Value error, ")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        names = _fields_at(model, location[:-1])
        if SECRET.search(str(location[-1])):
            return f"{where}: no recipe holds secrets; set the environment variable (HF_TOKEN, WANDB_API_KEY) and leave it out"
        return f"{where}: unknown key{nearest(location[-1], names)}" + (f"; allowed are {', '.join(names)}" if names else "")
    if kind == "missing":
        return f"{where}: missing"
    if kind == "value_error":
        return message if where == "recipe" else f"{where}: {message}"
    return f"{where}: found {issue['input']!r}; {message[0].lower()}{message[1:]}"


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Names of the options at that place: of a block, or of a dataclass inside one, perhaps in a union."""
    for step in (part for part in location if not isinstance(part, int)):
        if typing.get_origin(model) is dict:  # of blocks by name
            model = typing.get_args(model)[1]
            continue
        fields = _fields(model)
        if step not in fields:
            return []
        model = fields[step]
    return [*_fields(model)]


def _fields(kind: Any) -> dict[str, Any]:
    """Name -> type."""
    if hasattr(kind, "model_fields"):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        return {field.name: field.type for field in dataclasses.fields(kind)}
    return {name: inner for choice in typing.get_args(kind) for name, inner in _fields(choice).items()}
