"""The moments at which state changes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.distributed import gather_rows
from mmssl.types import Clock


class Part(nn.Module):
    """A module whose buffers update themselves; the trainer walks all parts, so that no method can forget one."""

    matrices: ClassVar[tuple[str, ...]] = ()  # own parameters that decay as the weights of linear layers do
    decays: ClassVar[bool] = True  # whether weight decay reaches its parameters

    def on_epoch(self, clock: Clock) -> None:
        """Called when a new pass over the data begins."""

    def before_step(self, clock: Clock) -> None:
        """Called before the first micro-batch of each update, whether the one before was applied or not."""

    def after_step(self, clock: Clock) -> None:
        """Called once for each update that was applied, with `clock.step` counting it already."""

    def restart(self) -> None:
        """Called when the student was given other weights before the run."""

    def health(self, clock: Clock) -> dict[str, float]:
        """Numbers for the log, asked for at logged updates on all ranks."""
        return {}


class Staged(Part):
    """Keeps what the micro-batches of an update bring until the update is applied; one that is skipped leaves no trace.

    What is staged is no state: between updates there is nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.staged: list[tuple[Tensor, ...]] = []

    def stage(self, *rows: Tensor) -> None:
        """Keep tensors with a row for each sample of this rank."""
        self.staged.append(tuple(one.detach() for one in rows))

    def commit(self, *rows: Tensor) -> None:
        """Write what was staged together, rows of all ranks in global order."""

    def before_step(self, clock: Clock) -> None:
        """Forget what a skipped update staged."""
        self.staged.clear()

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Commit, micro-batch by micro-batch."""
        for rows in self.staged:
            self.commit(*(gather_rows(one) for one in rows))
        self.staged.clear()


def finite_rows(new: Tensor, old: Tensor) -> Tensor:
    """(n, D): the new rows, and the old one where the new is not finite."""
    return torch.where(new.isfinite().all(1, keepdim=True), new, old)
