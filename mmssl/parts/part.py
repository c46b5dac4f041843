"""The two moments at which state changes."""

from __future__ import annotations

from torch import nn

from mmssl.types import Clock


class Part(nn.Module):
    """A module whose buffers update themselves; the trainer walks all parts, so that no method can forget one."""

    def on_epoch(self, clock: Clock) -> None:
        """Called when a new pass over the data begins."""

    def after_step(self, clock: Clock) -> None:
        """Called once for each update that was applied, with `clock.step` counting it already."""

    def restart(self) -> None:
        """Called when the student was given other weights before the run."""

    def health(self, clock: Clock) -> dict[str, float]:
        """Numbers for the log, asked for at logged updates on all ranks."""
        return {}
