"""DeepCluster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import losses
from mmssl.distributed import full_value
from mmssl.methods.families import JointEmbedding, share_used
from mmssl.methods.method import AtLeast1, AtLeast2, Normal
from mmssl.model.encoder import Encoder
from mmssl.parts import Network, Part
from mmssl.parts.kmeans import draw_rows, kmeans, pca_whiten, uniform_order
from mmssl.random import generator
from mmssl.types import Batch, Clock, StepOutput


class DeepCluster(JointEmbedding):
    """Caron et al. 2018, arXiv:1807.05520: cluster the features of all samples, learn to classify them, again and again.

    Departs from the paper: no grey Sobel filter in front, and the new classifier of each pass begins under the optimizer
    state of the old one.
    """

    paper, coverage = "arXiv:1807.05520", (11,)
    views, slots, chooses = 1, True, True
    normal = (Normal("clusters_used", 0.3, "few clusters hold most samples"),)

    def __init__(self, encoder: Encoder, clusters: AtLeast2 = 10_000, pca: AtLeast1 = 256, iterations: AtLeast1 = 20):
        super().__init__()
        self.student = Network(encoder=encoder)
        self.classifier = FreshLinear(encoder.dim, clusters)
        self.clusters, self.pca, self.iterations, self.seed = clusters, pca, iterations, 0
        self.ids: Tensor
        self.agreement: Tensor
        self.register_buffer("ids", torch.empty(0, dtype=torch.int64))
        self.used: Tensor
        self.register_buffer("used", torch.ones(()))
        self.register_buffer("agreement", torch.zeros(()))  # mutual information of this pass's clusters and the last one's

    def attach(self, samples: int, seed: int) -> None:
        """A cluster for each sample."""
        if samples < self.clusters:
            raise ValueError(f"clusters: {self.clusters}, the data hold {samples} samples; use fewer clusters")
        self.ids, self.seed = torch.full((samples,), -100), seed

    def needs_description(self, clock: Clock) -> bool:
        """Before each pass."""
        return True

    @torch.no_grad()
    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """Cluster the whitened features of all samples, and begin a new classifier."""
        from sklearn.metrics import normalized_mutual_info_score  # takes a second to import, of every start of every method

        super().on_epoch(clock)
        assert described is not None
        rows = F.normalize(pca_whiten(described, self.pca), dim=1)
        draw = generator(self.seed, "clusters", clock.epoch)
        found = kmeans(rows, draw_rows(rows, self.clusters, draw), draw, self.iterations).assignment
        self.agreement.fill_(float(normalized_mutual_info_score(self.ids.cpu().numpy(), found.cpu().numpy())))
        self.ids.copy_(found)
        self.used.copy_(share_used(found, self.clusters))
        self.classifier.renew(generator(self.seed, "classifier", clock.epoch))

    def order(self, clock: Clock) -> Tensor:
        """As many samples of each cluster."""
        return uniform_order(self.ids, generator(self.seed, "uniform", clock.epoch))

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Classify."""
        h = self.student.embed(batch.views[0])
        loss = losses.cluster_cross_entropy(self.classifier(h), self.ids[batch.index], 1.0)
        return self.output({"clusters": loss}, h, h, clusters_used=self.used, agreement=self.agreement)


class FreshLinear(Part):
    """A linear layer that can begin anew without writing to trained weights, which engines with masters would undo.

    A buffer takes away what the trained weights were when it began anew, hence weight decay must leave them alone.
    """

    decays = False

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.linear = nn.Linear(dim, count)
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.zeros(count, dim))
        self.register_buffer("bias", torch.zeros(count))

    def renew(self, draw: torch.Generator) -> None:
        """Weights from N(0, 0.01), biases 0. draw: on the CPU."""
        weight, bias = self.linear.parameters()
        fresh = torch.randn(weight.shape, generator=draw) * 0.01
        self.weight.copy_(fresh.to(self.weight.device) - full_value(weight))
        self.bias.copy_(-full_value(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return self.linear(x) + F.linear(x, self.weight, self.bias)
