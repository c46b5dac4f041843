"""Instance discrimination with a memory bank."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmssl import losses
from mmssl.methods.families import JointEmbedding, Negatives, at_start
from mmssl.methods.method import Above0, AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Memory, Network
from mmssl.types import Batch, Clock, StepOutput, View


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
        memory_start: Literal["drawn", "embedded"] = "drawn",
        negatives: Negatives = Negatives(),
    ):
        """memory_start: drawn at random, or what the untrained network makes of each sample. Drawn slots teach nothing before
        the second pass, and the first one drives all samples away from those that were written; a run of a few passes should
        not begin so.
        """
        super().__init__()
        self.student = Network(encoder=encoder, projector=mlp(encoder.dim, dim))
        self.temperature, self.memory_momentum, self.dim, self.estimator = temperature, memory_momentum, dim, negatives.build()
        self.memory, self.memory_start = Memory(0, dim, memory_momentum), memory_start

    def attach(self, samples: int, seed: int) -> None:
        """One slot a sample."""
        self.memory = Memory(samples, self.dim, self.memory_momentum, seed)

    def needs_description(self, clock: Clock) -> bool:
        """Before the first pass, if the memory starts with embeddings."""
        return self.memory_start == "embedded" and clock.epoch == 0

    def describe(self, view: View) -> Tensor:
        """(B, dim) projections of length 1."""
        return at_start(self.student, view)

    @torch.no_grad()
    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """Fill the memory."""
        super().on_epoch(clock)
        if described is not None:
            self.memory.rows.copy_(described)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Find the sample's own slot."""
        h = self.student.embed(batch.views[0])
        z = self.student.project(h)
        loss = losses.instance_discrimination(z, self.memory.rows, batch.index, self.temperature, self.estimator)
        self.memory.write(batch.index, z)
        return self.output({"instance": loss}, h, z)
