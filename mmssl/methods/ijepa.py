"""I-JEPA."""

from __future__ import annotations

from typing import Any, Literal

from mmssl import losses
from mmssl.losses import Norm, average_layers, token_std
from mmssl.methods.method import AtLeast0, Method, Natural, check_layers, masked_share
from mmssl.model.encoder import Encoder, init_linear
from mmssl.model.positions import take_at
from mmssl.model.token_decoder import TokenDecoder, TokenDecoderOptions
from mmssl.parts import Network, Teacher
from mmssl.schedules import Schedule, linear
from mmssl.types import Batch, Clock, StepOutput


class IJEPA(Method):
    """Assran et al. 2023, arXiv:2301.08243: from one block of an image, predict the teacher's features of other blocks."""

    paper, family, modalities, coverage = "arXiv:2301.08243", "predictive", ("vision",), ()
    masks, drops, exports = True, True, "teacher"

    def __init__(
        self,
        encoder: Encoder,
        predictor: TokenDecoderOptions = TokenDecoderOptions(384, 6, 12),
        beta: AtLeast0 = 1.0,
        top_k: Natural = 0,
        collect: Literal["ffn", "block"] = "ffn",
        each_norm: Norm = "instance",
        momentum: Schedule = linear(0.996, 1.0),
    ):
        """
        Args:
            beta: where the error becomes linear; 0 for the squared error, which the paper's text has.
            top_k: the teacher's last layers whose mean is the target, as in data2vec; 0 for what it says in the end, as in the
                paper.
            collect, each_norm: of these layers, what their MLPs give or they themselves, and how each is normalised.
        """
        super().__init__()
        if top_k:
            check_layers(encoder, top_k)
        self.student = Network(encoder=encoder)
        self.teacher = Teacher(self.student, momentum, lag=1)
        self.predictor = TokenDecoder(encoder.dim, encoder.dim, encoder.features.grid, predictor)
        self.predictor.apply(init_linear)
        self.beta, self.top_k = beta, top_k
        self.collect: Literal["ffn", "block"] = collect
        self.each_norm: Norm = each_norm

    @classmethod
    def check_mask(cls, mask: Any) -> None:
        """Groups of places are wanted."""
        if getattr(mask, "kind", None) != "multiblock":
            raise ValueError("views.mask.kind: ijepa needs groups of places to predict; set it to multiblock")

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Each block apart from the others; the teacher sees the whole image."""
        (view,), encoder = batch.views, self.student.encoder
        if view.mask is None or view.mask.wanted is None:
            raise ValueError("views.mask.kind: ijepa needs groups of places to predict; set it to multiblock")
        context = encoder(view, view.mask)  # tokens (M*B, L_visible, D)
        whole = self.teacher.encode(view, None, self.collect if self.top_k else None)
        tokens = average_layers(whole.layers, self.top_k, self.each_norm, "none") if self.top_k else whole.tokens
        guess = self.predictor(context, view.mask)  # (M*B*K, n, D)
        target = take_at(tokens, view.mask.wanted.flatten(0, 1))
        health = {
            "target_std": token_std(whole.tokens),  # before they are normalised, which would hide a collapse
            "prediction_std": token_std(guess),
            "encoder_std": token_std(context.tokens),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(context).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput({"features": losses.ijepa(guess, target, self.beta)}, health, pooled)
