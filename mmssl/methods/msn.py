"""Masked siamese networks."""

from __future__ import annotations

import math

import torch
from torch import nn

from mmssl import losses
from mmssl.methods.families import JointEmbedding, unit
from mmssl.methods.method import Above0, AtLeast0, AtLeast1, AtLeast2, Natural, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network, Prototypes, Teacher
from mmssl.schedules import Schedule, linear
from mmssl.types import Batch, Clock, StepOutput


class MSN(JointEmbedding):
    """Assran et al. 2022, arXiv:2204.07141: what is left of a view, and smaller views, take over the prototypes that
    the teacher assigns to another, whole view.

    Departs from the authors' code: each sample has a mask of its own, where theirs is one for the batch.
    """

    paper, coverage = "arXiv:2204.07141", (91,)
    family, modalities, exports = "masked", ("vision",), "teacher"
    masks = drops = crops = True
    normal = (
        Normal("prototype_use", 0.1, "collapsed: one prototype, or a few, takes all; raise method.me_max", samples=8),
        Normal("prediction_entropy", 0.0, "", 0.995, "collapsed: assignments are uniform; lower method.sharpen"),
    )

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 2048,
        dim: AtLeast1 = 256,
        prototypes: AtLeast2 = 1024,
        temperature: Above0 = 0.1,
        sharpen: Above0 = 0.25,
        iterations: Natural = 3,
        me_max: AtLeast0 = 1.0,
        entropy: AtLeast0 = 0.0,
        momentum: Schedule = linear(0.996, 0.9992),
    ):
        """Iterations are those of Sinkhorn, 0 for none; me_max and entropy weigh terms.

        The momentum of the paper goes to 1 in 1.25 times the run, and is 0.9992 at its end.
        """
        super().__init__()
        projector = mlp(encoder.dim, hidden, hidden, dim, activation="gelu")
        self.student = Network(encoder=encoder, projector=projector)
        self.teacher = Teacher(self.student, momentum, batch_stats=True, lag=1)
        self.prototypes = Prototypes(dim, prototypes)
        nn.init.uniform_(self.prototypes.weight, -(dim**-0.5), dim**-0.5)  # lengths set how fast directions turn
        self.temperature, self.sharpen, self.iterations = temperature, sharpen, iterations
        self.me_max, self.entropy = me_max, entropy

    def check_batch(self, samples: int) -> list[str]:
        """Sinkhorn spreads samples evenly over prototypes, which takes more samples than prototypes."""
        notes, count = super().check_batch(samples), len(self.prototypes.weight)
        if self.iterations and samples < count:
            notes.append(
                f"method.prototypes: {count}, Sinkhorn spreads the {samples} samples of a micro-batch over all of them; take "
                "fewer, a larger batch, or method.iterations=0"
            )
        return notes

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The teacher sees the first view, the student the rest: batch statistics are those of views of one size."""
        target, anchor, *small = batch.views
        if anchor.mask is None:
            raise ValueError("views.mask: msn needs masks")
        samples, encoder = len(batch.index), self.student.encoder
        h = encoder.pool(encoder(anchor, anchor.mask))  # (M*B, D)
        z = list(self.student.project(h).unflatten(0, (samples, -1)).unbind(1))  # M of (B, dim)
        z = unit(z + (self.student.project_all(self.student.embed_all(small)) if small else []))
        scores = self.prototypes(torch.cat(z)).split(samples)  # per anchor (B, K)
        wanted = self.prototypes(*unit([self.teacher.project(self.teacher.embed(target))]))
        found = losses.msn(scores, wanted, self.temperature, self.sharpen, self.iterations)
        terms = {"assignment": found.cross_entropy, "me_max": self.me_max * found.me_max}
        if self.entropy:
            terms["entropy"] = self.entropy * found.entropy
        nats = math.log(scores[0].shape[1])
        health = {
            "prototype_use": 1 - found.me_max.detach() / nats,
            "prediction_entropy": found.entropy.detach() / nats,
            "masked_share": anchor.mask.hidden.float().mean(),
        }
        return self.output(terms, h.unflatten(0, (samples, -1)).mean(1), z[0], **health)
