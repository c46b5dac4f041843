"""Softmax distillation: crops of a sample predict each other's distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mmssl.losses.numerics import above_zero, at_least_fp32


def predict_others(targets: Mapping[int, Tensor], logits: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Cross entropy between the targets of some crops and the predictions from each other crop.

    Args:
        targets: crop -> (B, K) distributions, which are held constant.
        logits: per crop (B, K).
        scale: by which logits are multiplied, the inverse of a temperature.
    Returns: () mean over pairs of a target and another crop, and over this rank's samples, in nats.
    Raises: ValueError if there is no such pair.
    """
    pairs = len(targets) * len(logits) - len(targets)
    if pairs <= 0:
        raise ValueError(f"views: {len(logits)}, there must be another crop to predict a target from")
    total = logits[0].new_zeros((), dtype=at_least_fp32(logits[0]).dtype)
    for crop, scores in enumerate(logits):
        wanted = [at_least_fp32(target.detach()) for other, target in targets.items() if other != crop]
        if wanted:  # one product for all targets of a crop, since the entropy is linear in them
            total = total + _CrossEntropy.apply(at_least_fp32(scores), reduce(torch.add, wanted), scale)
    return total / pairs


class _CrossEntropy(torch.autograd.Function):
    """Mean over rows of -sum(target * log softmax(scale * scores)). One exponential serves value and gradient."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, scale: float) -> Tensor:
        logits = torch.add(scores.amax(1, keepdim=True) * -scale, scores, alpha=scale)
        hit = (target * logits).sum(1)  # no product of matrices, which autocast would make in half precision
        mass = logits.exp_()
        total, share = mass.sum(1), target.sum(1)
        ctx.save_for_backward(mass, target, share / total)
        ctx.scale = scale
        return (share * total.log() - hit).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        mass, target, share = ctx.saved_tensors
        weight = upstream * (ctx.scale / len(target))
        return (mass * (share * weight)[:, None]).addcmul_(target, -weight), None, None


def dino(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    center: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Cross entropy between the teacher's sharpened, centred distributions and the student's, over pairs of different crops.

    Args:
        student_logits: per crop (B, K), the full-size ones first.
        teacher_logits: per full-size crop (B, K), in the same order. No gradient reaches them.
        center: (K,), subtracted from the teacher's logits; update it afterwards.
        student_temperature, teacher_temperature: above 0, the teacher's below the student's.
    Returns: () mean over pairs and this rank's samples, in nats; log K if both are uniform.
    Raises: ValueError if there is only one crop, or more of the teacher's than of the student's.
    Source: arXiv:2104.14294, Eq. 3 and Algorithm 1.
    """
    above_zero(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    if len(teacher_logits) > len(student_logits):
        raise ValueError(f"views: the teacher sees {len(teacher_logits)} crops, the student only {len(student_logits)} of them")
    targets = {i: teacher_distribution(one, center, teacher_temperature) for i, one in enumerate(teacher_logits)}
    return predict_others(targets, student_logits, 1 / student_temperature)


@torch.no_grad()
def teacher_distribution(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """(B, K) centred, sharpened softmax of DINO's teacher, fp32 or higher. logits: (B, K).  center: (K,)."""
    return ((at_least_fp32(logits) - center) * (1 / temperature)).softmax(-1)
