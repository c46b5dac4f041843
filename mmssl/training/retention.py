"""Which checkpoints stay besides the newest."""

from __future__ import annotations

from typing import Any

from mmssl.config.blocks import SaveOptions


class Retention:
    """Evenly spread ones for good, and the last one that proved healthy.

    A checkpoint has proved healthy when nothing was wrong in the `save.proven` updates after it. One at a time is a candidate
    for that: the first that is saved after the one before was taken or dropped.

    Args:
        steps: updates of the run.
        state: what `state` gave when the run was saved.
    """

    def __init__(self, steps: int, options: SaveOptions, state: dict[str, Any] | None = None):
        self.steps, self.proven = steps, options.proven
        saves = steps // options.every
        # With fewer saves than that all would stay.
        self.apart = -(-saves // options.permanent) * options.every if saves > options.permanent > 0 else 0
        self.healthy: int | None = (state or {}).get("healthy")
        self.candidate: int | None = (state or {}).get("candidate")

    def at(self, step: int) -> set[int]:
        """The steps that stay when one is saved at `step`."""
        if self.candidate is not None and self.candidate + self.proven <= step:
            self.healthy, self.candidate = self.candidate, None
        if self.candidate is None and self.proven and step + self.proven <= self.steps:
            self.candidate = step
        permanent = range(self.apart, step + 1, self.apart) if self.apart else ()
        return {*permanent, *(s for s in (self.healthy, self.candidate) if s is not None)}

    def trouble(self) -> None:
        """An update was left out, or health is below the guard: the candidate may be the cause."""
        self.candidate = None

    def state(self) -> dict[str, int | None]:
        """To be saved."""
        return {"healthy": self.healthy, "candidate": self.candidate}
