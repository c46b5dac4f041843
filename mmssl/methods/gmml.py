"""GMML."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import losses
from mmssl.methods.method import Method, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.pixel_head import pixel_features, pixel_head
from mmssl.parts import Network
from mmssl.parts.corruption import Corrupted, GroupOptions, overwritten, rank_share
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput


class GMML(Method):
    """Atito et al. 2022, arXiv:2205.14986: rebuild groups of pixels that were overwritten, from all tokens."""

    paper, family, modalities, coverage = "arXiv:2205.14986", "masked", ("vision",), (92,)
    normal = (Normal("altered_share", 0.02, "hardly anything is overwritten; raise method.corruption.share"),)

    def __init__(self, encoder: Encoder, corruption: GroupOptions = GroupOptions(), blocks: tuple[int, ...] | None = None):
        """blocks: whose outputs are averaged for the head, the first is 1; every second from the last back to the middle if
        None, which are 6, 8, 10 and 12 of 12.
        """
        super().__init__()
        features = pixel_features(encoder, "gmml")
        corruption.check(features.image_size)
        depth = len(encoder.transformer.blocks)
        self.blocks = tuple(range(depth, max(depth // 2, 1) - 1, -2)) if blocks is None else blocks
        if not self.blocks or max(self.blocks) != depth or min(self.blocks) < 1:
            raise ValueError(
                f"blocks: {list(self.blocks)}, must be between 1 and {depth} (model.depth), which must be one of them: nothing "
                "else trains the last block"
            )
        self.student = Network(encoder=encoder)
        self.head = pixel_head(features)
        self.corruption = corruption

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Overwritten pixels from the image that has others there."""
        (view,), encoder = batch.views, self.student.encoder
        corrupted, seen, guess = self._guess(batch)
        loss = losses.masked_l1(encoder.features.unraw(guess), view.x, corrupted.altered) * rank_share(corrupted.altered)
        health = {"prediction_std": losses.token_std(guess), "altered_share": corrupted.altered.float().mean()}
        return StepOutput({"rebuilt": loss}, health, encoder.pool(seen).detach())

    def _guess(self, batch: Batch) -> tuple[Corrupted, Encoded, Tensor]:
        """The corrupted images, their tokens, and what the head says of them, (B, L, n)."""
        (view,), encoder = batch.views, self.student.encoder
        corrupted = overwritten(view.x, batch.keys, self.corruption)
        seen = encoder(view._replace(x=corrupted.x), collect="block")
        depths = torch.stack([seen.layers[number - 1] for number in self.blocks]).mean(0)  # (B, L, D)
        return corrupted, seen, self.head(encoder.transformer.norm(depths))

    def check_batch(self, samples: int) -> list[str]:
        """Pasting takes two."""
        self.corruption.check_batch(samples)
        return super().check_batch(samples)

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """Patches count as hidden if any of their pixels were overwritten."""
        features = self.student.encoder.features
        corrupted, _, guess = self._guess(batch)
        truth = features.raw(batch.views[0].x)
        hidden = features.raw(corrupted.altered.expand_as(corrupted.x)).any(-1)
        return Rebuilt(truth, guess.to(truth.dtype), hidden, features.raw(corrupted.x))
