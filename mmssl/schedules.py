"""Numbers that change while training: functions of the clock alone, hence nothing to save and nothing to lose at resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mmssl.types import Clock


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` over `steps` updates (the whole run if unset), then constant.

    With `warmup`, the value first rises linearly from 0 to `start` over that many updates; with `hold`, it then stays at
    `start` for so many; `steps` counts both in. An exponential falls by the same factor at each update.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine", "exponential"] = "linear"
    steps: int | None = None
    warmup: int = 0
    hold: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.hold < 0 or (self.steps is not None and self.steps < 1):
            raise ValueError("steps must be at least 1, warmup and hold at least 0")
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError("an exponential needs start and end above 0")

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    def __call__(self, clock: Clock) -> float:
        """The value for the update that comes next."""
        if clock.step < self.warmup:
            return self.start * clock.step / self.warmup
        begin = self.warmup + self.hold
        length = (self.steps if self.steps is not None else clock.steps) - begin
        if length <= 0 or clock.step - begin >= length:
            return self.end
        remaining = min(1.0, 1 - (clock.step - begin) / length)
        if self.shape == "exponential":
            return self.end * (self.start / self.end) ** remaining
        if self.shape == "cosine":
            remaining = (1 + math.cos(math.pi * (1 - remaining))) / 2
        return self.end - (self.end - self.start) * remaining


def constant(value: float) -> Schedule:
    """Always `value`."""
    return Schedule(value, value)


def linear(start: float, end: float, steps: int | None = None, warmup: int = 0) -> Schedule:
    """A straight line."""
    return Schedule(start, end, "linear", steps, warmup)


def cosine(start: float, end: float, steps: int | None = None, warmup: int = 0) -> Schedule:
    """Half a cosine wave."""
    return Schedule(start, end, "cosine", steps, warmup)
