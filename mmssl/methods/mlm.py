"""Masked language models."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import losses
from mmssl.methods.method import Method, masked_share
from mmssl.model.encoder import Encoder
from mmssl.model.lm_head import lm_head
from mmssl.model.mask_token import Corruption, asked, check_corruption, corrupt
from mmssl.model.positions import take_at
from mmssl.parts import Network
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput, View


class MLM(Method):
    """Devlin et al. 2018, arXiv:1810.04805: say which tokens were in places of which most hold something else.

    Without the prediction of next sentences, and with masks drawn anew at each pass, as RoBERTa, arXiv:1907.11692. What is
    hidden, `views.mask` says. Logits are made for hidden tokens only.
    """

    paper, family, modalities, coverage = "arXiv:1810.04805", "masked", ("text",), (21,)
    masks = True

    def __init__(self, encoder: Encoder, corruption: Corruption = Corruption()):
        super().__init__()
        check_corruption(getattr(encoder, "features", None), corruption, "mlm")
        self.student = Network(encoder=encoder)
        self.head = lm_head(encoder.features.tokens, encoder.dim, encoder.features.norm.eps)
        self.corruption = corruption

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Hidden tokens from all places."""
        (view,), encoder = batch.views, self.student.encoder
        _, seen, places, logits = self._guess(view, batch)
        assert view.mask is not None
        counts = view.mask.hidden.gather(1, places)  # (M*B, n)
        ids = take_at(view.x, places)
        right = (logits.detach().argmax(-1) == ids) & counts
        health = {
            "accuracy": right.sum() / counts.sum().clamp(min=1),
            "prediction_std": losses.token_std(take_at(seen.tokens, places), pad=~counts),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput({"tokens": losses.masked_cross_entropy(logits, ids, counts)}, health, pooled)

    def _guess(self, view: View, batch: Batch) -> tuple[Tensor, Encoded, Tensor, Tensor]:
        """The ids that are seen, (M*B, L), all tokens, the places to speak of, (M*B, n), and their logits, (M*B, n, V)."""
        if view.mask is None:
            raise ValueError("views.mask: mlm needs masks")
        encoder = self.student.encoder
        corrupted = corrupt(view, encoder.features, batch.keys, self.corruption)
        seen = encoder(corrupted)  # tokens (M*B, L, D)
        places = asked(view.mask)
        return corrupted.x, seen, places, self.head(take_at(seen.tokens, places))

    @torch.no_grad()
    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """The most likely tokens."""
        (view,) = batch.views
        corrupted, _, places, logits = self._guess(view, batch)
        assert view.mask is not None
        truth = view.x.repeat_interleave(view.copies, 0)
        return Rebuilt(truth, truth.scatter(1, places, logits.argmax(-1)), view.mask.hidden, corrupted)
