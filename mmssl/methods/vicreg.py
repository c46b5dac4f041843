"""VICReg."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import AtLeast0, AtLeast1, AtLeast2, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network
from mmssl.types import Batch, Clock, StepOutput


class VICReg(JointEmbedding):
    """Bardes et al. 2021, arXiv:2105.04906: views agree, dimensions vary, and no two of them vary together."""

    paper, coverage = "arXiv:2105.04906", (17,)
    normal = (Normal("spread", 0.1, "collapsed: projections shrink to a point"),)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 8192,
        dim: AtLeast2 = 8192,
        invariance: AtLeast0 = 25.0,
        variance: AtLeast0 = 25.0,
        covariance: AtLeast0 = 1.0,
    ):
        super().__init__()
        self.student = Network(encoder=encoder, projector=mlp(encoder.dim, hidden, hidden, dim, last_bias=False))
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """One pass for each view, with batch statistics of its own."""
        h = [self.student.embed(view) for view in batch.views]
        z1, z2 = (self.student.project(one) for one in h)
        terms = losses.vicreg(z1, z2)._asdict()
        weighted = {name: weight * terms[name] for name, weight in self.weights.items()}
        return self.output(weighted, h[0], z1, spread=1 - terms["variance"].detach())  # standard deviation, counted up to 1
