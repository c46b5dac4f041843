"""DINO."""

from __future__ import annotations

import math

from mmssl import losses
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import Above0, AtLeast1, AtLeast2, Natural
from mmssl.methods.normal import DISTILLED
from mmssl.model.encoder import Encoder
from mmssl.parts import Center, DinoHead, Network, Teacher
from mmssl.schedules import Schedule, cosine, linear
from mmssl.types import Batch, Clock, StepOutput


class DINO(JointEmbedding):
    """Caron et al. 2021, arXiv:2104.14294: predict the teacher's centred, sharpened distribution of a full-size view from the
    other views.
    """

    paper, coverage = "arXiv:2104.14294", (10,)
    crops, exports = True, "teacher"
    normal = DISTILLED

    def __init__(
        self,
        encoder: Encoder,
        prototypes: AtLeast2 = 65_536,
        hidden: AtLeast1 = 2048,
        bottleneck: AtLeast1 = 256,
        layers: AtLeast1 = 3,
        head_norm: bool = False,
        unit_gain: bool = True,
        freeze_epochs: Natural = 1,
        temperature: Above0 = 0.1,
        teacher_temperature: Schedule = linear(0.04, 0.07, steps=29, by="epoch"),
        center_momentum: float = 0.9,
        momentum: Schedule = cosine(0.996, 1.0),
    ):
        super().__init__()
        if min(teacher_temperature.start, teacher_temperature.end) <= 0:
            raise ValueError(
                f"teacher_temperature: from {teacher_temperature.start} to {teacher_temperature.end}, must be above 0"
            )
        head = DinoHead(encoder.dim, prototypes, hidden, bottleneck, layers, head_norm, unit_gain, freeze_epochs)
        self.student = Network(encoder=encoder, projector=head)
        self.teacher = Teacher(self.student, momentum, batch_stats=True, lag=1)
        self.center = Center(prototypes, center_momentum)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The teacher sees the two full-size views, the student all; views of one size share batch statistics."""
        targets = self.teacher.project_all(self.teacher.embed_all(batch.views[: self.views]))  # per view (B, K)
        h = self.student.embed_all(batch.views)
        logits = self.student.project_all(h)
        sharp = self.teacher_temperature(clock)
        loss = losses.dino(logits, targets, self.center.value, self.temperature, sharp)
        for one in targets:
            self.center.update(one)
        nats = math.log(logits[0].shape[1])
        use = losses.assignment_entropy(losses.teacher_distribution(targets[0], self.center.value, sharp))
        centred = logits[0] - self.center.value  # what is common to all samples is no target
        return self.output({"dino": loss}, h[0], centred, target_use=use.of_mean / nats, target_entropy=use.mean / nats)
