"""Batch normalisation by the samples of all ranks, or by groups of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.distributed import rank, sum_ranks, world
from mmssl.random import permutation


class Groups(NamedTuple):
    """Which samples share batch statistics."""

    index: Tensor  # (B,) int64, group of each sample of this rank
    count: int  # groups in the batch of all ranks


class BatchNorm(nn.Module):
    """Each channel to mean 0 and variance 1 over the batch of all ranks, on any device; gradients are exact.

    Weights, buffers and their names are those of `nn.BatchNorm*`. Statistics are at least fp32. A batch that is not finite
    leaves the running statistics as they are. Under `grouped`, each group of samples has statistics of its own; the running
    ones then follow the mean over groups.

    Args:
        dim: channels, the second dimension of the input.
        affine: weight and offset, a weight alone ("scale"), or neither.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics.
    Source: arXiv:1502.03167; gradient through statistics of all ranks as in `nn.SyncBatchNorm`, which has no CPU version.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, affine: bool | Literal["scale"] = True, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.dim, self.eps, self.momentum = dim, eps, momentum
        self.groups: Groups | None = None  # set by `grouped`
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine is True else None
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C), (B, C, L) or (B, C, H, W), any dtype, to the same. Raises: ValueError if there is one value per channel."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if x.numel() // self.dim * world() < 2:
            raise ValueError(
                "train.global_batch: batch normalisation has one value per channel, needs two; use at least 2 samples in a "
                "micro-batch (of all ranks together)"
            )
        if self.groups is None and world() == 1:
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        else:
            y, mean, variance = self._normalise(x)
        if self.momentum:
            self._track(mean, variance)
        return y

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and (C,) mean and unbiased variance of the batch, averaged over groups."""
        values = (x if x.dtype == torch.float64 else x.float()).reshape(*x.shape[:2], -1)  # (B, C, L)
        member = self._member(x)
        moments = torch.var_mean(values, (0, 2) if self.groups is None else 2, correction=0)
        spread, centre = (moment.view(-1, self.dim).double() for moment in moments)  # (B or 1, C)
        size = values.numel() // centre.numel()
        # Sums of squares are float64, where their difference is safe: it costs one exchange, not two.
        own = [member.sum(1, keepdim=True), member @ centre, member @ (spread + centre.square())]
        count, first, second = sum_ranks(size * torch.cat(own, 1)).split([1, self.dim, self.dim], 1)
        mean = first / count  # (G, C)
        variance = (second / count - mean.square()).clamp(min=0)
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        scale, shift = ((member.T @ one).to(values.dtype)[..., None] for one in (scale, shift))  # (B or 1, C, 1)
        y = torch.addcmul(shift, values, scale).reshape(x.shape).to(x.dtype)
        return y, mean.mean(0), (variance * count / (count - 1)).mean(0)

    def _member(self, x: Tensor) -> Tensor:
        """(G, B) float64: 1 where a sample belongs to a group. (1, 1) without groups, the batch as one sample."""
        if self.groups is None:
            return torch.ones(1, 1, dtype=torch.float64, device=x.device)
        if len(self.groups.index) != len(x):
            raise ValueError(
                f"groups: of {len(self.groups.index)} samples, the batch has {len(x)}; forward each view by itself"
            )
        numbers = torch.arange(self.groups.count, device=x.device)
        return (numbers[:, None] == self.groups.index).double()

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            new = new.to(running.dtype)
            running.lerp_(torch.where(new.isfinite(), new, running), self.momentum)

    def extra_repr(self) -> str:
        """As in torch."""
        affine = "scale" if self.bias is None and self.weight is not None else self.weight is not None
        return f"{self.dim}, affine={affine}, eps={self.eps}, momentum={self.momentum}"


def is_batch_norm(module: nn.Module) -> bool:
    """Ours or torch's."""
    return isinstance(module, BatchNorm | nn.modules.batchnorm._BatchNorm)


def synchronised(module: nn.Module) -> nn.Module:
    """Replace torch's batch normalisation by ours, with the same parameters, buffers and names.

    Returns: the module, changed in place; a new one if it is itself a batch normalisation.
    Raises: ValueError if one of them has no running statistics, or a cumulative average.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None or module.momentum is None:
            raise ValueError(f"model: {module} cannot be synchronised over ranks, it needs running statistics and a momentum")
        ours = BatchNorm(module.num_features, module.affine, module.eps, module.momentum).train(module.training)
        ours.weight, ours.bias = module.weight, module.bias
        for name, buffer in module.named_buffers():
            setattr(ours, name, buffer)
        return ours
    for name, child in module._modules.items():
        if child is not None:
            setattr(module, name, synchronised(child))
    return module


@contextmanager
def grouped(module: nn.Module, groups: Groups | None) -> Iterator[None]:
    """Within, each `BatchNorm` of the module normalises each group by itself. A teacher is given as `teacher.network`.

    Args:
        groups: of the samples that pass; None for one group.
    """
    norms = [(norm, norm.groups) for norm in module.modules() if isinstance(norm, BatchNorm)]
    if groups is not None and norms:  # once for all layers, and without waiting for the device
        groups = groups._replace(index=groups.index.to(norms[0][0].running_mean.device, non_blocking=True))
    try:
        for norm, _ in norms:
            norm.groups = groups
        yield
    finally:
        for norm, before in norms:
            norm.groups = before


@contextmanager
def by_batch(module: nn.Module) -> Iterator[None]:
    """Within, each `BatchNorm` of the module uses the statistics of the batch and does not track them, even in eval mode."""
    norms = [(norm, norm.training, norm.momentum) for norm in module.modules() if isinstance(norm, BatchNorm)]
    try:
        for norm, _, _ in norms:
            norm.training, norm.momentum = True, 0.0
        yield
    finally:
        for norm, training, momentum in norms:
            norm.training, norm.momentum = training, momentum


def split_groups(samples: int, count: int, *key: int | str) -> Groups:
    """Equal groups of the batch of all ranks.

    MoCo's shuffled batch normalisation on any number of devices: the student's pass under neighbouring samples,
    `split_groups(B, G)`, the teacher's under others, `split_groups(B, G, "shuffle", clock.step)`, so that a query and its key
    share no statistics that would give the answer away. Statistics are those of the authors' code on G devices.

    Args:
        samples: B, of this rank.
        count: G, groups in the batch of all ranks.
        key: neighbours in the global order share a group without one, others with one, the same on all ranks.
    Raises: ValueError if the samples of all ranks do not make equal groups of at least 2.
    Source: arXiv:1911.05722, section 3.3.
    """
    total = samples * world()
    if count < 1 or total % count or total // count < 2:
        raise ValueError(
            f"groups: {count}, must divide the {total} samples of a micro-batch (of all ranks) into equal groups of at least 2"
        )
    order = permutation(total, *key) if key else torch.arange(total)
    return Groups(order[rank() :: world()] // (total // count), count)
