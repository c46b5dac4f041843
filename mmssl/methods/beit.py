"""BEiT."""

from __future__ import annotations

from torch import nn

from mmssl import losses
from mmssl.methods.method import Method, Normal, check_raw, masked_share
from mmssl.model.encoder import Encoder, init_linear
from mmssl.model.mask_token import MaskToken
from mmssl.model.positions import take_at
from mmssl.model.token_decoder import hidden_places
from mmssl.parts import Network
from mmssl.parts.tokenizer import CodeTargets, Tokenizer, TokenizerOptions
from mmssl.types import Batch, Clock, StepOutput


class BEiT(CodeTargets, Method):
    """Bao et al. 2021, arXiv:2106.08254: say the codes of the patches that a token stands in for.

    Departs from the paper in the tokenizer, which is fitted to the data before the first pass or drawn, see
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
        self.tokenizer = Tokenizer(encoder.features.raw_width, tokenizer)
        self.head = nn.Linear(encoder.dim, tokenizer.codes)
        self.head.apply(init_linear)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Cross entropy of the masked patches' codes."""
        (view,), encoder = batch.views, self.student.encoder
        if view.mask is None:
            raise ValueError("views.mask: beit needs masks")
        codes = self.tokenizer(encoder.features.raw(view.x))  # (B, L)
        seen = encoder.contextualize(self.mask_token(encoder, view))  # tokens (M*B, L, D)
        places = hidden_places(view.mask)  # (M*B, n)
        logits, wanted = self.head(take_at(seen.tokens, places)), take_at(codes, places)
        hidden = view.mask.hidden.gather(1, places)
        health = {
            "code_use": self.tokenizer.use(codes),
            "encoder_std": losses.token_std(seen.tokens),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput({"codes": losses.masked_cross_entropy(logits, wanted, hidden)}, health, pooled)
