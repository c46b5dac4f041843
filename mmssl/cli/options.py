"""Words of a command line: positional ones and `key=value`, every error at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmssl.errors import RecipeError

_OPTION = re.compile(r"[A-Za-z_][\w.-]*=")  # a path such as runs/lr=1e-3 is none
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "text",
    Path: "a path",
}

Option = tuple[Any, Any, str]  # type or tuple of choices, default (... = must be given), help


def parse(
    arguments: Sequence[str],
    positional: Sequence[str] = (),
    options: Mapping[str, Option] | None = None,
    overrides: bool = False,
) -> dict[str, Any]:
    """The words by name.

    Args:
        arguments: words after the verb. `--name` stands for `name=true`.
        positional: names of the words that are not key=value, in order; one in brackets, "[RECIPE]", may be missing, and the
            last one, "MODEL ...", may be several words.
        options: name -> (type, default, help). Types are bool, int, float, str, Path or a tuple of allowed words; a
            list is of text, and given once for each entry.
        overrides: pass unknown `key=value` words on, as `overrides`, for the recipe to judge.
    Returns: positional words by lower-case name (None where missing), all options with their defaults.
    Raises: RecipeError naming everything that is wrong.
    """
    options = options or {}
    several = positional[-1].endswith(" ...") if positional else False
    values: dict[str, Any] = {_key(name): None for name in positional}
    values |= {name: default for name, (_, default, _) in options.items()}
    words, rest, given, problems = [], [], set(), []
    for argument in arguments:
        if argument.startswith("--"):
            argument = argument[2:] if "=" in argument else f"{argument[2:]}=true"
        if not _OPTION.match(argument):
            words.append(argument)
            continue
        name, _, text = argument.partition("=")
        if name not in options and overrides:
            rest.append(argument)
        elif name not in options:
            problems.append(f"{name}: unknown option{nearest(name, options)}; {_allowed(options)}")
        elif name in given and options[name][0] is list:
            values[name].append(text)
        elif name in given:
            problems.append(f"{name}: given twice")
        else:
            given.add(name)
            try:
                values[name] = _convert(options[name][0], text)
            except ValueError as error:
                problems.append(f"{name}: found {text!r}, expected {error}")
    for name, word in zip(positional, words):
        values[_key(name)] = word
    if several:
        values[_key(positional[-1])] = words[len(positional) - 1 :]
    problems += [f"{name}: missing" for name in positional[len(words) :] if not name.startswith("[")]
    problems += [f"{word!r}: not expected; options are written key=value" for word in words[len(positional) :] if not several]
    problems += [f"{name}: missing; {options[name][2]}" for name in options if options[name][1] is ... and name not in given]
    if problems:
        listing = "\n".join(f"  {line}" for line in problems)
        raise RecipeError(f"the command line has {len(problems)} error{'s' * (len(problems) > 1)}:\n{listing}")
    return values | ({"overrides": rest} if overrides else {})


def _key(name: str) -> str:
    return name.strip("[]").removesuffix(" ...").lower()


def describe(options: Mapping[str, Option]) -> str:
    """The options as text for --help, '' if there are none."""
    lines = [f"  {name}={_kind(kind)}{_default(default)}  {text}" for name, (kind, default, text) in options.items()]
    return "\n\noptions:\n" + "\n".join(lines) if lines else ""


def nearest(found: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' or ''."""
    close = difflib.get_close_matches(found, [*names], 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _allowed(options: Mapping[str, Option]) -> str:
    return f"allowed are {', '.join(options)}" if options else "there are none"


def _kind(kind: Any) -> str:
    if isinstance(kind, tuple):
        return "|".join(kind)
    return "true|false" if kind is bool else (str if kind is list else kind).__name__.upper()


def _default(default: Any) -> str:
    return " (required)" if default is ... else "" if default is None else f" [{str(default).lower()}]"


def _convert(kind: type | tuple[str, ...], text: str) -> Any:
    """Raises: ValueError saying what is expected."""
    if isinstance(kind, tuple):
        if text not in kind:
            raise ValueError(f"one of {', '.join(kind)}{nearest(text, kind)}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(_KINDS[bool])
        return text.lower() == "true"
    read: Callable[[str], Any] = (lambda text: [text]) if kind is list else kind
    try:
        if not text:
            raise ValueError
        return read(text)
    except ValueError:
        raise ValueError(_KINDS[kind]) from None
