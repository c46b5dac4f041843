"""Masked views predict what a teacher makes of the whole: assignments (MSN), tokens (iBOT), features (I-JEPA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import sum_ranks, world
from mmssl.losses.clustering import sinkhorn
from mmssl.losses.distillation import teacher_distribution
from mmssl.losses.masking import counted
from mmssl.losses.numerics import above_zero, at_least_fp32, same_shape
from mmssl.losses.prediction import data2vec_regression, normalise
from mmssl.types import Mask


class MSN(NamedTuple):
    """Terms without their weights, which are 1, 1 and 0 in the paper; (), in nats."""

    cross_entropy: Tensor  # mean over this rank's anchors
    me_max: Tensor  # log K less the entropy of the mean assignment over all ranks: 0 if all prototypes are used alike
    entropy: Tensor  # mean over this rank's anchors of the entropy of their assignment


def msn(
    anchors: Sequence[Tensor],
    target: Tensor,
    temperature: float = 0.1,
    sharpen: float = 0.25,
    iterations: int = 3,
    group: ProcessGroup | None = None,
) -> MSN:
    """Masked and small views of a sample take over the assignment to prototypes of its whole view.

    Args:
        anchors: per view (B, K) cosines of samples and prototypes, by the student.
        target: (B, K) the same by the teacher; held constant.
        temperature: of both softmaxes, above 0.
        sharpen: targets are p^(1 / sharpen), above 0, then sum to 1.
        iterations: of Sinkhorn-Knopp over the targets of all ranks, which starts from assignments that sum to 1; 0 for none.
    Raises: ValueError if the shapes differ, or if there is no anchor.
    Source: arXiv:2204.07141, Eq. 1; Sinkhorn as in the authors' code.
    """
    above_zero(temperature=temperature, sharpen=sharpen)
    if not anchors:
        raise ValueError("views: no anchor, there must be a view to predict the target from")
    same_shape(target=target, **{f"anchors[{i}]": one for i, one in enumerate(anchors)})
    sharp = (at_least_fp32(target.detach()) / (temperature * sharpen)).log_softmax(1)  # softmax, power and norm in one
    wanted = sinkhorn(sharp, eps=1.0, iterations=iterations, group=group) if iterations else sharp.exp()
    logs = (torch.stack([at_least_fp32(one) for one in anchors]) / temperature).log_softmax(2)  # (views, B, K)
    p = logs.exp()
    mean = sum_ranks(p.mean((0, 1)), group) / world(group)  # (K,)
    me_max = math.log(len(mean)) + (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
    return MSN(-(wanted * logs).sum(2).mean(), me_max, -(p * logs).sum(2).mean())


def ibot_tokens(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    mask: Mask | Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Cross entropy between the teacher's distribution of a token that it sees and the student's, which does not see it.

    Args:
        student_logits: (R, L, K), a row for each crop of each sample; or of those tokens only which `mask` is about.
        teacher_logits: (R, L, K) of the same tokens. No gradient reaches them.
        center: (K,), subtracted from the teacher's logits; update it afterwards, by all tokens.
        mask: R rows, or (R, L) bool, True = masked. A row may hide nothing.
        student_temperature, teacher_temperature: above 0, the teacher's below the student's.
    Returns: () mean over this rank's rows of the mean over their masked tokens, in nats; a row that hides nothing counts as 0.
    Raises: ValueError if the shapes differ.
    Source: arXiv:2111.07832, Eq. 2; the means as in the authors' code.
    """
    above_zero(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    target = teacher_distribution(teacher_logits, center, teacher_temperature)
    nats = -(target * (at_least_fp32(student_logits) / student_temperature).log_softmax(-1)).sum(-1)  # (R, L)
    hidden = counted(nats, mask)
    return (nats.masked_fill(~hidden, 0.0).sum(1) / hidden.sum(1).clamp(min=1)).mean()


def ijepa(prediction: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """Smooth L1 between predicted features and the teacher's, layer-normed without weights.

    Args:
        prediction: (R, n, D), or (M*R, n, D) for M predictions of the same features, adjacent.
        target: (R, n, D) the teacher's features of the same places; held constant, normalised here.
        beta: where the error becomes linear; 0 for the squared error.
    Returns: () mean over this rank's places and channels.
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2301.08243, section 3, with smooth L1 as in the authors' code, where the paper has the squared error.
    """
    return data2vec_regression(prediction, normalise(target.detach(), "layer"), scale=1 / prediction.shape[-1], beta=beta)
