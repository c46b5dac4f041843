"""What several papers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import losses
from mmssl.methods.method import Method, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.model.norm import by_batch, grouped, is_batch_norm, split_groups
from mmssl.model.recompute import forget_nothing
from mmssl.parts import Memory, Network, Prototypes, Queue, Teacher
from mmssl.parts.kmeans import Clusters
from mmssl.random import generator
from mmssl.schedules import Schedule
from mmssl.types import Batch, Clock, StepOutput, View


@dataclass(frozen=True)
class Negatives:
    """How negatives enter a contrast; the default is that of InfoNCE."""

    estimator: Literal["softmax", "decoupled", "debiased", "hard"] = "softmax"
    beta: float = 1.0  # of hard: weights are exp(beta * logit)
    prior: float = 0.1  # of debiased and hard: chance that a negative is of the query's class

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    def build(self) -> losses.Estimator:
        """Raises: ValueError if beta or prior is out of range."""
        kinds = {"softmax": losses.softmax, "decoupled": losses.decoupled, "debiased": losses.debiased(self.prior)}
        return kinds[self.estimator] if self.estimator in kinds else losses.hard(self.beta, self.prior)


class JointEmbedding(Method):
    """Compares embeddings of views of the same samples."""

    family: ClassVar[Literal["joint embedding", "masked", "predictive"]] = "joint embedding"
    modalities = ("vision", "speech", "text")
    views = 2

    def output(self, terms: dict[str, Tensor], h: Tensor, z: Tensor, **health: Tensor) -> StepOutput:
        """Losses, and how projections differ between samples.

        Args:
            h: (B, D) embeddings of the first view.  z: (B, D) its projections.
        """
        seen = {"unit_std": losses.unit_std(z), "dimensions": losses.dimensions(z)}
        return StepOutput(terms, seen | health, h.detach())


def embed_in_parts(root: nn.Module, rows: int) -> int:
    """Let so many rows pass an encoder at once in all methods within that compare whole samples, student and teacher.

    Losses and heads still see all embeddings, so that only memory and time change.

    Returns: how many methods do so now.
    Raises: ValueError if an encoder has batch normalisation, whose statistics would be those of a part.
    Source: arXiv:2101.06983, section 3, which computes embeddings once for their gradients and again for those of weights.
    """
    compared = [method for method in root.modules() if isinstance(method, Method) and method.family == "joint embedding"]
    for method in compared:
        networks = [module for module in method.modules() if isinstance(module, Network)]
        for network in (*networks, *(part.network for part in method.parts() if isinstance(part, Teacher))):
            if any(is_batch_norm(module) for module in network.encoder.modules()):
                raise ValueError("batch normalisation in the encoder needs all samples at once; leave it out")
            forget_nothing(network.encoder)
            network.at_once = rows
    return len(compared)


class MomentumContrast(JointEmbedding):
    """He et al. 2019, arXiv:1911.05722: find the teacher's key of the other view among it and a queue of earlier keys.

    Batch normalisation sees `split` groups of the batch, other ones for keys than for queries, as on that many devices whose
    samples are shuffled: queries cannot recognise their keys by common statistics. Queues and groups are those of the batch
    of all ranks.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: nn.Module,
        dim: int,
        temperature: float,
        queue: int,
        momentum: Schedule,
        split: int,
        negatives: Negatives,
    ):
        super().__init__()
        if split < 1:
            raise ValueError(f"split: {split}, must be at least 1 (no groups)")
        self.student = Network(encoder=encoder, projector=projector)
        self.teacher = Teacher(self.student, momentum, batch_stats=True)
        self.queue = Queue(queue, dim)
        self.split = split if any(is_batch_norm(module) for module in self.student.modules()) else 1
        self.temperature, self.estimator = temperature, negatives.build()

    def check_batch(self, samples: int) -> list[str]:
        """Groups are equal and hold at least two samples each; the queue holds a micro-batch."""
        notes = super().check_batch(samples)
        self.queue.check_batch(samples)
        if self.split > 1 and (samples % self.split or samples < 2 * self.split):
            possible = [n for n in range(1, samples // 2 + 1) if samples % n == 0] or [1]
            raise ValueError(
                f"split: {self.split}, must divide the {samples} samples of a micro-batch (of all ranks) into equal groups of "
                f"at least 2; take one of {', '.join(map(str, possible))}"
            )
        return notes

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Queries of the first view, keys of the second."""
        first, second = batch.views
        samples = len(batch.index)
        near = split_groups(samples, self.split) if self.split > 1 else None
        mixed = split_groups(samples, self.split, "shuffle", clock.step) if self.split > 1 else None
        with grouped(self.student, near):
            h = self.student.embed(first)
            query = self.student.project(h)
        with grouped(self.teacher.network, mixed):
            key = self.teacher.project(self.teacher.embed(second))
        own = self.queue.read_ids() == batch.index[:, None]  # (B, K) a sample's older keys are no negatives
        loss = losses.info_nce(query, key, self.queue.read(), self.temperature, own, self.estimator)
        self.queue.push(key, batch.index)
        return self.output({"info_nce": loss}, h, query)


def unit(z: list[Tensor]) -> list[Tensor]:
    """Rows of length 1, fp32 or higher, since scores are divided by small temperatures."""
    return [F.normalize(one if one.itemsize > 4 else one.float(), dim=-1) for one in z]


def at_start(student: Network, view: View) -> Tensor:
    """(B, D) projections of length 1 by an untrained network: by batch statistics, since running ones say nothing yet."""
    with by_batch(student):
        return F.normalize(student.project(student.embed(view)), dim=-1)


def share_used(ids: Tensor, count: int) -> Tensor:
    """() share of the clusters that hold samples. ids: (N,) int64, none of them unassigned."""
    return torch.zeros(count, device=ids.device).index_fill_(0, ids, 1.0).mean()


class MemoryCodes(JointEmbedding):
    """Classify samples into clusters found before each pass among what the pass before remembered of them.

    The two full-size views have a memory each; heads take turns in them. The directions that embeddings are compared with are
    set by clustering and not trained. Before the first pass the memories are filled by a look at all samples without
    augmentation (departs from the authors' code, which augments there, too).

    Source: DeepCluster v2 in arXiv:2006.09882, Appendix C, and in its authors' code.
    """

    crops = slots = True
    normal = (Normal("clusters_used", 0.3, "few clusters hold most samples"),)

    def __init__(self, encoder: Encoder, hidden: int, dim: int, prototypes: int, heads: int, temperature: float):
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads: {heads}, must be at least 1")
        self.student = Network(encoder=encoder, projector=mlp(encoder.dim, hidden, dim))
        self.heads: Any = nn.ModuleList(Prototypes(dim, prototypes, trained=False) for _ in range(heads))
        self.dim, self.temperature, self.seed = dim, temperature, 0
        self.memories: Any = nn.ModuleList()
        self.ids: Tensor
        self.used: Tensor
        self.register_buffer("ids", torch.empty(heads, 0, dtype=torch.int64))
        self.register_buffer("used", torch.ones(()))

    def attach(self, samples: int, seed: int) -> None:
        """Memories and codes of all samples."""
        count = len(self.heads[0].weight)
        if samples < count:
            raise ValueError(f"prototypes: {count}, the data hold {samples} samples; use fewer prototypes")
        self.seed = seed
        self.memories = nn.ModuleList(Memory(samples, self.dim, seed=seed) for _ in range(self.views))
        self.ids = torch.full((len(self.heads), samples), -100)

    def needs_description(self, clock: Clock) -> bool:
        """Before the first pass there is nothing to remember."""
        return clock.epoch == 0

    def describe(self, view: View) -> Tensor:
        """(B, dim) projections of length 1."""
        return at_start(self.student, view)

    def assign(self, rows: Tensor, directions: Tensor, draw: torch.Generator) -> Clusters:
        """Directions and codes of one head, from the memory (N, dim) and the directions (K, dim) it had."""
        raise NotImplementedError

    @torch.no_grad()
    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """Cluster."""
        super().on_epoch(clock)
        if described is not None:
            for memory in self.memories:
                memory.rows.copy_(described)
        for number, head in enumerate(self.heads):
            draw = generator(self.seed, "codes", clock.epoch, number)
            found = self.assign(self.memories[number % self.views].rows, head.weight, draw)
            head.set(found.centroids)
            self.ids[number] = found.assignment
        self.used.copy_(share_used(self.ids[0], len(self.heads[0].weight)))

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """All views of a sample have its code; those of one size share batch statistics."""
        h = self.student.embed_all(batch.views)
        z = unit(self.student.project_all(h))
        together, codes = torch.cat(z), self.ids[:, batch.index].repeat(1, len(z))  # (V*B, dim), (heads, V*B)
        each = [losses.cluster_cross_entropy(head(together), own, self.temperature) for head, own in zip(self.heads, codes)]
        for memory, one in zip(self.memories, z):
            memory.write(batch.index, one)
        loss = torch.stack(each).mean()
        return self.output({"codes": loss}, h[0], z[0], clusters_used=self.used)
