"""TERA."""

from __future__ import annotations

from torch import Tensor, nn

from mmssl import losses
from mmssl.methods.method import Method, check_raw
from mmssl.model.encoder import Encoder, init_linear
from mmssl.parts import Network
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput, View


class TERA(Method):
    """Liu et al. 2020, arXiv:2007.06028: rebuild what was altered of an utterance in time, frequency and magnitude."""

    paper, family, modalities, coverage = "arXiv:2007.06028", "masked", ("spectrogram",), (94,)

    def __init__(self, encoder: Encoder):
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise ValueError("model.backbone: tera rebuilds what tokens are made of; leave it out")
        check_raw(encoder, ids=False)
        dim, width = encoder.dim, encoder.features.raw_width
        self.student = Network(encoder=encoder)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, 1e-12), nn.Linear(dim, width))
        self.head.apply(init_linear)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Altered cells from the altered whole."""
        (view,), features = batch.views, self.student.encoder.features
        seen, guess = self._guess(view)
        clean = features.unraw(features.raw(view.record["clean"]))
        label = view.record["altered"]  # (B, T, F)
        terms = {"rebuilt": losses.masked_l1(features.unraw(guess), clean, label)}
        health = {"prediction_std": losses.token_std(guess), "altered_share": label.sum() / label.numel()}
        return StepOutput(terms, health, self.student.encoder.pool(seen).detach())

    def _guess(self, view: View) -> tuple[Encoded, Tensor]:
        """The tokens of the altered view, and what they say was there, (B, L, n)."""
        if "altered" not in view.record:
            raise ValueError("views.alter: tera learns from altered views; give views.alter={}")
        seen = self.student.encoder(view)
        return seen, self.head(seen.tokens)

    def terms(self, batch: Batch) -> Tensor | None:
        """() altered cells."""
        return batch.views[0].record["altered"].sum()

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """Tokens count as hidden where what the student sees is not what was there."""
        (view,), features = batch.views, self.student.encoder.features
        _, guess = self._guess(view)
        truth, heard = features.raw(view.record["clean"]), features.raw(view.x)
        return Rebuilt(truth, guess.to(truth.dtype), (heard != truth).any(-1), heard)
