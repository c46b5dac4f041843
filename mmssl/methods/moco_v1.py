"""MoCo v1."""

from __future__ import annotations

from mmssl.methods.families import MomentumContrast, Negatives
from mmssl.methods.method import Above0, AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.schedules import Schedule, constant


class MoCoV1(MomentumContrast):
    """He et al. 2019, arXiv:1911.05722: a linear projection, and a queue of the teacher's keys."""

    paper, coverage = "arXiv:1911.05722", (4, 7)

    def __init__(
        self,
        encoder: Encoder,
        dim: AtLeast1 = 128,
        temperature: Above0 = 0.07,
        queue: AtLeast1 = 65_536,
        momentum: Schedule = constant(0.999),
        split: AtLeast1 = 8,
        negatives: Negatives = Negatives(),
    ):
        super().__init__(encoder, mlp(encoder.dim, dim), dim, temperature, queue, momentum, split, negatives)
