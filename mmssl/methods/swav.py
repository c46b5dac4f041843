"""SwAV."""

from __future__ import annotations

import math
from typing import Any

import torch

from mmssl import losses
from mmssl.methods.families import JointEmbedding, unit
from mmssl.methods.method import Above0, AtLeast1, AtLeast2, Natural, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network, Prototypes, Queue
from mmssl.types import Batch, Clock, StepOutput


class SwAV(JointEmbedding):
    """Caron et al. 2020, arXiv:2006.09882: predict the balanced cluster code of one view from the other views."""

    paper, coverage = "arXiv:2006.09882", (14, 15)
    crops = True
    normal = (
        Normal("code_use", 0.1, "collapsed: one prototype, or a few, takes all", samples=8),
        Normal("prediction_entropy", 0.0, "", 0.995, "predictions are uniform: freeze prototypes longer or lower method.eps"),
    )

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 2048,
        dim: AtLeast1 = 128,
        prototypes: AtLeast2 = 3000,
        temperature: Above0 = 0.1,
        eps: Above0 = 0.05,
        iterations: AtLeast1 = 3,
        freeze_epochs: Natural = 1,
        queue: Natural = 0,
        queue_from_epoch: Natural = 15,
    ):
        super().__init__()
        self.student = Network(encoder=encoder, projector=mlp(encoder.dim, hidden, dim))
        self.prototypes = Prototypes(dim, prototypes, freeze_epochs)
        self.queues: Any = torch.nn.ModuleList(Queue(queue, dim, newest_first=True, seed=i) for i in range(2 if queue else 0))
        self.temperature, self.eps, self.iterations = temperature, eps, iterations
        self.queue_from_epoch = queue_from_epoch if queue else 0

    def check_batch(self, samples: int) -> list[str]:
        """Codes are spread evenly over prototypes, which takes more samples than prototypes, with those of the queue."""
        notes = super().check_batch(samples)
        for queue in self.queues:
            queue.check_batch(samples)
            queue.read_ids(own=True)  # raises if ranks cannot have equal shares
        spread, count = samples + (len(self.queues[0].rows) if self.queues else 0), len(self.prototypes.weight)
        if spread < count:
            notes.append(
                f"method.prototypes: {count}, codes are spread over the {spread} samples of a micro-batch and of the queue; "
                "take fewer, or a longer method.queue"
            )
        return notes

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Codes of the two full-size views. Views of one size share batch statistics, in the projector all views do."""
        h = self.student.embed_all(batch.views)
        z = unit(self.student.project_all(h))
        scores = list(self.prototypes(torch.cat(z)).split([len(one) for one in z]))  # per view (B, K)
        codes = {}
        for view in range(self.views):
            past = scores[view][:0]
            if self.queues and clock.epoch >= self.queue_from_epoch:
                queue: Queue = self.queues[view]
                past = self.prototypes(queue.read(own=True)) if queue.is_full else past
                queue.push(z[view], batch.index)
            found = losses.sinkhorn(torch.cat([past, scores[view]]).detach(), self.eps, self.iterations)
            codes[view] = found[len(past) :]
        terms = {"swap": losses.swav(scores, codes, self.temperature)}
        nats = math.log(scores[0].shape[1])
        use = losses.assignment_entropy(codes[0]).of_mean / nats
        sure = losses.assignment_entropy((scores[0].detach() / self.temperature).softmax(-1)).mean / nats
        return self.output(terms, h[0], z[0], code_use=use, prediction_entropy=sure)
