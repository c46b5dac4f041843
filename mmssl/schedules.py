"""Numbers that change while training: functions of the clock alone, hence nothing to save and nothing to lose at resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mmssl.types import Clock


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` over `steps` updates (the whole run if unset), then constant.

    With `warmup`, the value first rises linearly from `warmup_from` to `start` over that many updates; with `hold`, it then
    stays at `start` for so many; `steps` counts both in. An exponential falls by the same factor at each update, `steps` by
    the same factor at each of the shares `at` of the way.

    Args:
        linspace: the last value of the warm-up is `start` already, as in numpy's linspace (SwAV, DINO). Otherwise it is
            reached right after the warm-up (SimCLR, BYOL).
        by: what is counted. By the epoch, `steps`, `warmup` and `hold` are epochs, and the value is constant in each.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine", "exponential", "steps"] = "linear"
    steps: int | None = None
    warmup: int = 0
    hold: int = 0
    warmup_from: float = 0.0
    linspace: bool = False
    by: Literal["step", "epoch"] = "step"
    at: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.hold < 0 or (self.steps is not None and self.steps < 1):
            raise ValueError("steps must be at least 1, warmup and hold at least 0")
        if self.shape in ("exponential", "steps") and min(self.start, self.end) <= 0:
            raise ValueError(f"{'an exponential needs' if self.shape == 'exponential' else 'steps need'} start and end above 0")
        if (self.shape == "steps") != bool(self.at) or not all(0 < share < 1 for share in self.at):
            raise ValueError(
                f"at: {list(self.at)}, the shape `steps`, and no other, needs shares between 0 and 1, such as [0.6, 0.8]"
            )
        if self.by == "epoch" and self.steps is None and self.start != self.end:
            raise ValueError("steps: missing, by the epoch it must be given as the number of epochs")

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    def __call__(self, clock: Clock) -> float:
        """The value for the update that comes next."""
        now = clock.step if self.by == "step" else clock.epoch
        if now < self.warmup:
            return self.warmup_from + (self.start - self.warmup_from) * now / max(self.warmup - self.linspace, 1)
        begin, total = self.warmup + self.hold, self.steps if self.steps is not None else clock.steps
        if self.shape == "steps":
            fallen = sum(now >= round(share * total) for share in self.at)
            return self.start * (self.end / self.start) ** (fallen / len(self.at))
        length = total - begin
        if length <= 0 or now - begin >= length:
            return self.end
        remaining = min(1.0, 1 - (now - begin) / length)
        if self.shape == "exponential":
            return self.end * (self.start / self.end) ** remaining
        if self.shape == "cosine":
            remaining = (1 + math.cos(math.pi * (1 - remaining))) / 2
        return self.end - (self.end - self.start) * remaining


def constant(value: float) -> Schedule:
    """Always `value`."""
    return Schedule(value, value)


def linear(
    start: float, end: float, steps: int | None = None, warmup: int = 0, by: Literal["step", "epoch"] = "step"
) -> Schedule:
    """A straight line. numpy's linspace of n values is that over n - 1 steps."""
    return Schedule(start, end, "linear", steps, warmup, by=by)


def cosine(
    start: float, end: float, steps: int | None = None, warmup: int = 0, by: Literal["step", "epoch"] = "step"
) -> Schedule:
    """Half a cosine wave."""
    return Schedule(start, end, "cosine", steps, warmup, by=by)
