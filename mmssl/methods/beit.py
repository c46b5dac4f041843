"""BEiT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl import losses
from mmssl.methods.method import Method, Normal, check_raw, masked_share
from mmssl.model.encoder import Encoder, init_linear
from mmssl.model.mask_token import MaskToken
from mmssl.model.positions import take_at
from mmssl.model.token_decoder import hidden_places
from mmssl.parts import Network
from mmssl.parts.tokenizer import AutoencoderTokenizer, CodeTargets, TokenizerOptions, tokenizer_of
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput, View


class BEiT(CodeTargets, Method):
    """Bao et al. 2021, arXiv:2106.08254: say the codes of the patches that a token stands in for.

    Departs from the paper in the tokenizer, which is fitted to the data before the first pass, trained on them or drawn, see
    `mmssl/parts/tokenizer.py`, and sees the pixels that the encoder sees.
    """

    paper, family, modalities, coverage = "arXiv:2106.08254", "masked", ("vision",), (86,)
    masks = True
    normal = (Normal("code_use", 0.02, "few codes stand for most patches; try method.tokenizer.codes of a quarter"),)

    def __init__(self, encoder: Encoder, tokenizer: TokenizerOptions = TokenizerOptions()):
        super().__init__()
        check_raw(encoder, ids=False)
        self.student = Network(encoder=encoder)
        self.mask_token = MaskToken(encoder.features)
        self.tokenizer = tokenizer_of(encoder.features, tokenizer)
        self.head = nn.Linear(encoder.dim, tokenizer.codes)
        self.head.apply(init_linear)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Cross entropy of the masked patches' codes."""
        (view,), encoder = batch.views, self.student.encoder
        codes, seen, places, logits = self._guess(view)
        assert view.mask is not None
        wanted, hidden = take_at(codes, places), view.mask.hidden.gather(1, places)
        health = {
            "code_use": self.tokenizer.use(codes),
            "encoder_std": losses.token_std(seen.tokens),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput({"codes": losses.masked_cross_entropy(logits, wanted, hidden)}, health, pooled)

    def _guess(self, view: View) -> tuple[Tensor, Encoded, Tensor, Tensor]:
        """Codes (B, L), all tokens, the places to speak of, (M*B, n), and their logits, (M*B, n, K)."""
        if view.mask is None:
            raise ValueError("views.mask: beit needs masks")
        encoder = self.student.encoder
        codes = self.tokenizer(encoder.features.raw(view.x))
        seen = encoder.contextualize(self.mask_token(encoder, view))  # tokens (M*B, L, D)
        places = hidden_places(view.mask)
        return codes, seen, places, self.head(take_at(seen.tokens, places))

    @torch.no_grad()
    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt | None:
        """What the most likely codes stand for; None of codes that cannot be decoded."""
        if not isinstance(self.tokenizer, AutoencoderTokenizer):
            return None
        (view,) = batch.views
        codes, _, places, logits = self._guess(view)
        assert view.mask is not None
        guess = codes.repeat_interleave(view.copies, 0).scatter(1, places, logits.argmax(-1))
        truth = self.student.encoder.features.raw(view.x).repeat_interleave(view.copies, 0)
        return Rebuilt(truth, self.tokenizer.decode(guess).to(truth.dtype), view.mask.hidden)
