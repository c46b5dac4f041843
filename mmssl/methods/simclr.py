"""SimCLR."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding, Negatives
from mmssl.methods.method import Above0, AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network
from mmssl.types import Batch, Clock, StepOutput


class SimCLR(JointEmbedding):
    """Chen et al. 2020, arXiv:2002.05709: two views of a sample agree, every other sample is a negative."""

    paper, coverage = "arXiv:2002.05709", (2,)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 2048,
        dim: AtLeast1 = 128,
        temperature: Above0 = 0.1,
        negatives: Negatives = Negatives(),
    ):
        super().__init__()
        projector = mlp(encoder.dim, hidden, dim, bias=False, last_norm="scale", std=0.01)
        self.student = Network(encoder=encoder, projector=projector)
        self.temperature, self.estimator = temperature, negatives.build()

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Both views in one pass, so that they share batch statistics."""
        h = self.student.embed_all(batch.views)
        z1, z2 = self.student.project_all(h)
        return self.output({"nt_xent": losses.nt_xent(z1, z2, self.temperature, self.estimator)}, h[0], z1)
