"""Denoising autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import losses
from mmssl.losses.generative import weighted_mse
from mmssl.methods.method import Above0, AtLeast0, Method, Natural, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.pixel_head import pixel_features, pixel_head
from mmssl.parts import Network
from mmssl.parts.corruption import Corrupted, NoiseKind, noised, rank_share
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput


class DenoisingAutoencoder(Method):
    """Vincent et al. 2010, JMLR 11: rebuild the clean input from one with noise.

    Departs from the paper: patches and the shared transformer instead of fully connected layers trained one after the other.
    """

    paper, family, modalities, coverage = "JMLR 11:3371", "masked", ("vision",), (22,)
    normal = (Normal("altered_share", 0.01, "hardly anything is altered, the input can be copied; raise method.level"),)

    def __init__(
        self,
        encoder: Encoder,
        kind: NoiseKind = "masking",
        level: Above0 = 0.25,
        layers: Natural = 0,
        altered_weight: AtLeast0 = 1.0,
        intact_weight: AtLeast0 = 1.0,
    ):
        """
        Args:
            kind, level: of the noise, see `noised`; level is a chance, or the standard deviation of gaussian noise.
            layers: of the head, before the last one.
            altered_weight, intact_weight: of the errors of values that were altered and of those that were not.
        """
        super().__init__()
        features = pixel_features(encoder, "denoising_autoencoder")
        if kind != "gaussian" and level >= 1:
            raise ValueError(f"level: {level}, the chance that a value is altered must be below 1")
        if altered_weight == 0 and (kind == "gaussian" or intact_weight == 0):
            raise ValueError(f"altered_weight: 0, must be above 0 where {kind} noise leaves nothing else to learn from")
        self.student = Network(encoder=encoder)
        self.head = pixel_head(features, layers)
        self.kind: NoiseKind = kind
        self.level, self.altered_weight, self.intact_weight = level, altered_weight, intact_weight

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Squared error of all values."""
        (view,), encoder = batch.views, self.student.encoder
        corrupted, seen, guess = self._guess(batch)
        weight = torch.where(corrupted.altered, self.altered_weight, self.intact_weight)
        loss = weighted_mse(encoder.features.unraw(guess), view.x, weight) * rank_share(weight > 0)
        health = {"prediction_std": losses.token_std(guess), "altered_share": corrupted.altered.float().mean()}
        return StepOutput({"rebuilt": loss}, health, encoder.pool(seen).detach())

    def _guess(self, batch: Batch) -> tuple[Corrupted, Encoded, Tensor]:
        """The images with noise, their tokens, and what the head says of them, (B, L, n)."""
        (view,) = batch.views
        corrupted = noised(view.x, batch.keys, self.kind, self.level)
        seen = self.student.encoder(view._replace(x=corrupted.x))
        return corrupted, seen, self.head(seen.tokens)

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """Patches count as hidden if any of their values were altered."""
        features = self.student.encoder.features
        corrupted, _, guess = self._guess(batch)
        truth = features.raw(batch.views[0].x)
        hidden = features.raw(corrupted.altered).any(-1)
        return Rebuilt(truth, guess.to(truth.dtype), hidden, features.raw(corrupted.x))
