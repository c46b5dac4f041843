"""What holds a model near the one that a run begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import losses
from mmssl.methods.method import Method, Normal
from mmssl.model.encoder import Encoder
from mmssl.parts import Network, Teacher
from mmssl.schedules import constant
from mmssl.types import Batch, Clock, Encoded, StepOutput


class Start(Teacher):
    """The network that a run begins with; it stays as it is."""

    def __init__(self, student: Network):
        super().__init__(student, constant(1.0), batch_stats=True)  # as the student's in training: equal at the start

    @property
    def pace(self) -> None:
        """Nothing else may move it."""

    def after_step(self, clock: Clock) -> None:
        """Stay, buffers too."""


class Anchor(Method):
    """Beside another method: features of whole views stay near those of the model that training begins with.

    Against forgetting where a released encoder goes on with other data (feature distillation, arXiv:1412.6550, from the model
    itself, arXiv:1606.09282). The target is each token's direction, or what a backbone pools.
    """

    paper, family, modalities, coverage = "arXiv:1606.09282", "predictive", ("vision", "speech", "spectrogram", "text"), ()
    alone = False
    normal = (Normal("anchor", -1.0, "", 1.0, "far from the model it began with"),)

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.student = Network(encoder=encoder)
        self.start = Start(self.student)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """2 - 2 cos of each token, or of what is pooled, and its counterpart."""
        view, encoder = batch.views[0]._replace(mask=None), self.student.encoder
        seen = encoder(view)
        with torch.no_grad():
            was = self.start.encoder(view)
        loss = losses.cosine_regression(_rows(encoder, seen), _rows(encoder, was))
        return StepOutput({"anchor": loss}, {"anchor": loss.detach()}, encoder.pool(seen).detach())


def _rows(encoder: Encoder, seen: Encoded) -> Tensor:
    """(n, D): tokens that are not padding, or what a backbone pools."""
    if not isinstance(encoder, Encoder):
        return encoder.pool(seen)
    return seen.tokens.flatten(0, 1) if seen.pad is None else seen.tokens[~seen.pad]
