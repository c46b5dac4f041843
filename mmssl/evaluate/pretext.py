"""Questions about samples that need no label: whether features tell what was done to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmssl import random
from mmssl.evaluate.features import Sets, embed
from mmssl.evaluate.linear import linear_accuracy

SAMPLES, LEAST = 1000, 10  # that are asked at most, and without which nothing is said


def pretext(sets: Sets, run: Any, seed: int = 0) -> dict[str, float]:
    """How often a linear classifier on frozen features finds what was done to samples, 0..1.

    It learns from four fifths of at most a thousand samples of the training split, each in all its versions, and is asked about
    the other fifth.

    Args:
        run: flat batch -> `embedding` (B, D). A collective if the model is sharded.
    Returns: of each question of the modality, such as `rotation` (four ways, 0.25 by chance) and `order`; {} if there are fewer
        than ten samples.
    Source: rotation as in arXiv:2009.07724, SelfAugment.
    """
    few = sets.train.some(random.permutation(len(sets.train.data), seed, "pretext")[:SAMPLES])
    plain = embed(few, run)
    found = {}
    for name, changes in few.data.kind.pretexts.items():
        accuracy = told([plain, *(embed(few.changed(change), run) for change in changes)], seed)
        found |= {} if accuracy is None else {name: accuracy}
    return found


def told(versions: list[dict[str, Tensor]], seed: int) -> float | None:
    """Accuracy on the samples that were held out; None if there are fewer than ten.

    Args:
        versions: of each kind of change `embedding` (N, D) and `index` (N,); a sample that lacks one is left out.
    """
    common = set.intersection(*({*one["index"].tolist()} for one in versions))
    if len(common) < LEAST:
        return None
    order = torch.tensor(sorted(common))[random.permutation(len(common), seed, "pretext-test")]
    tests, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def rows(wanted: Tensor) -> tuple[Tensor, Tensor]:
        parts = [one["embedding"][torch.isin(one["index"], wanted)] for one in versions]
        return torch.cat(parts), torch.arange(len(parts)).repeat_interleave(len(wanted))

    return linear_accuracy(*rows(rest), *rows(tests))
