"""Context encoders."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmssl import losses
from mmssl.losses.generative import critic, weighted_mse
from mmssl.methods.method import AtLeast0, AtLeast1, Method, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.pixel_head import Critic, ImageDecoder, ImageDecoderOptions, pixel_features, reverse_gradient
from mmssl.parts import Network
from mmssl.parts.corruption import Region, RegionOptions, region
from mmssl.types import Batch, Clock, Rebuilt, StepOutput


class ContextEncoder(Method):
    """Pathak et al. 2016, arXiv:1604.07379: inpaint a removed region, so that a critic does not notice.

    Departs from the authors' code: the critic sees the whole image, filled in, there the region alone; what fills it in raises
    the critic's loss as in the paper's equation 2, there it lowers that of the wrong answers; and both have one rate, where
    theirs are ten to one.
    """

    paper, family, modalities, coverage = "arXiv:1604.07379", "masked", ("vision",), (96,)
    normal = (Normal("prediction_std", 0.02, "the same prediction for every image"),)

    def __init__(
        self,
        encoder: Encoder,
        region: RegionOptions = RegionOptions(),
        decoder: ImageDecoderOptions = ImageDecoderOptions(),
        overlap_weight: AtLeast0 = 10.0,
        adversarial: Annotated[float, Field(ge=0, lt=1)] = 0.001,
        critic_width: AtLeast1 = 64,
    ):
        """
        Args:
            overlap_weight: of the errors of pixels that are asked for though they are seen; 1 of those that are not.
            adversarial: weight of the critic's opinion, the error's is what is left to 1; 0 = no critic.
            critic_width: channels of the critic's first layer.
        """
        super().__init__()
        features = pixel_features(encoder, "context_encoder")
        size, channels = features.image_size, features.channels
        region.check(size)
        self.student = Network(encoder=encoder)
        self.decoder = ImageDecoder(encoder.dim, size, channels, decoder)
        self.critic = Critic(size, channels, critic_width) if adversarial else None
        self.region, self.overlap_weight, self.adversarial = region, overlap_weight, adversarial

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The region from what is around it. The critic learns in the same pass, see `reverse_gradient`."""
        (view,) = batch.views
        hole, pooled, guess = self._guess(batch)
        weight = torch.where(hole.hidden, 1.0, self.overlap_weight) * hole.asked
        terms = {"rebuilt": (1 - self.adversarial) * weighted_mse(guess, view.x, weight)}
        # Of single pixels over images: one picture of the mean hardly differs between images, but between its places.
        health = {"prediction_std": losses.token_std(guess.flatten(1)[:, None])}
        if self.critic is not None:
            filled = torch.where(hole.asked, reverse_gradient(guess, self.adversarial).to(view.x.dtype), view.x)
            real, fake = self.critic(torch.cat([view.x, filled])).chunk(2)
            terms["critic"] = critic(real, fake)
            health["critic_right"] = torch.cat([real > 0, fake < 0]).float().mean()
        return StepOutput(terms, health, pooled.detach())

    def _guess(self, batch: Batch) -> tuple[Region, Tensor, Tensor]:
        """What is removed, (B, D) what stands for the rest, and (B, C, H, W) what is said of the whole image."""
        (view,) = batch.views
        hole = region(batch.keys, view.x.shape[-1], view.x.device, self.region)
        pooled = self.student.embed(view._replace(x=view.x.masked_fill(hole.hidden, 0.0)))
        return hole, pooled, self.decoder(pooled)

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """Patches count as hidden if any of their pixels were asked for; the others are as they are."""
        (view,), features = batch.views, self.student.encoder.features
        hole, _, guess = self._guess(batch)
        filled = torch.where(hole.asked, guess.to(view.x.dtype), view.x)
        return Rebuilt(features.raw(view.x), features.raw(filled), features.raw(hole.asked.expand_as(view.x)).any(-1))
