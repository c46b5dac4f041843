"""Whether a run may go on under another recipe than the one it was saved with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mmssl.config import Settings
from mmssl.errors import RecipeError
from mmssl.redaction import redact

# What neither changes a weight nor the order of samples, and what changes only what is still to come. All else is refused.
FREE = (
    *("out", "save", "watch", "data.workers", "data.max_bad", "data.min_bad", "train.log_every", "train.report_to"),
    *("train.threads", "train.device", "train.max_skips", "train.max_skip_share", "train.split_teacher"),
    "bind.prompts",
)
WARNED = ("optim", "train.steps", "train.epochs", "train.precision", "train.compile", "train.micro_batch")


def facts(recipe: Settings) -> dict[str, str]:
    """Every key of a recipe with its value as JSON, without secrets."""
    return {key: redact(json.dumps(value)) for key, value in _leaves(recipe.model_dump(mode="json"))}


def check_changes(saved: Mapping[str, str], recipe: Settings, allowed: Collection[str], aloud: bool = True) -> None:
    """Compare a recipe with the one of the checkpoint; a key that one of them does not know yet is none that changed.

    Args:
        allowed: keys, or blocks, whose change is wanted.
        aloud: whether to tell of changes that are not refused.
    Raises: RecipeError naming what may not change.
    """
    now = facts(recipe)
    changed = [key for key in now if key in saved and saved[key] != now[key] and not _free(key)]
    refused = [key for key in changed if not within(key, (*WARNED, *allowed)) and not _weighs(key)]
    for key in changed if aloud and not refused else ():
        print(f"mmssl: note: {key} was {saved[key]} when the run was saved, and is {now[key]} from here on.", file=sys.stderr)
    if refused:
        listing = "\n".join(f"  {key} was {saved[key]}, is {now[key]}" for key in refused)
        raise RecipeError(
            f"The run was saved under another recipe:\n{listing}\nSet this back in config.yaml, or go on all the same with "
            f"mmssl resume RUN allow_changed={','.join(refused)}."
        )


def _free(key: str) -> bool:
    """Whether a key may change; of a member of several kinds of data, by its name within that."""
    return within(key, FREE) or within(re.sub(r"^modalities\.\w+\.", "", key), FREE)


def _weighs(key: str) -> bool:
    """Whether a key says what a loss counts, of one kind of data or of their binding, which may change from some update on."""
    return re.fullmatch(r"modalities\.\w+\.weight|bind\.weight", key) is not None


def within(key: str, blocks: Collection[str]) -> bool:
    """Whether a key is one of these, or in one of these blocks."""
    return any(key == block or key.startswith(f"{block}.") for block in blocks)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
