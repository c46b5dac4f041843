"""What lists of crops and policies by name have in common, whatever is cropped."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

Policies = Mapping[str, tuple[Any, ...]]


def listed(crops: Sequence[Any] | str, policies: Policies) -> Sequence[Any]:
    """The crops of a policy, or those given.

    Raises: ValueError that begins with `crops`, for none, or for a policy that does not exist with the nearest name.
    """
    if isinstance(crops, str) and crops not in policies:
        close = difflib.get_close_matches(crops, policies, 1, 0.5)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"crops: {crops!r} is no known policy{hint}; known are {', '.join(policies)}")
    found = policies[crops] if isinstance(crops, str) else crops
    if not found:
        raise ValueError(f"crops: none are listed; name a policy, one of {', '.join(policies)}, or set it to null")
    return found


def one_by_one(
    crops: Sequence[Any] | str | None,
    policies: Policies,
    check: Callable[[Any, str], None],
    size: Callable[[Any], float],
) -> tuple[list[Any], int]:
    """One entry for each view, and how many of them, the first ones, are of full size: the largest.

    Args:
        crops: frozen dataclasses with a `count`, the name of a policy, or None for a single view without a crop of its own.
        check: raises ValueError about a crop at a key such as `crops.0`.
        size: of a crop.
    Raises: ValueError that begins with `crops`.
    """
    if crops is None:
        return [], 1
    kinds = listed(crops, policies)
    for i, crop in enumerate(kinds):
        check(crop, f"crops.{i}")
    each = [replace(crop, count=1) for crop in kinds for _ in range(crop.count)]
    largest = max(size(crop) for crop in each)
    full = [crop for crop in each if size(crop) == largest]
    return full + [crop for crop in each if size(crop) < largest], len(full)
