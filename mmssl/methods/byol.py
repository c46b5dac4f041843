"""BYOL."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network, Teacher
from mmssl.schedules import Schedule, cosine
from mmssl.types import Batch, Clock, StepOutput


class BYOL(JointEmbedding):
    """Grill et al. 2020, arXiv:2006.07733: predict the teacher's projection of the other view."""

    paper, coverage = "arXiv:2006.07733", (8,)

    def __init__(self, encoder: Encoder, hidden: AtLeast1 = 4096, dim: AtLeast1 = 256, momentum: Schedule = cosine(0.996, 1.0)):
        super().__init__()
        self.student = Network(encoder=encoder, projector=mlp(encoder.dim, hidden, dim, last_bias=False))
        self.teacher = Teacher(self.student, momentum, batch_stats=True, lag=1)  # departs from the paper: starts as a copy
        self.predictor = mlp(dim, hidden, dim, last_bias=False)  # outside student: the teacher has none

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """One pass for each view, with batch statistics of its own."""
        h = [self.student.embed(view) for view in batch.views]
        z = [self.student.project(one) for one in h]
        p1, p2 = (self.predictor(one) for one in z)
        t1, t2 = (self.teacher.project(self.teacher.embed(view)) for view in batch.views)
        terms = {"prediction": losses.cosine_regression(p1, t2) + losses.cosine_regression(p2, t1)}
        return self.output(terms, h[0], z[0])
