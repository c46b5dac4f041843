"""Contrast: a query finds its positive among negatives.

    loss = -near + log(exp(near) + sum of exp(far))

with `near` and `far` the cosines of a query with its positive and its negatives, over the temperature. Techniques differ in
which negatives they look at, what they make of them, and how these enter the sum. Those are pure functions of `Logits`:

    selectors and mixers: Logits -> Logits      put -inf where a negative is left out; add or change logits
    estimators:           Logits -> (B,) loss   `softmax`, `decoupled`, `hard(...)`

and every loss here takes an estimator, which may be a `chain` of selectors and mixers before one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import gather, rank, world
from mmssl.losses.numerics import above_zero, same_shape, unit_rows, without_autocast

BLOCK = 2**23  # logits held at a time: 32 MiB in fp32


class Logits(NamedTuple):
    """B queries, perhaps a part of the batch, with all they are compared with. Vectors have length 1."""

    near: Tensor  # (B,) cosine of query and positive over temperature
    far: Tensor  # (B, K) the same for negatives, -inf where one is left out
    query: Tensor  # (B, D)
    negatives: Tensor  # (K, D)
    temperature: float


Stage = Callable[[Logits], Logits]
Estimator = Callable[[Logits], Tensor]


# Losses -------------------------------------------------------------------------------------------------------------


def softmax(logits: Logits) -> Tensor:
    """Cross entropy of the positive among all: the estimator of InfoNCE. Returns: (B,)."""
    return -F.logsigmoid(logits.near - logits.far.logsumexp(1))  # keeps the digits of small losses


@without_autocast
def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float = 0.5, estimator: Estimator = softmax, group: ProcessGroup | None = None
) -> Tensor:
    """Cross entropy of finding a sample's other view among all views of all samples of the batch, on all ranks.

    Computed in blocks of anchors: no matrix of all with all is held.

    Args:
        z1, z2: (B, D) projections; row i of both is the same sample. Normalised here.
        temperature: above 0.
        estimator: how the other samples' views enter.
    Returns: () mean over this rank's 2B anchors, in nats; log(2N - 1) if all N samples of the batch are alike.
    Raises: ValueError if the shapes differ, or if there is one sample only.
    Source: arXiv:2002.05709, Eq. 1. The authors' code has twice this: the sum of the means over each view.
    """
    same_shape(z1=z1, z2=z2)
    views = unit_rows(torch.stack((z1, z2), 1))  # (B, 2, D)
    everyone = gather(views, group).flatten(0, 1)  # (2N, D), the views of a sample adjacent
    first = 2 * _own_samples(len(z1), z1.device, group)
    own = torch.stack((first, first + 1), 1).repeat_interleave(2, 0)  # (2B, 2): places of a sample's views
    partners = torch.stack((first + 1, first), 1).flatten()
    anchors = everyone if world(group) == 1 else views.flatten(0, 1)
    return _contrast(anchors, partners, everyone, own, temperature, estimator)


@without_autocast
def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    left_out: Tensor | None = None,
    estimator: Estimator = softmax,
) -> Tensor:
    """Cross entropy of finding the positive among it and the vectors of a queue or a memory.

    Args:
        query, positive: (B, D).  negatives: (K, D), the same for all queries. All are normalised here.
        temperature: above 0.
        left_out: (B, K) bool, True where one of `negatives` is no negative of the query, such as the sample's own older key;
            or (B, C) int64, their positions.
        estimator: how they enter.
    Returns: () mean over this rank's queries, in nats; log(K + 1) if all vectors are alike.
    Raises: ValueError if the shapes differ.
    Source: arXiv:1911.05722, Eq. 1; arXiv:1807.03748, Eq. 4.
    """
    same_shape(query=query, positive=positive)
    return _contrast(unit_rows(query), unit_rows(positive), unit_rows(negatives), left_out, temperature, estimator)


@without_autocast
def in_batch_info_nce(
    query: Tensor, keys: Tensor, temperature: float, estimator: Estimator = softmax, group: ProcessGroup | None = None
) -> Tensor:
    """Cross entropy of finding a query's own key among those of the whole batch, on all ranks. One direction.

    Args:
        query, keys: (B, D); row i of both is the same sample. Normalised here.
        temperature: above 0.
        estimator: how the other samples' keys enter.
    Returns: () mean over this rank's queries, in nats; log N if all N samples of the batch are alike.
    Raises: ValueError if the shapes differ, or if there is one sample only.
    Source: arXiv:1807.03748, Eq. 4.
    """
    same_shape(query=query, keys=keys)
    query, keys = unit_rows(query), unit_rows(keys)
    own = _own_samples(len(query), query.device, group)
    return _contrast(query, own, gather(keys, group), own[:, None], temperature, estimator)


def batch_contrast(
    query: Tensor, keys: Tensor, temperature: float, estimator: Estimator = softmax, group: ProcessGroup | None = None
) -> Tensor:
    """MoCo v3's `ctr`: `in_batch_info_nce` times 2 * temperature, so that gradients depend less on the temperature.

    Source: arXiv:2104.02057, Algorithm 1.
    """
    return 2 * temperature * in_batch_info_nce(query, keys, temperature, estimator, group)


def instance_discrimination(
    z: Tensor, memory: Tensor, index: Tensor, temperature: float = 0.07, estimator: Estimator = softmax
) -> Tensor:
    """Cross entropy of finding a sample's own slot among those of all samples of the data set.

    Args:
        z: (B, D) projections.  memory: (samples, D), what earlier epochs left there.  index: (B,) int64, own slots.
        temperature: above 0.
        estimator: how the other slots enter.
    Returns: () mean over this rank's samples, in nats.
    Source: arXiv:1805.01978, Eq. 2: the softmax itself, which the paper estimates from a sample of the slots.
    """
    return info_nce(z, memory[index], memory, temperature, index[:, None], estimator)


# Estimators ---------------------------------------------------------------------------------------------------------


def decoupled(logits: Logits) -> Tensor:
    """DCL: the positive leaves the denominator, so that an easy one no longer shrinks the gradient. Returns: (B,), of any sign.

    Source: arXiv:2110.06848.
    """
    return logits.far.logsumexp(1) - logits.near


def hard(beta: float = 1.0, prior: float = 0.1, detach: bool = False) -> Estimator:
    """HCL: near negatives weigh more, and as many as are expected to be of the query's class are subtracted again.

    Args:
        beta: weights are proportional to exp(beta * logit); 0 is the debiased loss.
        prior: probability that a negative is of the query's class, in [0, 1); 0 with beta 0 is `softmax`.
        detach: hold the weights constant. The authors' code does not.
    Raises: ValueError if beta or prior is out of range.
    Source: arXiv:2010.04592; with beta 0 arXiv:2007.00224; the estimate is clamped as in the authors' code.
    """
    if beta < 0:
        raise ValueError(f"beta: {beta}, must be at least 0")
    if not 0 <= prior < 1:
        raise ValueError(f"prior: {prior}, must be at least 0 and below 1")

    def estimate(logits: Logits) -> Tensor:
        near, far = logits.near, logits.far
        left_out = far == -torch.inf
        count = (~left_out).sum(1).to(near.dtype)
        weights = (beta * far.masked_fill(left_out, 0.0)).masked_fill(left_out, -torch.inf).softmax(1)
        weights = count[:, None] * (weights.detach() if detach else weights)  # mean 1
        least = -1 / logits.temperature  # of a logit
        peak = torch.maximum(near, far.amax(1)).detach().clamp(min=least)  # keeps exponentials within range
        pulled, pushed = (near - peak).exp(), (weights * (far - peak[:, None]).exp()).sum(1)
        pushed = (pushed - prior * count * pulled) / (1 - prior)
        pushed = torch.maximum(pushed, count * (least - peak).exp())
        return (pulled + pushed).log() + peak - near

    return estimate


def debiased(prior: float = 0.1) -> Estimator:
    """As many negatives as are expected to be of the query's class are subtracted. Source: arXiv:2007.00224."""
    return hard(0.0, prior)


def chain(*stages: Stage, estimator: Estimator = softmax) -> Estimator:
    """Selectors and mixers in that order, then the estimator."""

    def estimate(logits: Logits) -> Tensor:
        for stage in stages:
            logits = stage(logits)
        return estimator(logits)

    return estimate


# The computation ----------------------------------------------------------------------------------------------------


def _own_samples(count: int, device: torch.device, group: ProcessGroup | None) -> Tensor:
    """(B,) global positions of this rank's samples, as `gather` orders them."""
    if count * world(group) < 2:
        raise ValueError("train.global_batch: 1, a contrast within the batch needs at least 2 samples")
    return torch.arange(count, device=device) * world(group) + rank(group)


def _contrast(
    query: Tensor, positive: Tensor, negatives: Tensor, left_out: Tensor | None, temperature: float, estimator: Estimator
) -> Tensor:
    """() mean over queries. Arguments as in `info_nce`, of length 1; `positive` may be (B,) int64, places in `negatives`."""
    above_zero(temperature=temperature)

    def loss(query: Tensor, positive: Tensor, negatives: Tensor, left_out: Tensor | None) -> Tensor:
        if query is negatives:
            far = _Gram.apply(query, 1 / temperature)
        else:
            far = torch.addmm(query.new_zeros(1), query, negatives.T, beta=0, alpha=1 / temperature)
        if positive.dtype == torch.int64:
            # Not `gather`, which would keep what is changed below.
            near = far[torch.arange(len(far), device=far.device), positive]
        else:
            near = (query * positive).sum(1) / temperature
        if left_out is not None and left_out.dtype == torch.bool:
            far = far.masked_fill_(left_out, -torch.inf)
        elif left_out is not None:
            far = far.scatter_(1, left_out, -torch.inf)
        return estimator(Logits(near, far, query, negatives, temperature))

    rows = max(1, BLOCK // len(negatives))
    if len(query) <= rows:
        return loss(query, positive, negatives, left_out).mean()
    return _MeanOverBlocks.apply(loss, rows, left_out, query, positive, negatives)  # type: ignore[return-value]


class _Gram(torch.autograd.Function):
    """factor * x @ x.T, whose gradient takes one product instead of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return torch.addmm(x.new_zeros(1), x, x.T, beta=0, alpha=factor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return (upstream + upstream.T).mul_(ctx.factor) @ x, None


class _MeanOverBlocks(torch.autograd.Function):
    """Mean over queries, whose gradient is found block by block in the same pass: nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], rows: int, left_out: Tensor | None, *vectors: Tensor) -> Tensor:
        query, positive, negatives = vectors
        wanted = ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(x) if want else None for x, want in zip(vectors, wanted)]
        negatives = negatives.detach().requires_grad_(wanted[2])
        total = query.new_zeros(())
        for block in (slice(start, start + rows) for start in range(0, len(query), rows)):
            own = [x[block].detach().requires_grad_(want) for x, want in zip((query, positive), wanted)]
            with torch.enable_grad():
                value = loss(*own, negatives, None if left_out is None else left_out[block]).sum() / len(query)
            total += value.detach()
            if any(wanted):
                inputs = [x for x in (*own, negatives) if x.requires_grad]
                found = iter(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))
                for gradient, place in zip(gradients, (block, block, slice(None))):
                    if gradient is not None:
                        gradient[place] += next(found)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, None, *(None if gradient is None else upstream * gradient for gradient in ctx.saved_tensors)
