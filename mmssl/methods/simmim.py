"""SimMIM."""

from __future__ import annotations

from torch import Tensor, nn

from mmssl import losses
from mmssl.methods.method import Method, check_raw, masked_share
from mmssl.model.encoder import Encoder, init_linear
from mmssl.model.mask_token import MaskToken
from mmssl.parts import Network
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput, View


class SimMIM(Method):
    """Xie et al. 2021, arXiv:2111.09886: a linear layer says the pixels of patches that a token stands in for.

    The pixels of a patch are said in the order of `raw`, channels adjacent; in the authors' code each channel is a block.
    """

    paper, family, modalities, coverage = "arXiv:2111.09886", "masked", ("vision",), (87,)
    masks = True

    def __init__(self, encoder: Encoder):
        super().__init__()
        check_raw(encoder, ids=False)
        self.student = Network(encoder=encoder)
        self.mask_token = MaskToken(encoder.features)
        self.head = nn.Linear(encoder.dim, encoder.features.raw_width)
        self.head.apply(init_linear)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Absolute error of the masked pixels."""
        (view,), encoder = batch.views, self.student.encoder
        seen, guess = self._guess(view)
        loss = losses.masked_pixel_l1(guess, encoder.features.raw(view.x), view.mask)
        health = {"prediction_std": losses.token_std(guess), "masked_share": masked_share(view)}
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput({"rebuilt": loss}, health, pooled)

    def _guess(self, view: View) -> tuple[Encoded, Tensor]:
        """All tokens, those that are hidden replaced, and what the head says of them, (M*B, L, n)."""
        if view.mask is None:
            raise ValueError("views.mask: simmim needs masks")
        seen = self.student.encoder.contextualize(self.mask_token(self.student.encoder, view))
        return seen, self.head(seen.tokens)

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """The masked patches as they are and as they are said to be."""
        (view,) = batch.views
        _, guess = self._guess(view)
        assert view.mask is not None
        truth = self.student.encoder.features.raw(view.x).repeat_interleave(view.copies, 0)
        return Rebuilt(truth, guess.to(truth.dtype), view.mask.hidden)
