"""data2vec 2.0."""

from __future__ import annotations

from typing import Literal

from mmssl import losses
from mmssl.losses import Norm, average_layers, token_std
from mmssl.methods.method import Method, check_error, check_layers, masked_share
from mmssl.model.decoder import ConvDecoder, ConvDecoderOptions
from mmssl.model.encoder import Encoder, mean_tokens
from mmssl.parts import Network, Teacher
from mmssl.schedules import Schedule, linear
from mmssl.types import Batch, Clock, StepOutput


class Data2Vec2(Method):
    """Baevski et al. 2022, arXiv:2212.07525: regress the teacher's layers under several masks of each sample."""

    paper, family, modalities, coverage = "arXiv:2212.07525", "masked", ("vision", "speech", "spectrogram", "text"), (18,)
    masks = drops = True

    def __init__(
        self,
        encoder: Encoder,
        decoder: ConvDecoderOptions = ConvDecoderOptions(),
        top_k: int = 10,
        each_norm: Norm = "instance",
        final_norm: Norm = "layer",
        loss_scale: float | None = None,
        beta: float = 0.0,
        cls_weight: float = 2.56,
        momentum: Schedule = linear(0.9998, 0.99999, steps=100_000),
        teacher_features: Literal["average", "share"] = "average",
    ):
        super().__init__()
        check_layers(encoder, top_k)
        check_error(loss_scale, beta)
        if cls_weight < 0:
            raise ValueError(f"cls_weight: {cls_weight}, must be at least 0")
        if cls_weight and not encoder.transformer.extra_tokens:
            raise ValueError("cls_weight: needs model.extra_tokens of at least 1, or set it to 0")
        if cls_weight and final_norm != "layer":
            raise ValueError("cls_weight: needs final_norm=layer, without which the mean of the targets is zero")
        self.student = Network(encoder=encoder)
        self.teacher = Teacher(self.student, momentum, teacher_features)
        self.decoder = ConvDecoder(encoder.dim, encoder.features.grid, decoder)
        # The authors' 0.01 multiplies a sum over the 16 x 16 rows of one device; as a mean it is 2.56.
        self.top_k, self.cls_weight = top_k, cls_weight
        self.each_norm: Norm = each_norm
        self.final_norm: Norm = final_norm
        self.loss_scale, self.beta = loss_scale, beta

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Tokens under the mask from the visible ones, and the mean target from cls."""
        (view,), encoder = batch.views, self.student.encoder
        if view.mask is None:
            raise ValueError("views.mask: data2vec2 needs masks")
        features = encoder.local(view.x)  # (B, L, D), shared by the M masks
        whole = self.teacher.encode(view, features, collect="ffn")  # once, whatever M
        # (B, L, D), a constant even to the input
        target = average_layers(whole.layers, self.top_k, self.each_norm, self.final_norm, view.pad).detach()
        visible = encoder.contextualize(features, view.mask, pad=view.pad)  # tokens (M*B, L_visible, D)
        rebuilt = self.decoder(visible.tokens, view.mask, batch.keys, view.pad)  # (M*B, L, D)
        terms = {"tokens": losses.data2vec_regression(rebuilt, target, view.mask, self.loss_scale, self.beta)}
        if self.cls_weight and visible.cls is not None:
            mean = mean_tokens(target, view.pad)
            terms["cls"] = self.cls_weight * losses.data2vec_regression(visible.cls, mean, None, self.loss_scale)
        health = {
            "target_std": token_std(target, view.mask),
            "prediction_std": token_std(rebuilt, view.mask),
            "feature_std": token_std(features, pad=view.pad),
            "encoder_std": token_std(visible.tokens, pad=visible.pad),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(visible).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput(terms, health, pooled)
