"""How large a loss is."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.distributed import all_sum, world
from mmssl.parts.part import Staged
from mmssl.types import Clock


class Magnitude(Staged):
    """Running mean of the absolute value of a loss, over applied updates and all ranks, free of the bias of its start.

    A loss divided by it pulls as hard as its logarithm does, whatever its unit: the gradient is that of log |loss|, but for
    the delay of the mean.
    """

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.running: Tensor
        self.updates: Tensor
        self.register_buffer("running", torch.zeros(1))
        self.register_buffer("updates", torch.zeros(1))

    def factor(self) -> Tensor:
        """() what the loss is to be multiplied by, constant within an update; 1 before the first one."""
        mean = self.running / (1 - self.decay**self.updates)
        return torch.where(self.updates > 0, 1 / mean.clamp(min=1e-12), 1.0).squeeze(0)

    def measure(self, loss: Tensor) -> None:
        """Count a micro-batch of this rank. loss: ()."""
        self.stage(loss.to(self.running.dtype))

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Take the mean over what was measured since `before_step`."""
        if not self.staged:
            return
        mean = torch.stack([loss for (loss,) in self.staged]).mean()
        self.staged.clear()
        self.running.lerp_(all_sum(mean).abs()[None] / world(), 1 - self.decay)
        self.updates += 1

    def health(self, clock: Clock) -> dict[str, float]:
        """What the loss is divided by."""
        return {"magnitude": 1 / float(self.factor())}
