"""Random mutations of valid recipes: each is refused by a message that names its key or line, or it builds.

python -m tools.mutations [count=500] [seed=0]   # prints one JSON object; exit status 1 if anything else happened
"""

from __future__ import annotations

import copy
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import yaml

from mmssl.config import find_recipe, load_recipe, read_yaml, shipped_recipes
from mmssl.errors import RecipeError

SECONDS = 120  # in which a recipe must have been judged, however slow the machine

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 7, 500, 10**6, 2**31, 2**63, 10**12, -(10**30)),
    *(1e-9, -0.5, 0.5, 1.5, math.nan, math.inf, -math.inf, 1e300),
    *("", "x", "1", "null", "é\x00", "../../etc", "{a: 1}"),
    *([], [1], [1, 2], [0.5, None], ["a"], [[[]]]),
    *({}, {"a": 1}, {"start": 1, "end": 2}, {1: 2}, {"a": {"b": [{}]}}),
]
KEYS: list[Any] = ["x", 1, None, True, 2.5, ("a", 1), "", "name", "steps", "__class__", "model_config"]
SCRAPS = ["{", "}", "[", "]", ":", ": ", "-", "- ", "&a ", "*a", "!!int ", "!x ", "|", ">", "'", '"', "#", "%", "@", "\t", "\n",
          "\n  ", ",", "0", "9", "999999", "e9", "-", ".", "~", "<<: ", "\x00", "\x85", "\u2028", "\ufeff", "é"]  # fmt: skip


class Found(NamedTuple):
    """What became of the mutated recipes."""

    refused: int
    built: int
    slowest: float  # seconds
    wrong: list[str]  # what else happened, with the mutation


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a recipe."""
    for name, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, name)
        yield from places(inner, (*path, name))


def mutate(raw: dict[str, Any], draw: random.Random) -> list[Any]:
    """One to three random changes in place; returns what was done."""
    done = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        path = draw.choice([*places(raw)])
        node, value = raw, copy.deepcopy(draw.choice(JUNK))
        for step in path[:-1]:
            node = node[step]
        how = draw.choice(["set", "set", "delete", "add"])
        if how == "set" or isinstance(node, list):
            node[path[-1]] = value
        elif how == "delete" and len(raw) > 1:
            del node[path[-1]]
        else:
            node[draw.choice(KEYS)] = value
        done.append((how, path, value))
    return done


def scribble(text: str, draw: random.Random) -> str:
    """The text of a recipe with one to three slips of a pen."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        lines, at = text.splitlines(keepends=True), draw.randrange(len(text) + 1)
        line, other = (draw.randrange(len(lines) + 1) for _ in range(2))
        match draw.choice(["insert", "insert", "remove", "twice", "away", "swap", "end"]):
            case "insert":
                text = text[:at] + draw.choice(SCRAPS) + text[at:]
            case "remove":
                text = text[:at] + text[at + draw.choice([1, 1, 2, 10]) :]
            case "twice":
                text = "".join(lines[:line] + lines[line : line + 1] + lines[line:])
            case "away":
                text = "".join(lines[:line] + lines[line + 1 :])
            case "swap":
                text = "".join(lines[:other] + lines[line : line + 1] + lines[other:])
            case "end":
                text = text[: max(at, len(text) // 2)]
    return text


def mutated(name: str, draw: random.Random) -> str:
    """The text of a shipped recipe after a change of its meaning or of its letters."""
    file = find_recipe(name)
    if draw.random() < 0.5:
        return scribble(file.read_text("utf-8"), draw)
    raw = read_yaml(file)
    mutate(raw, draw)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def wrong(path: Path) -> str | None:
    """What is wrong with how a recipe is judged; "" if it is refused as it should be, None if it builds.

    Views, model and method are built without memory when a recipe is checked.
    """
    try:
        load_recipe(path)
    except RecipeError as error:
        first, *problems = str(error).splitlines()
        named = all(line.startswith("  ") and ": " in line for line in problems) if " error" in first else not problems
        return "" if named and str(path) in first else f"names no key: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def attack(folder: Path, count: int, seed: int) -> Found:
    """Judge that many mutations of the shipped recipes, one after the other, in this process."""
    draw, names, path = random.Random(seed), shipped_recipes(), folder / "recipe.yaml"
    outcomes, slowest = [], 0.0
    signal.signal(signal.SIGALRM, _too_slow)
    for name in {name.split("/")[0]: name for name in names}.values():
        load_recipe(name)  # imports what its kind of data needs, which is no recipe's time
    for _ in range(count):
        name = draw.choice(names)
        text = mutated(name, draw)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        start = time.monotonic()
        signal.alarm(SECONDS)
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # a tokenizer may have to be asked for its size
            found = wrong(path)
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
        outcomes.append(f"{found}\n{name}:\n{text}" if found else found)
    return Found(outcomes.count(""), outcomes.count(None), round(slowest, 2), [text for text in outcomes if text])


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"not judged within {SECONDS} s")


def main() -> None:
    """Read the words, print what was found."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        found = attack(Path(folder), int(given.get("count", 500)), int(given.get("seed", 0)))
    print(json.dumps(found._asdict()))
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
