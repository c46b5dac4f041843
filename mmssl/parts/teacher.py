"""The moving average of the student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl.distributed import all_sum, is_partitioned, owned_slice, share_slices, world
from mmssl.model.encoder import Encoder
from mmssl.model.norm import is_batch_norm
from mmssl.model.transformer import SHARED
from mmssl.parts.network import Network
from mmssl.parts.part import Part
from mmssl.parts.split import Split
from mmssl.schedules import Schedule
from mmssl.types import Clock, Encoded, View

WHOLE = ("encoder.",)  # of a network, see `Teacher.follow`


class Teacher(Part):
    """An fp32 average of a network, in eval mode, that no engine, optimizer or `train()` call ever touches.

    Each rank averages the slices whose fp32 masters it owns, straight in the tensors that the forward uses, and the slices
    are then shared. The network is held outside the module tree, so that DDP and ZeRO do not see it, yet its tensors travel
    in the state dict and follow `.to(device)`.

    Args:
        student: copied at the start; it must not be wrapped or partitioned yet.
        momentum: tau of teacher <- tau * teacher + (1 - tau) * student, read at the number of updates applied.
        features: the teacher's feature encoder is an average too; or a copy of the student's, made anew after each update; or
            there is none, and the teacher is given the features that the student computed.
        positions: average or copy of the student's position module.
        lag: updates by which the momentum is read late: 1 where a paper follows update k with the momentum of k.
        batch_stats: its batch normalisation uses the statistics of the batch, as the student's does, and its running ones
            follow its own passes instead of being copied; all else stays in eval mode.
    """

    def __init__(
        self,
        student: Network,
        momentum: Schedule,
        features: Literal["average", "copy", "share"] = "average",
        positions: Literal["average", "copy"] = "average",
        batch_stats: bool = False,
        lag: int = 0,
    ):
        super().__init__()
        if not 0 <= min(momentum.start, momentum.end) <= max(momentum.start, momentum.end) <= 1:
            raise ValueError(f"momentum: from {momentum.start} to {momentum.end}, must lie between 0 and 1")
        if any(is_partitioned(p) for p in student.parameters()):
            raise ValueError("The teacher must be copied before the student is partitioned.")
        self.momentum, self.lag, self.shares = momentum, lag, features == "share"
        self.elsewhere: tuple[str, ...] = ()  # what of the network another teacher averages, see `follow`
        self.parts: Split | None = None  # of the weights, if each rank keeps its own
        self.copied = ("encoder.features.",) * (features == "copy") + ("encoder.positions.",) * (positions == "copy")
        memo: dict[int, Any] = {id(student.encoder.features): nn.Identity()} if self.shares else {}
        network = copy.deepcopy(student, memo).requires_grad_(False).eval()
        norms = {name: module for name, module in network.named_modules() if batch_stats and is_batch_norm(module)}
        for norm in norms.values():
            norm.train()
        self.kept = {f"{name}.{buffer}" for name, norm in norms.items() for buffer, _ in norm.named_buffers()}
        object.__setattr__(self, "network", network)  # hidden from nn.Module on purpose
        object.__setattr__(self, "student", student)
        self.network: Network
        self.student: Network

    @property
    def encoder(self) -> Encoder:
        """The averaged encoder; without a feature encoder if it shares the student's."""
        return self.network.encoder

    def encode(self, view: View, features: Tensor | None, collect: Literal["ffn", "block"] | None = None) -> Encoded:
        """The whole view, without gradient, whatever its mask hides.

        Args:
            features: (B, L, D) of the student; read only if they are shared.
        """
        given, passes = features if self.shares else None, self.encoder.passes
        of = (view.x, view.pad, given, collect)
        return self._encode(self.encoder, *of) if passes is None else passes.once(self._encode, self.encoder, *of)

    @staticmethod
    def _encode(
        encoder: Encoder, x: Tensor, pad: Tensor | None, given: Tensor | None, collect: Literal["ffn", "block"] | None
    ) -> Encoded:
        return encoder.contextualize(encoder.local(x) if given is None else given.detach(), collect=collect, pad=pad)

    @torch.no_grad()
    def embed(self, view: View) -> Tensor:
        """As `Network.embed`."""
        return self.network.embed(view)

    @torch.no_grad()
    def embed_all(self, views: Sequence[View]) -> list[Tensor]:
        """As `Network.embed_all`."""
        return self.network.embed_all(views)

    @torch.no_grad()
    def project(self, h: Tensor) -> Tensor:
        """As `Network.project`."""
        return self.network.project(h)

    @torch.no_grad()
    def project_all(self, h: Sequence[Tensor]) -> list[Tensor]:
        """As `Network.project_all`."""
        return self.network.project_all(h)

    @property
    def pace(self) -> tuple[Any, ...] | None:
        """What decides how far it moves in each update, the same for teachers that could be one; None: of its own."""
        steady = self.momentum.start == self.momentum.end and not self.momentum.warmup
        return (self.momentum.start,) if steady else (self.momentum, self.lag)

    def follow(self, other: Teacher) -> None:
        """Use what another teacher of the same pace averages from now on: the encoder if it is of the same student and treated
        alike, or else its trunk, for students that share theirs.
        """
        if self.elsewhere == WHOLE:  # the one that keeps it follows by itself
            return
        mine, theirs = self.network.encoder, other.network.encoder
        if self.student.encoder is other.student.encoder and self._treatment == other._treatment:
            self.network.encoder, self.elsewhere = theirs, WHOLE
        elif isinstance(mine, Encoder) and _trunk(self) is _trunk(other):
            mine.transformer.share(theirs.transformer)
            self.elsewhere = tuple(f"encoder.transformer.{name}." for name in SHARED)

    @property
    def _treatment(self) -> tuple[Any, ...]:
        """What becomes of which part of the encoder."""
        return self.shares, self.copied, {name for name in self.kept if name.startswith(WHOLE)}

    def split(self) -> None:
        """Keep only this rank's part of the averaged weights from now on, see `Split`; for networks too large for each rank to
        have one more. What another teacher averages is split by that one.
        """
        own = [*self._own(dict(self.network.named_parameters()))]
        if world() > 1 and self.parts is None and own:
            self.parts = Split(self.network, own)

    def _tensors(self) -> dict[str, Any]:
        """All weights and buffers that are its own, whole; a collective if they are split."""
        found = self._own(self.network.state_dict())
        return found if self.parts is None else found | self.parts.whole([*self.parts.parts])

    def _own(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Those by name that no other teacher keeps."""
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(self.elsewhere)}

    def _tau(self, clock: Clock) -> float:
        return self.momentum(clock._replace(step=max(clock.step - self.lag, 0)))

    def restart(self) -> None:
        """Equal to the student again."""
        mine = self.network.state_dict()
        self.network.load_state_dict({name: t for name, t in self.student.state_dict().items() if name in mine})

    @torch.no_grad()
    def health(self, clock: Clock) -> dict[str, float]:
        """tau, and the length of both weight vectors (of what is averaged here)."""
        own = self._own(dict(self.network.named_parameters()))
        if not own:
            return {"momentum": self._tau(clock)}
        squares = torch.zeros(2, dtype=torch.float64, device=next(iter(own.values())).device)
        whole = squares.clone()
        parts: dict[str, Tensor] = {} if self.parts is None else self.parts.parts
        for name, parameter in self.student.named_parameters():
            if name in own:
                mine, master = parts[name] if name in parts else own[name], owned_slice(parameter).values
                (squares if name in parts else whole)[0] += mine.double().square().sum()
                (squares if is_partitioned(parameter) else whole)[1] += master.double().square().sum()
        teacher, student = (whole + all_sum(squares)).sqrt().tolist()
        return {"momentum": self._tau(clock), "teacher_norm": teacher, "student_norm": student}

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Move towards the student by 1 - tau; frozen weights are copied, and buffers unless they follow its own passes."""
        tau = self._tau(clock)
        own = self._own(dict(self.network.named_parameters()))
        split = []
        teacher_slices, student_slices = [], []
        for name, parameter in self.student.named_parameters():
            if name not in own:
                continue
            start, master = owned_slice(parameter)
            if self.parts is None:
                part = own[name].data.view(-1)[start : start + master.numel()]
            else:  # ZeRO-3 cuts in the same places
                part = self.parts.parts[name]
                master = master if is_partitioned(parameter) else self.parts.part(master)
            split.append(is_partitioned(parameter) and self.parts is None)
            if parameter.requires_grad and not name.startswith(self.copied):
                teacher_slices.append(part)
                student_slices.append(master)
            else:
                part.copy_(master)
        if teacher_slices:
            torch._foreach_lerp_(teacher_slices, student_slices, 1 - tau)
        if self.parts is None:
            share_slices([p.data for p in own.values()], split)
        buffers = dict(self.student.named_buffers())
        for name, mine in self._own(dict(self.network.named_buffers())).items():
            if name not in self.kept:
                mine.copy_(buffers[name])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        mine = self._tensors()
        destination.update({f"{prefix}network.{name}": tensor for name, tensor in mine.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        missing, unexpected, errors = rest[2:5]
        mine, fitting = self._tensors(), {}
        for name, tensor in mine.items():
            saved = state_dict.get(f"{prefix}network.{name}")
            if saved is None:
                missing.append(f"{prefix}network.{name}")
            elif saved.shape != tensor.shape:
                errors.append(f"{prefix}network.{name} is {tuple(saved.shape)}, expected {tuple(tensor.shape)}")
            else:
                tensor.copy_(saved)
                fitting[name] = saved
        if self.parts is not None:
            self.parts.load(fitting)
        known = {f"{prefix}network.{name}" for name in mine}
        unexpected += [name for name in state_dict if name.startswith(prefix) and name not in known]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)

        def keep_fp32(tensor: Tensor) -> Tensor:  # an engine that casts the model to bf16 must not cast its average
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.dtype.itemsize < 4 else moved

        self.network._apply(keep_fp32)
        if self.parts is not None:
            self.parts.apply(keep_fp32)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        twin = type(self).__new__(type(self))
        nn.Module.__init__(twin)
        memo[id(self)] = twin
        for name in ("momentum", "lag", "shares", "copied", "kept", "elsewhere", "parts"):
            setattr(twin, name, getattr(self, name))
        object.__setattr__(twin, "network", copy.deepcopy(self.network, memo))
        object.__setattr__(twin, "student", copy.deepcopy(self.student, memo))
        return twin


def _trunk(teacher: Teacher) -> nn.Module:
    """The blocks that a teacher averages; all of an encoder that has no shared transformer."""
    encoder = teacher.student.encoder
    return encoder.transformer.blocks if isinstance(encoder, Encoder) else encoder


def share_averages(teachers: Sequence[Teacher]) -> None:
    """Let each use what an earlier one of the same pace averages already."""
    for i, teacher in enumerate(teachers):
        leader = next((one for one in teachers[:i] if one.pace is not None and one.pace == teacher.pace), None)
        if leader is not None:
            teacher.follow(leader)
