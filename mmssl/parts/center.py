"""A running mean."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.distributed import all_sum, world
from mmssl.parts.part import Staged
from mmssl.types import Clock


class Center(Staged):
    """Running mean of a teacher's scores over all ranks: `value` (K,), from 0.

    Updated once for each applied update, after it was used, by the mean over all micro-batches; one that is not finite
    changes nothing.

    Args:
        dim: K.  momentum: of the old value.
    Source: arXiv:2104.14294, Eq. 4.
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float = 0.9):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"center_momentum: {momentum}, must be at least 0 and below 1")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))

    def update(self, scores: Tensor) -> None:
        """Take part in the next value. scores: (B, K), of as many rows at each call and on each rank."""
        self.stage(scores.detach().to(self.value.dtype).mean(0))

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """value <- momentum * value + (1 - momentum) * mean."""
        if self.staged:
            mean = all_sum(torch.stack([one for (one,) in self.staged]).mean(0)) / world()
            new = torch.lerp(mean, self.value, self.momentum)
            self.value.copy_(torch.where(new.isfinite().all(), new, self.value))
        self.staged.clear()
