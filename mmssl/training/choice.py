"""What a run makes of a metric while it goes on: the best checkpoint, and whether to go on at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from mmssl.config.blocks import ChoiceOptions
from mmssl.errors import RecipeError


class Watched:
    """The best value of a metric so far, when it was measured, and how many measurements have passed since.

    Args:
        metric: its whole name, as in metrics.jsonl.
        options: whether more or less is better, and by how much.
    """

    def __init__(self, metric: str, options: ChoiceOptions):
        self.metric, self.sign, self.least = metric, 1 if options.mode == "max" else -1, options.least
        self.value: float | None = None
        self.step: int | None = None
        self.waited = 0

    def take(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the metric is better than ever. A measurement without it, or that is not finite, is no better."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value) or not self._better(value):
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        return True

    def _better(self, value: float) -> bool:
        return self.value is None or (value - self.value) * self.sign > self.least

    def state(self) -> dict[str, Any]:
        """To be saved."""
        return {"metric": self.metric, "sign": self.sign, "value": self.value, "step": self.step, "waited": self.waited}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what was saved; from nothing, if that was of another metric."""
        self.value, self.step, self.waited = None, None, 0
        if state is not None and (state["metric"], state["sign"]) == (self.metric, self.sign):
            self.value, self.step, self.waited = state["value"], state["step"], state["waited"]


def watched(options: ChoiceOptions | None, key: str, names: Collection[str]) -> Watched | None:
    """What is watched, None if nothing is.

    Args:
        key: of the recipe, for errors.
        names: metrics that the run measures every watch.every updates.
    Raises: RecipeError if the metric is not among them; the set in the middle of a name may be left out where there is one.
    """
    if options is None:
        return None
    fitting = [name for name in names if options.metric in (name, _short(name))]
    if options.metric in names:
        fitting = [options.metric]
    if len(fitting) != 1:
        what = f"could be {' or '.join(fitting)}" if fitting else "is not measured by this run"
        listing = ", ".join(sorted(names)) or "none: it has no samples to measure (watch.path names some)"
        raise RecipeError(f"{key}.metric: {options.metric} {what}; there are {listing}.")
    return Watched(fitting[0], options)


def _short(name: str) -> str:
    """`probe/test/knn` without the set."""
    first, *_, last = name.split("/")
    return f"{first}/{last}"
