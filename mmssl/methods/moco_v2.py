"""MoCo v2."""

from __future__ import annotations

from mmssl.methods.families import MomentumContrast, Negatives
from mmssl.methods.method import Above0, AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.schedules import Schedule, constant


class MoCoV2(MomentumContrast):
    """Chen et al. 2020, arXiv:2003.04297: MoCo with an MLP, blur, and a cosine schedule."""

    paper, coverage = "arXiv:2003.04297", (5,)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 2048,
        dim: AtLeast1 = 128,
        temperature: Above0 = 0.2,
        queue: AtLeast1 = 65_536,
        momentum: Schedule = constant(0.999),
        split: AtLeast1 = 8,
        negatives: Negatives = Negatives(),
    ):
        projector = mlp(encoder.dim, hidden, dim, norm=False)
        super().__init__(encoder, projector, dim, temperature, queue, momentum, split, negatives)
