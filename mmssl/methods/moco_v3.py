"""MoCo v3."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import Above0, AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network, Teacher
from mmssl.schedules import Schedule, cosine
from mmssl.types import Batch, Clock, StepOutput


class MoCoV3(JointEmbedding):
    """Chen et al. 2021, arXiv:2104.02057: find the teacher's key of the other view among those of the batch.

    The paper freezes the random patch projection of a transformer: `model.freeze_features`.
    """

    paper, coverage = "arXiv:2104.02057", (6,)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 4096,
        dim: AtLeast1 = 256,
        layers: AtLeast1 = 3,
        temperature: Above0 = 0.2,
        predictor_norm: bool = True,
        momentum: Schedule = cosine(0.99, 1.0),
    ):
        super().__init__()
        widths = (encoder.dim, *(hidden,) * (layers - 1), dim)
        self.student = Network(encoder=encoder, projector=mlp(*widths, bias=False, last_norm="plain"))
        self.teacher = Teacher(self.student, momentum, batch_stats=True)
        self.predictor = mlp(dim, hidden, dim, bias=False, last_norm="plain" if predictor_norm else "none")
        self.temperature = temperature

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """One pass for each view, with batch statistics of its own."""
        h = [self.student.embed(view) for view in batch.views]
        z = [self.student.project(one) for one in h]
        q1, q2 = (self.predictor(one) for one in z)
        k1, k2 = (self.teacher.project(self.teacher.embed(view)) for view in batch.views)
        terms = {"contrast": losses.batch_contrast(q1, k2, self.temperature) + losses.batch_contrast(q2, k1, self.temperature)}
        return self.output(terms, h[0], z[0])
