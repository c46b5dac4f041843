"""Pairs of several kinds of data: each side finds its other among those of the whole batch, on all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import all_sum, gather, gather_rows, rank, world
from mmssl.losses.numerics import same_shape, unit_rows, without_autocast


@without_autocast
def clip(
    z1: Tensor,
    z2: Tensor,
    scale: Tensor | float,
    pairs: Tensor | None = None,
    alike: Tensor | None = None,
    positive: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Symmetric InfoNCE: cross entropy of finding a row's other side, from either side.

    Args:
        z1, z2: (B, D) projections of either side; row i of both is one pair. Normalised here.
        scale: () or (1,), what cosines are multiplied by, one over the temperature; it may be learned.
        pairs: (B,) bool, False for rows that are no pair: they are neither queries nor negatives. All are pairs if None.
        alike: (B, N) bool, True where a row and one of all ranks, in the order of `gather_rows`, have the same content on
            either side. They are no negatives of each other.
        positive: whether they are positives instead of being left out: the loss is then the mean over a row's positives.
    Returns: () the mean over all ranks' pairs is the mean over ranks of this; log N if all are alike, 0 without a pair.
    Raises: ValueError if the shapes differ.
    Source: arXiv:2103.00020, figure 3. Several positives: arXiv:2204.03610, Eq. 3 to 5.
    """
    same_shape(z1=z1, z2=z2)
    z1, z2 = unit_rows(z1), unit_rows(z2)
    wanted, compared = _relations(len(z1), z1.device, pairs, alike, positive, group)

    def found(query: Tensor, keys: Tensor) -> Tensor:
        logits = (query * scale @ keys.T).masked_fill(~compared, torch.finfo(query.dtype).min)
        rows = logits.log_softmax(1).masked_fill(~wanted, 0.0).sum(1) / wanted.sum(1).clamp(min=1)
        return -rows.sum()

    return (found(z1, gather(z2, group)) + found(z2, gather(z1, group))) / (2 * _share(wanted, group))


@without_autocast
def siglip(
    z1: Tensor,
    z2: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    pairs: Tensor | None = None,
    alike: Tensor | None = None,
    positive: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Sigmoid loss: each row of one side with each of the other is a binary choice, pair or not.

    Args:
        bias: () or (1,), added to the scaled cosines; it may be learned.
        z1, z2, scale, pairs, alike, positive: as of `clip`.
    Returns: () sum over all choices, a share for each pair of the batch; the mean over ranks is that of all ranks.
    Raises: ValueError if the shapes differ.
    Source: arXiv:2303.15343, Algorithm 1.
    """
    same_shape(z1=z1, z2=z2)
    z1, z2 = unit_rows(z1), unit_rows(z2)
    wanted, compared = _relations(len(z1), z1.device, pairs, alike, positive, group)
    logits = z1 * scale @ gather(z2, group).T + bias
    choices = F.logsigmoid(torch.where(wanted, logits, -logits)).masked_fill(~compared, 0.0)
    return -choices.sum() / _share(wanted, group)


def _relations(
    rows: int, device: torch.device, pairs: Tensor | None, alike: Tensor | None, positive: bool, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(B, N) bool, which rows of all ranks are positives of those of this one, and which are compared with them at all."""
    own = torch.arange(rows, device=device) * world(group) + rank(group)
    wanted = own[:, None] == torch.arange(rows * world(group), device=device)
    compared = torch.ones_like(wanted)
    if alike is not None:
        wanted, compared = (wanted | alike, compared) if positive else (wanted, wanted | ~alike)
    if pairs is not None:
        both = pairs[:, None] & gather_rows(pairs, group)
        wanted, compared = wanted & both, compared & both
    return wanted, compared


def _share(wanted: Tensor, group: ProcessGroup | None) -> Tensor:
    """() pairs of all ranks, divided by the number of ranks; at least one pair."""
    return all_sum(wanted.any(1).sum(), group).clamp(min=1) / world(group)
