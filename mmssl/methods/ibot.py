"""iBOT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl import losses
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import Above0, AtLeast1, AtLeast2, Natural, Normal
from mmssl.methods.normal import DISTILLED
from mmssl.model.encoder import Encoder
from mmssl.model.mask_token import MaskToken
from mmssl.parts import Center, DinoHead, Network, Teacher
from mmssl.schedules import Schedule, cosine, linear
from mmssl.types import Batch, Clock, Encoded, StepOutput

PATCHES = "collapsed: targets of patches are uniform; lower method.patch_temperature"


class IBOT(JointEmbedding):
    """Zhou et al. 2021, arXiv:2111.07832: DINO between views, and within a view predict the teacher's distribution of what is
    hidden from the student.
    """

    paper, coverage = "arXiv:2111.07832", (90,)
    family, modalities, exports = "masked", ("vision",), "teacher"
    masks = crops = True
    normal = (
        *DISTILLED,
        Normal("patch_entropy", 0.0, "", 0.995, PATCHES, after=1000),
    )

    def __init__(
        self,
        encoder: Encoder,
        prototypes: AtLeast2 = 8192,
        hidden: AtLeast1 = 2048,
        bottleneck: AtLeast1 = 256,
        layers: AtLeast1 = 3,
        head_norm: bool = False,
        unit_gain: bool = False,
        freeze_epochs: Natural = 1,
        temperature: Above0 = 0.1,
        teacher_temperature: Schedule = linear(0.04, 0.07, steps=29, by="epoch"),
        patch_temperature: Schedule = linear(0.04, 0.07, steps=29, by="epoch"),
        center_momentum: float = 0.9,
        momentum: Schedule = cosine(0.996, 1.0),
    ):
        """teacher_temperature, patch_temperature: of the teacher's distributions of views and of patches.

        head_norm: batch normalisation in the head, views apart from patches, for short runs of narrow heads.
        """
        super().__init__()
        for name, each in {"teacher_temperature": teacher_temperature, "patch_temperature": patch_temperature}.items():
            if min(each.start, each.end) <= 0:
                raise ValueError(f"{name}: from {each.start} to {each.end}, must be above 0")
        head = DinoHead(encoder.dim, prototypes, hidden, bottleneck, layers, head_norm, unit_gain, freeze_epochs)
        self.student = Network(encoder=encoder, projector=head)  # one head for views and patches
        self.teacher = Teacher(self.student, momentum, batch_stats=True, lag=1)
        self.mask_token = MaskToken(encoder.features, "zeros")
        self.center, self.patch_center = Center(prototypes, center_momentum), Center(prototypes, center_momentum)
        self.temperature = temperature
        self.teacher_temperature, self.patch_temperature = teacher_temperature, patch_temperature

    @classmethod
    def check_mask(cls, mask: Any) -> None:
        """One of each view."""
        if mask.copies != 1:
            raise ValueError("views.mask.copies: ibot takes one mask of each full-size view; set it to 1")

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The teacher sees the two full-size views whole, the student with places hidden, and the smaller views."""
        full, small = batch.views[: self.views], batch.views[self.views :]
        masks = [view.mask for view in full if view.mask is not None and view.copies == 1]
        if len(masks) < len(full):
            raise ValueError("views.mask.copies: ibot takes one mask of each full-size view; set it to 1")
        hidden = torch.cat([mask.hidden for mask in masks])  # (2B, L)
        encoder, teacher = self.student.encoder, self.teacher.encoder
        seen = [encoder.contextualize(self.mask_token(encoder, view)) for view in full]
        whole = [self.teacher.encode(view, None) for view in full]

        h = [encoder.pool(one) for one in seen] + self.student.embed_all(small)
        logits = self.student.project_all(h)  # per view (B, K)
        targets = self.teacher.project_all([teacher.pool(one) for one in whole])
        sharp = self.teacher_temperature(clock)
        views = losses.dino(logits, targets, self.center.value, self.temperature, sharp)

        guesses = self._project(self.student, seen)  # (2B, L, K)
        tokens = self._project(self.teacher, whole)
        keen = self.patch_temperature(clock)
        patches = losses.ibot_tokens(guesses, tokens, self.patch_center.value, hidden, self.temperature, keen)

        nats, middle = math.log(logits[0].shape[1]), tokens[:, tokens.shape[1] // 2]
        use = losses.assignment_entropy(losses.teacher_distribution(targets[0], self.center.value, sharp))
        patch_use = losses.assignment_entropy(losses.teacher_distribution(middle, self.patch_center.value, keen))
        health = {
            "target_use": use.of_mean / nats,
            "target_entropy": use.mean / nats,
            "patch_entropy": patch_use.mean / nats,  # of the patch in the middle
            "masked_share": hidden.float().mean(),
        }
        centred = logits[0] - self.center.value  # what is common to all samples is no target
        for one in targets:
            self.center.update(one)
        self.patch_center.update(tokens.flatten(0, 1))  # hidden or not
        return self.output({"views": views, "patches": patches}, h[0], centred, **health)

    @staticmethod
    def _project(network: Network | Teacher, views: Sequence[Encoded]) -> Tensor:
        """Tokens of all views, as one batch of samples: its normalisation is over all of them."""
        tokens = torch.cat([view.tokens for view in views])
        return network.project(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
