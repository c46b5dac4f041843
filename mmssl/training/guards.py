"""What decides whether an update may stand, and what undoes the traces of one that may not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.distributed import owned_slice

TRACKED = ("running_mean", "running_var", "num_batches_tracked")


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """() bool: whether no element is NaN or infinite. One pass over each tensor, without memory of its size."""
    floating = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not floating:
        return torch.tensor(True)
    return torch.stack([n.float() for n in torch._foreach_norm(floating, math.inf)]).isfinite().all()


def broken(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, tensor in tensors.items() if not bool(all_finite([tensor]))), None)


def weights_finite(module: nn.Module) -> Tensor:
    """() bool: whether what this rank owns of the trained weights is finite; the others ask for their own part."""
    return all_finite(owned_slice(p).values for p in module.parameters() if p.requires_grad)


class RunningStatistics:
    """Takes back what forward passes of a skipped update left in batch normalisation, those of teachers included.

    Everything else that changes does so after the update, see `Part.after_step`.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.buffers: list[Tensor] | None = None
        self.before: list[Tensor] = []

    def keep(self) -> None:
        """Before the first micro-batch; the module must have come to its device."""
        if self.buffers is None:
            self.buffers = [t for name, t in self.module.state_dict().items() if name.rpartition(".")[2] in TRACKED]
        self.before = [t.clone() for t in self.buffers]

    def restore(self) -> None:
        """As they were at `keep`."""
        for buffer, before in zip(self.buffers or (), self.before, strict=True):
            buffer.copy_(before)


class LocalGradients:
    """Notes under DeepSpeed, whose optimizer steps within backward, whether a gradient of this rank is not finite."""

    def __init__(self, module: nn.Module):
        self.bad: Tensor | None = None
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        found = ~all_finite([gradient])
        self.bad = found if self.bad is None else self.bad | found

    def take(self, device: torch.device) -> Tensor:
        """() bool: whether one was bad since the last call."""
        bad, self.bad = self.bad, None
        return torch.zeros((), dtype=torch.bool, device=device) if bad is None else bad.to(device)


def forget_gradients(optimizer: Any) -> None:
    """Drop what a ZeRO optimizer has accumulated of a skipped update, which outlives the Trainer's `zero_grad`."""
    optimizer.zero_grad()
    for name in ("averaged_gradients", "all_grad_tensors"):
        held = getattr(optimizer, name, None) or {}
        for group in held:
            held[group] = None
