"""Whether a run may go on under another recipe than the one it was saved with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from typing import Any

from mmssl.config import Settings
from mmssl.errors import RecipeError
from mmssl.redaction import redact

# What neither changes a weight nor the order of samples, and what changes only what is still to come. All else is refused.
FREE = (
    *("out", "save", "hub", "watch", "data.workers", "data.max_bad", "data.min_bad", "train.log_every", "train.report_to"),
    *("train.threads", "train.device", "train.max_skips", "train.max_skip_share", "train.split_teacher", "train.recompute"),
    *("train.encoder_batch", "bind.prompts"),
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
    gone = sorted(_members(saved) - _members(now))
    if gone and _members(now):
        raise RecipeError(f"modalities.{gone[0]}: the run was saved with it and goes on with it; weight=0 pauses it.")
    free = _check_batches(saved, now) if added(saved, recipe) else set()
    changed = [key for key in now if key in saved and saved[key] != now[key] and not _free(key) and key not in free]
    refused = [key for key in changed if not within(key, (*WARNED, *allowed)) and not _weighs(key)]
    for key in changed if aloud and not refused else ():
        print(f"mmssl: note: {key} was {saved[key]} when the run was saved, and is {now[key]} from here on.", file=sys.stderr)
    if refused:
        listing = "\n".join(f"  {key} was {saved[key]}, is {now[key]}" for key in refused)
        raise RecipeError(
            f"The run was saved under another recipe:\n{listing}\nSet this back in config.yaml, or go on all the same with "
            f"mmssl resume RUN allow_changed={','.join(refused)}."
        )


def added(saved: Mapping[str, str], recipe: Settings) -> set[str]:
    """Kinds of data that a run of several learns from, and that its checkpoint does not know.

    Args:
        saved: facts of the recipe that the checkpoint was saved with.
    """
    before = _members(saved)
    return {*recipe.members} - before if before else set()


def _members(facts: Mapping[str, str]) -> set[str]:
    return {key.split(".")[1] for key in facts if key.startswith("modalities.")}


def _parts(facts: Mapping[str, str]) -> dict[str, Fraction]:
    """Member -> its part of every batch."""
    shares = {name: Fraction(json.loads(facts[f"modalities.{name}.share"])) for name in _members(facts)}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def _check_batches(saved: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """Keys that may change where kinds of data are added, as the others have as many samples in an update as before.

    Raises: RecipeError with the batch that leaves them so.
    """
    keys, before, after = ("train.global_batch", "train.micro_batch"), _parts(saved), _parts(now)
    for key in keys:
        then, here = json.loads(saved[key]), json.loads(now[key])
        if then is None:
            continue
        for member, part in before.items():
            due = then * part / after[member]
            if here != due:
                raise RecipeError(
                    f"{key}: an update had {then * part} samples of {member} when the run was saved, and keeps them beside "
                    f"what is added. Set {key}={float(due):g}, or modalities.NAME.share of what is added."
                )
    return {*keys, *(f"modalities.{member}.share" for member in before)}


def _free(key: str) -> bool:
    """Whether a key may change; of a member of several kinds of data, by its name within that."""
    return within(key, FREE) or within(re.sub(r"^modalities\.\w+\.", "", key), FREE)


def _weighs(key: str) -> bool:
    """Whether a key says what a loss counts, of a kind of data, a method or a binding, which may change from some update on."""
    return re.fullmatch(r"modalities\.\w+\.weight|(modalities\.\w+\.)?method\.\w+\.weight|bind\.weight", key) is not None


def within(key: str, blocks: Collection[str]) -> bool:
    """Whether a key is one of these, or in one of these blocks."""
    return any(key == block or key.startswith(f"{block}.") for block in blocks)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
