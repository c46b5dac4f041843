"""The moving average of the student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.distributed import is_partitioned, owned_slice, share_slices
from mmssl.model.encoder import Encoder
from mmssl.parts.network import Network
from mmssl.parts.part import Part
from mmssl.schedules import Schedule
from mmssl.types import Clock


class Teacher(Part):
    """An fp32 average of a network, in eval mode, that no engine, optimizer or `train()` call ever touches.

    Each rank averages the slices whose fp32 masters it owns, straight in the tensors that the forward uses, and the slices
    are then shared. The network is held outside the module tree, so that DDP and ZeRO do not see it, yet its tensors travel
    in the state dict and follow `.to(device)`.

    Args:
        student: copied at the start; it must not be wrapped or partitioned yet.
        momentum: tau of teacher <- tau * teacher + (1 - tau) * student, read at the number of updates applied.
    """

    def __init__(self, student: Network, momentum: Schedule):
        super().__init__()
        if not 0 <= min(momentum.start, momentum.end) <= max(momentum.start, momentum.end) <= 1:
            raise ValueError(f"momentum: from {momentum.start} to {momentum.end}, must lie between 0 and 1")
        self.momentum = momentum
        if any(is_partitioned(p) for p in student.parameters()):
            raise ValueError("The teacher must be copied before the student is partitioned.")
        network = copy.deepcopy(student).requires_grad_(False).eval()
        object.__setattr__(self, "network", network)  # hidden from nn.Module on purpose
        object.__setattr__(self, "student", student)
        self.network: Network
        self.student: Network

    @property
    def encoder(self) -> Encoder:
        """The averaged encoder."""
        return self.network.encoder

    def restart(self) -> None:
        """Equal to the student again."""
        self.network.load_state_dict(self.student.state_dict())

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Move towards the student by 1 - tau; buffers and frozen weights are copied."""
        tau = self.momentum(clock)
        own = dict(self.network.named_parameters())
        split = []
        teacher_slices, student_slices = [], []
        for name, parameter in self.student.named_parameters():
            start, master = owned_slice(parameter)
            part = own[name].data.view(-1)[start : start + master.numel()]
            split.append(is_partitioned(parameter))
            if parameter.requires_grad:
                teacher_slices.append(part)
                student_slices.append(master)
            else:
                part.copy_(master)
        torch._foreach_lerp_(teacher_slices, student_slices, 1 - tau)
        share_slices([p.data for p in own.values()], split)
        for mine, theirs in zip(self.network.buffers(), self.student.buffers()):
            mine.copy_(theirs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}network.{name}": tensor for name, tensor in self.network.state_dict().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        missing, unexpected = rest[2], rest[3]
        mine = self.network.state_dict()
        for name, tensor in mine.items():
            saved = state_dict.get(f"{prefix}network.{name}")
            if saved is None:
                missing.append(f"{prefix}network.{name}")
            else:
                tensor.copy_(saved)
        known = {f"{prefix}network.{name}" for name in mine}
        unexpected += [name for name in state_dict if name.startswith(prefix) and name not in known]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)

        def keep_fp32(tensor: Tensor) -> Tensor:  # an engine that casts the model to bf16 must not cast its average
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.dtype.itemsize < 4 else moved

        self.network._apply(keep_fp32)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        twin = Teacher.__new__(Teacher)
        nn.Module.__init__(twin)
        memo[id(self)] = twin
        twin.momentum = self.momentum
        object.__setattr__(twin, "network", copy.deepcopy(self.network, memo))
        object.__setattr__(twin, "student", copy.deepcopy(self.student, memo))
        return twin
