"""SiT."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import losses, random
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import Above0, AtLeast0, AtLeast1, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.model.pixel_head import pixel_features, pixel_head
from mmssl.parts import Network, Teacher
from mmssl.parts.corruption import Corrupted, GroupOptions, overwritten, rank_share
from mmssl.schedules import Schedule, cosine
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput


class SiT(JointEmbedding):
    """Atito et al. 2021, arXiv:2104.03602: rebuild two overwritten views, and find the teacher's key of the other view, whole.

    Departs from the paper's first version, which had a task of rotation, too; this is the authors' code.
    """

    paper, coverage = "arXiv:2104.03602", (93,)
    family, modalities = "masked", ("vision",)
    normal = (Normal("altered_share", 0.02, "hardly anything is overwritten; raise method.corruption.share"),)

    def __init__(
        self,
        encoder: Encoder,
        corruption: GroupOptions = GroupOptions(share=0.5, fill="zeros"),
        hidden: AtLeast1 = 4096,
        dim: AtLeast1 = 256,
        temperature: Above0 = 0.2,
        rebuild_weight: AtLeast0 = 1.0,
        momentum: Schedule = cosine(0.996, 1.0),
    ):
        """rebuild_weight: of the reconstruction; the authors advise 5 for small data sets."""
        super().__init__()
        features = pixel_features(encoder, "sit")
        corruption.check(features.image_size)
        projector = mlp(encoder.dim, hidden, hidden, dim, bias=False, last_norm="plain", activation="gelu")
        self.student = Network(encoder=encoder, projector=projector)
        self.teacher = Teacher(self.student, momentum, batch_stats=True, lag=1)
        self.head = pixel_head(features)
        self.corruption, self.temperature, self.rebuild_weight = corruption, temperature, rebuild_weight

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Both views in one pass, which share batch statistics: corrupted by the student, whole by the teacher."""
        encoder = self.student.encoder
        corrupted, seen, guess = self._guess(batch)
        h = encoder.pool(seen)  # (2B, D), the first views, then the second ones
        q1, q2 = self.student.project(h).chunk(2)
        k1, k2 = self.teacher.project_all(self.teacher.embed_all(batch.views))
        contrast = losses.batch_contrast(q1, k2, self.temperature) + losses.batch_contrast(q2, k1, self.temperature)
        whole = torch.cat([view.x for view in batch.views])
        rebuilt = losses.masked_l1(encoder.features.unraw(guess), whole, corrupted.altered) * rank_share(corrupted.altered)
        terms = {"contrast": contrast, "rebuilt": self.rebuild_weight * rebuilt}
        health = {"prediction_std": losses.token_std(guess), "altered_share": corrupted.altered.float().mean()}
        return self.output(terms, h[: len(q1)], q1, **health)

    def _guess(self, batch: Batch) -> tuple[Corrupted, Encoded, Tensor]:
        """The corrupted views, 2B rows, their tokens, and what the head says of them, (2B, L, n)."""
        each = [
            overwritten(view.x, [random.key(key, "view", number) for key in batch.keys], self.corruption)
            for number, view in enumerate(batch.views)
        ]
        corrupted = Corrupted(*(torch.cat(both) for both in zip(*each)))
        seen = self.student.encoder(batch.views[0]._replace(x=corrupted.x))
        return corrupted, seen, self.head(seen.tokens)

    def check_batch(self, samples: int) -> list[str]:
        """Pasting takes two."""
        self.corruption.check_batch(samples)
        return super().check_batch(samples)

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """Of the first views; patches count as hidden if any of their pixels were overwritten."""
        features, samples = self.student.encoder.features, len(batch.index)
        corrupted, _, guess = self._guess(batch)
        truth = features.raw(batch.views[0].x)
        hidden = features.raw(corrupted.altered[:samples].expand_as(corrupted.x[:samples])).any(-1)
        return Rebuilt(truth, guess[:samples].to(truth.dtype), hidden, features.raw(corrupted.x[:samples]))
