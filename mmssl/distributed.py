"""All that names a backend: collectives, and the slices of sharded parameters. With training/, nothing else does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmssl import stage
from mmssl.errors import RecipeError


def rank(group: ProcessGroup | None = None) -> int:
    """This process's position, 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def world(group: ProcessGroup | None = None) -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over ranks, no gradient. The input is left as it is."""
    stage.proceed()
    if world(group) == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def all_max(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Maximum over ranks, no gradient."""
    stage.proceed()
    if world(group) == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x


def gather_rows(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Rows of all ranks, interleaved as they were dealt out: row j of rank r lands at j*world + r. No gradient; equal sizes."""
    stage.proceed()
    if world(group) == 1:
        return x
    mine = x.contiguous().cuda() if dist.get_backend(group) == "nccl" else x.contiguous()  # nccl has no CPU tensors
    parts = [torch.empty_like(mine) for _ in range(world(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts, dim=1).flatten(0, 1).to(x.device)


# A row counts in the losses of all ranks, so both gradients are sums over ranks. DDP divides by their number, which gives the
# gradient of the mean over ranks: exact where each rank has the mean over its own rows, and where each has the whole loss.


def gather(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Rows of all ranks in global order, as `gather_rows`, with gradient. x: (B, ...) -> (world*B, ...)."""
    return x if world(group) == 1 else _Gather.apply(x, group)  # type: ignore[return-value]


def sum_ranks(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over ranks, as `all_sum`, with gradient."""
    return x if world(group) == 1 else _SumRanks.apply(x, group)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return sum_ranks(upstream, ctx.group)[rank(ctx.group) :: world(ctx.group)], None


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return all_sum(x, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return sum_ranks(upstream, ctx.group), None


def gather_objects(mine: Any) -> list[Any]:
    """What every rank gives, by rank; through pickle, for a few small things."""
    stage.proceed()
    if world() == 1:
        return [mine]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, mine)
    return found


def barrier() -> None:
    """Wait for all ranks."""
    stage.proceed()
    if world() > 1:
        dist.barrier()


@contextmanager
def launched_group(seconds: float = 4 * 3600) -> Iterator[None]:
    """A process group over gloo of what `accelerate launch` or torchrun started; nothing where this process is alone.

    seconds: how long ranks wait for each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        yield
    finally:
        dist.destroy_process_group()


def limit_groups(seconds: float) -> None:
    """Give every process group that exists the same time-out: DeepSpeed makes copies of the world group without one."""
    if world() > 1:
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def check_world(seen_by_launcher: int) -> None:
    """Stop a run in which each process believes it is alone.

    A launch without a process-group backend, or with two opinions about CPU and DeepSpeed, starts N processes that all read the
    whole data set and all write the checkpoint. Raises: RecipeError.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if not seen_by_launcher == world() == expected:
        raise RecipeError(
            f"{expected} processes were launched, accelerate sees {seen_by_launcher} and torch.distributed {world()}. "
            "Use one of the shipped launch profiles in recipes/accelerate; ACCELERATE_USE_CPU must not be set with DeepSpeed."
        )


class Slice(NamedTuple):
    """The part of a parameter whose fp32 master this rank owns."""

    start: int  # in the flattened parameter
    values: Tensor  # (n,) fp32, the master itself


def is_partitioned(parameter: nn.Parameter) -> bool:
    """True if ZeRO-3 has split the parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def owned_slice(parameter: nn.Parameter) -> Slice:
    """What this rank averages of a parameter: everything, or its ZeRO-3 partition without the padding at the end.

    Raises: RecipeError if the parameter's fp32 master is hidden in the optimizer.
    """
    if is_partitioned(parameter):
        from deepspeed.utils import safe_get_local_fp32_param

        split: Any = parameter  # with the attributes that ZeRO-3 adds
        master = safe_get_local_fp32_param(parameter) if parameter.requires_grad else split.ds_tensor
        start = rank() * split.ds_tensor.ds_numel
        return Slice(start, master.flatten()[: max(0, min(master.numel(), split.ds_numel - start))])
    if parameter.dtype not in (torch.float32, torch.float64):
        raise RecipeError(
            f"The weights are {parameter.dtype} and their fp32 masters lie in the optimizer. Use autocast "
            "(train.precision=bf16, or torch_autocast in the DeepSpeed file), which leaves the weights in fp32."
        )
    return Slice(0, parameter.detach().flatten())


@torch.no_grad()
def share_slices(full: list[Tensor], partitioned: list[bool]) -> None:
    """Fill in the slices that other ranks own.

    Args:
        full: fp32 tensors in which this rank has written its own slices; those of other ranks hold stale values.
        partitioned: whether the tensor is split as ZeRO-3 splits, in equal parts of which the last is cut.
    """
    split = [tensor for tensor, flag in zip(full, partitioned) if flag]
    if world() == 1 or not split:
        return
    me, size = rank(), world()
    parts = [-(-tensor.numel() // size) for tensor in split]
    mine = torch.cat(
        [nn.functional.pad(own := t.flatten()[me * n : (me + 1) * n], (0, n - own.numel())) for t, n in zip(split, parts)]
    )
    everyone = torch.empty(size * mine.numel(), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(everyone, mine)
    offset = 0
    for tensor, n in zip(split, parts):
        rows = everyone.view(size, -1)[:, offset : offset + n].reshape(-1)[: tensor.numel()]
        tensor.copy_(rows.view_as(tensor))
        offset += n


@torch.no_grad()
def full_value(parameter: nn.Parameter) -> Tensor:
    """The whole fp32 parameter on every rank; a collective under ZeRO-3."""
    if not is_partitioned(parameter):
        return parameter.detach()
    own = owned_slice(parameter)
    split: Any = parameter
    whole = torch.zeros(split.ds_shape, dtype=torch.float32, device=own.values.device)
    whole.view(-1)[own.start : own.start + own.values.numel()] = own.values
    share_slices([whole], [True])
    return whole


@torch.no_grad()
def set_full_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a whole fp32 value into a parameter that ZeRO-3 has split: into this rank's master and what is gathered from it."""
    from deepspeed.utils import safe_set_local_fp32_param

    split: Any = parameter
    value = value.to(split.ds_tensor.device)
    if parameter.numel() == split.ds_numel:  # small ones stay gathered
        parameter.data.copy_(value)
    start, own = rank() * split.ds_tensor.ds_numel, torch.zeros_like(split.ds_tensor.data).flatten()
    part = value.flatten()[start : start + own.numel()]
    own[: part.numel()] = part
    split.ds_tensor.data.copy_(own.view_as(split.ds_tensor))
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, own)
