"""MP3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl import losses, random
from mmssl.methods.method import AtLeast2, Method
from mmssl.model.encoder import Encoder, init_linear
from mmssl.model.positions import NoPositions
from mmssl.parts import Network
from mmssl.types import Batch, Clock, StepOutput, View


class MP3(Method):
    """Zhai et al. 2022, arXiv:2207.07611: without positions, and with few tokens as keys, tell where each token is from.

    The same tokens are keys in all layers. In a sequence of n tokens, token t is in class floor(t * places / n): with as many
    classes as tokens, its place, and otherwise how far along it is, so that lengths may differ and long sequences can do with
    few classes. Frames of waves overlap by a fifth: which ones are next to each other can be heard.
    """

    paper, family, modalities, coverage = "arXiv:2207.07611", "predictive", ("vision", "speech", "spectrogram", "text"), (103,)

    def __init__(self, encoder: Encoder, ratio: float = 0.75, places: AtLeast2 | None = None):
        """ratio: share of the tokens that are no keys.  places: classes; as many as the longest input has tokens if None."""
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio: {ratio}, must be at least 0 and below 1: keys are the rest")
        if not isinstance(encoder, Encoder):
            raise ValueError("model.backbone: mp3 asks tokens that know no places, which a backbone's do; leave it out")
        if not isinstance(encoder.positions, NoPositions) or getattr(encoder.features, "placed", False):
            raise ValueError("model.positions: a model that knows places need not tell them from content; set it to none")
        if encoder.transformer.causal:
            raise ValueError("model.causal: true, a token could count those before it; set it to false")
        self.student = Network(encoder=encoder)
        self.places, self.ratio = places or encoder.features.length, ratio
        if self.places < 2:
            raise ValueError("model.patch_size: one patch an image leaves nothing to tell; take smaller patches")
        self.head = nn.Linear(encoder.dim, self.places)
        init_linear(self.head)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Keys or not, all tokens are asked."""
        (view,), encoder = batch.views, self.student.encoder
        features = encoder.local(view.x)
        seen = encoder.contextualize(features, pad=view.pad, attend=self._keys(view, features, batch))
        logits = self.head(seen.tokens)  # (B, L, places)
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if view.pad is None else ~view.pad
        place = torch.arange(valid.shape[1], device=valid.device) * self.places // valid.sum(1, keepdim=True)
        place = place.clamp(max=self.places - 1)  # of padding, which does not count
        terms = {"places": losses.masked_cross_entropy(logits, place, valid)}
        hit = (logits.argmax(-1) == place) & valid
        health = {"accuracy": hit.sum() / valid.sum(), "encoder_std": losses.token_std(seen.tokens, pad=view.pad)}
        return StepOutput(terms, health, encoder.pool(seen).detach())

    def _keys(self, view: View, features: Tensor, batch: Batch) -> Tensor:
        """(B, L) bool, the same number of keys in rows of one length, whatever they are padded to."""
        length = features.shape[1]
        longest = max(length, self.student.encoder.features.length)
        noise = random.uniform(batch.keys, (longest,), features.device)[:, :length]
        valid = (~view.pad).sum(1, keepdim=True) if view.pad is not None else torch.full((), length, device=noise.device)
        noise = noise if view.pad is None else noise.masked_fill(view.pad, torch.inf)
        count = (valid * (1 - self.ratio)).floor().clamp(min=1)
        return noise.argsort(1).argsort(1) < count

    def terms(self, batch: Batch) -> Tensor | None:
        """Tokens that are not padding; None of images, which are all as large."""
        (view,), pads = batch.views, getattr(self.student.encoder.features, "pad", None)
        if pads is None:
            return None
        pad = pads(view.x.new_ones(view.x.shape[:2], dtype=torch.int64)) if view.pad is None else view.pad
        return (~pad).sum()
