"""Barlow Twins."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import AtLeast0, AtLeast1, AtLeast2
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network
from mmssl.types import Batch, Clock, StepOutput


class BarlowTwins(JointEmbedding):
    """Zbontar et al. 2021, arXiv:2103.03230: the correlation matrix between two views becomes the identity."""

    paper, coverage = "arXiv:2103.03230", (16,)

    def __init__(self, encoder: Encoder, hidden: AtLeast1 = 8192, dim: AtLeast2 = 8192, off_diagonal: AtLeast0 = 0.0051):
        super().__init__()
        self.student = Network(encoder=encoder, projector=mlp(encoder.dim, hidden, hidden, dim, bias=False))
        self.off_diagonal = off_diagonal

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """One pass for each view, with batch statistics of its own."""
        h = [self.student.embed(view) for view in batch.views]
        z1, z2 = (self.student.project(one) for one in h)
        return self.output({"correlation": losses.barlow_twins(z1, z2, self.off_diagonal)}, h[0], z1)
