"""Image GPT."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl import losses, random
from mmssl.methods.method import Method, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.positions import take_at
from mmssl.parts import Network
from mmssl.parts.kmeans import draw_rows, kmeans
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput, View

LOOKED_AT = 16  # pixels of each image from which the palette is made
PIXELS = 1 << 18  # of all images


class IGPT(Method):
    """Chen et al. 2020, "Generative pretraining from pixels", PMLR 119: predict the colour of each pixel.

    Colours are those of a palette, which is found by k-means before the first pass and saved with the encoder. Departs from the
    authors' code in the bookkeeping of places: a pixel has the code of its own place rather than of the next one, and what
    begins a sequence is an extra token without one; and exactly a share of the pixels is hidden, not each by chance.
    """

    paper, family, modalities, coverage = "PMLR 119:1691", "predictive", ("vision",), (97,)
    normal = (Normal("encoder_std", 0.02, "collapsed: all pixels look alike"),)

    def __init__(self, encoder: Encoder, predict: Literal["next", "hidden"] = "next", ratio: float = 0.15):
        """predict: each pixel from those before it, or a share `ratio` of them, whose vectors are zeros, from all others."""
        super().__init__()
        palette, causal = getattr(encoder.features, "palette", None), encoder.transformer.causal
        if palette is None:
            raise ValueError("model.palette: missing, igpt predicts which of some colours a pixel has; set it, to 512 say")
        if causal != (predict == "next"):
            raise ValueError(f"model.causal: {causal}, with method.predict={predict} it must be {predict == 'next'}")
        if causal and not encoder.transformer.extra_tokens:
            raise ValueError("model.extra_tokens: 0, the first pixel is predicted from one; set it to 1")
        if not 0 < ratio < 1:
            raise ValueError(f"ratio: {ratio}, must be above 0 and below 1")
        self.student = Network(encoder=encoder)
        blocks: Any = encoder.transformer.blocks
        for block in blocks:
            nn.init.normal_(block.attn.proj.weight, std=(encoder.dim * len(blocks)) ** -0.5)
        self.head = nn.Linear(encoder.dim, encoder.features.raw_width, bias=False)
        nn.init.zeros_(self.head.weight)
        self.predict: Literal["next", "hidden"] = predict
        self.ratio, self.seed = ratio, 0

    @property
    def colours(self) -> Tensor:
        """(K, C) of the palette."""
        return self.student.encoder.features.palette.colours

    def attach(self, samples: int, seed: int) -> None:
        """Whether there are as many pixels as colours."""
        self.seed = seed
        pixels = samples * min(LOOKED_AT, self.student.encoder.features.length)
        if pixels < len(self.colours):
            raise ValueError(f"model.palette: {len(self.colours)} colours, {samples} images are too few; use fewer colours")

    def needs_description(self, clock: Clock) -> bool:
        """Before the first pass, unless the encoder came with a palette."""
        return clock.epoch == 0 and (self.colours.is_meta or not bool(self.colours.any()))

    def describe(self, view: View) -> Tensor:
        """(B, 16 * C) some pixels, of the same places in all images."""
        pixels = view.x.flatten(2)  # (B, C, H*W)
        places = random.permutation(pixels.shape[2], self.seed, "pixels")[:LOOKED_AT].to(pixels.device)
        return pixels[:, :, places].transpose(1, 2).flatten(1)

    @torch.no_grad()
    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """Find the palette."""
        super().on_epoch(clock)
        if described is None:
            return
        pixels, draw = described.view(-1, self.colours.shape[1]), random.generator(self.seed, "palette")
        pixels = pixels[torch.randperm(len(pixels), generator=draw)[:PIXELS].to(pixels.device)]
        different = pixels.unique(dim=0)
        if len(different) < len(self.colours):
            raise ValueError(
                f"model.palette: {len(self.colours)} colours, of which {len(pixels)} pixels have {len(different)}; use fewer"
            )
        self.colours.copy_(kmeans(pixels, draw_rows(different, len(self.colours), draw), draw).centroids)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Which colour?"""
        seen, places, logits = self._guess(batch)
        ids = self.student.encoder.features.raw(batch.views[0].x).gather(1, places)
        health = {
            "accuracy": (logits.argmax(-1) == ids).float().mean(),
            "encoder_std": losses.token_std(seen.tokens),
        }
        pooled = self.student.encoder.pool(seen).detach()  # (B, D)
        return StepOutput({"colours": losses.masked_cross_entropy(logits, ids)}, health, pooled)

    def _guess(self, batch: Batch) -> tuple[Encoded, Tensor, Tensor]:
        """What the encoder gives, which places (B, n) are predicted, and how likely each colour is there, (B, n, K) logits."""
        (view,), encoder = batch.views, self.student.encoder
        features = encoder.local(view.x)
        length, device = features.shape[1], features.device
        if self.predict == "next":
            seen = encoder.contextualize(features)
            assert seen.cls is not None
            before = torch.cat([seen.cls[:, None], seen.tokens[:, :-1]], 1)
            return seen, torch.arange(length, device=device).expand(len(before), -1), self.head(before)
        noise = random.uniform(batch.keys, (length,), device)
        places = noise.argsort(1)[:, : max(1, round(length * self.ratio))]
        hidden = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, places, True)
        seen = encoder.contextualize(features.masked_fill(hidden[..., None], 0.0))
        return seen, places, self.head(take_at(seen.tokens, places))

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """The likeliest colours. Of the next pixel, given those that really came before it."""
        _, places, logits = self._guess(batch)
        truth = self.student.encoder.features.raw(batch.views[0].x)  # (B, L)
        guess = truth.scatter(1, places, logits.argmax(-1))
        hidden = torch.zeros_like(truth, dtype=torch.bool).scatter_(1, places, True)
        return Rebuilt(self.colours[truth], self.colours[guess], hidden)
