"""Instance discrimination with a memory bank."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding, Negatives
from mmssl.methods.method import Above0, AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Memory, Network
from mmssl.types import Batch, Clock, StepOutput


class InstanceDiscrimination(JointEmbedding):
    """Wu et al. 2018, arXiv:1805.01978: each sample is a class, whose direction is what earlier passes remember of it.

    Departs from the paper: the softmax over all samples itself, where it estimates the sum from 4096 drawn ones.
    """

    paper, coverage = "arXiv:1805.01978", (7,)
    views, slots = 1, True

    def __init__(
        self,
        encoder: Encoder,
        dim: AtLeast1 = 128,
        temperature: Above0 = 0.07,
        memory_momentum: float = 0.5,
        negatives: Negatives = Negatives(),
    ):
        super().__init__()
        self.student = Network(encoder=encoder, projector=mlp(encoder.dim, dim))
        self.temperature, self.memory_momentum, self.dim, self.estimator = temperature, memory_momentum, dim, negatives.build()
        self.memory = Memory(0, dim, memory_momentum)

    def attach(self, samples: int, seed: int) -> None:
        """One slot a sample."""
        self.memory = Memory(samples, self.dim, self.memory_momentum, seed)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Find the sample's own slot."""
        h = self.student.embed(batch.views[0])
        z = self.student.project(h)
        loss = losses.instance_discrimination(z, self.memory.rows, batch.index, self.temperature, self.estimator)
        self.memory.write(batch.index, z)
        return self.output({"instance": loss}, h, z)
