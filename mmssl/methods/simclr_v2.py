"""SimCLR v2."""

from __future__ import annotations

from mmssl import losses
from mmssl.methods.families import JointEmbedding, Negatives
from mmssl.methods.method import Above0, AtLeast1
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network
from mmssl.types import Batch, Clock, StepOutput


class SimCLRv2(JointEmbedding):
    """Chen et al. 2020, arXiv:2006.10029: SimCLR with a deeper projector, whose first layer is kept for fine-tuning.

    The exported encoder ends before the projector; its layers are in `heads/`.
    """

    paper, coverage = "arXiv:2006.10029", (3,)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 2048,
        dim: AtLeast1 = 128,
        layers: AtLeast1 = 3,
        temperature: Above0 = 0.1,
        negatives: Negatives = Negatives(),
    ):
        super().__init__()
        widths = (encoder.dim, *(hidden,) * (layers - 1), dim)
        self.student = Network(encoder=encoder, projector=mlp(*widths, bias=False, last_norm="scale", std=0.01))
        self.temperature, self.estimator = temperature, negatives.build()

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Both views in one pass, so that they share batch statistics."""
        h = self.student.embed_all(batch.views)
        z1, z2 = self.student.project_all(h)
        return self.output({"nt_xent": losses.nt_xent(z1, z2, self.temperature, self.estimator)}, h[0], z1)
