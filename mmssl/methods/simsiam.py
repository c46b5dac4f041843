"""SimSiam."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network
from mmssl.types import Batch, Clock, StepOutput


class SimSiam(JointEmbedding):
    """Chen and He 2020, arXiv:2011.10566: predict the projection of the other view, which is held constant; no teacher."""

    paper, coverage = "arXiv:2011.10566", (9,)

    def __init__(self, encoder: Encoder, dim: AtLeast1 = 2048, layers: AtLeast1 = 3, hidden: AtLeast1 = 512):
        super().__init__()
        widths = (encoder.dim, *(dim,) * layers)
        self.student = Network(encoder=encoder, projector=mlp(*widths, bias=False, last_norm="plain"))
        self.predictor = mlp(dim, hidden, dim, bias=False, last_bias=True)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """One pass for each view, with batch statistics of its own."""
        h = [self.student.embed(view) for view in batch.views]
        z1, z2 = (self.student.project(one) for one in h)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        both = losses.cosine_regression(p1, z2) + losses.cosine_regression(p2, z1)  # 4 - 2 (cos + cos)
        return self.output({"prediction": both / 4 - 1}, h[0], z1)
