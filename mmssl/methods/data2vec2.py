"""data2vec 2.0."""

from __future__ import annotations

from mmssl import losses
from mmssl.losses import average_layers, token_std
from mmssl.methods.method import Method
from mmssl.model.decoder import ConvDecoder, ConvDecoderOptions
from mmssl.model.encoder import Encoder
from mmssl.parts import Network, Teacher
from mmssl.schedules import Schedule, linear
from mmssl.types import Batch, Clock, StepOutput


class Data2Vec2(Method):
    """Baevski et al. 2022, arXiv:2212.07525: regress the teacher's layers under several masks of each sample."""

    paper, family, modalities, coverage = "arXiv:2212.07525", "masked", ("vision",), (18,)
    masks = True

    def __init__(
        self,
        encoder: Encoder,
        decoder: ConvDecoderOptions = ConvDecoderOptions(),
        top_k: int = 10,
        cls_weight: float = 2.56,
        momentum: Schedule = linear(0.9998, 0.99999, steps=100_000),
    ):
        super().__init__()
        if not 0 < top_k <= len(encoder.transformer.blocks):
            raise ValueError(f"top_k: {top_k} layers to average, the trunk has {len(encoder.transformer.blocks)} (model.depth)")
        if cls_weight < 0:
            raise ValueError(f"cls_weight: {cls_weight}, must be at least 0")
        if cls_weight and not encoder.transformer.extra_tokens:
            raise ValueError("cls_weight: needs model.extra_tokens of at least 1, or set it to 0")
        self.student = Network(encoder=encoder)
        self.teacher = Teacher(self.student, momentum)
        self.decoder = ConvDecoder(encoder.dim, encoder.features.grid, decoder)
        # The authors' 0.01 multiplies a sum over the 16 x 16 rows of one device; as a mean it is 2.56.
        self.top_k, self.cls_weight = top_k, cls_weight

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Tokens under the mask from the visible ones, and the mean target from cls."""
        (view,), encoder = batch.views, self.student.encoder
        if view.mask is None:
            raise ValueError("views.mask: data2vec2 needs masks")
        whole = self.teacher.encoder(view, collect="ffn")  # once, whatever M
        target = average_layers(whole.layers, self.top_k).detach()  # (B, L, D), a constant even to the input
        features = encoder.features(view.x)  # (B, L, D), shared by the M masks
        visible = encoder.contextualize(features, view.mask)  # tokens (M*B, L_visible, D)
        rebuilt = self.decoder(visible.tokens, view.mask, batch.keys)  # (M*B, L, D)
        terms = {"tokens": losses.data2vec_regression(rebuilt, target, view.mask)}
        if self.cls_weight and visible.cls is not None:
            terms["cls"] = self.cls_weight * losses.data2vec_regression(visible.cls, target.mean(1))
        health = {
            "target_std": token_std(target, view.mask),
            "prediction_std": token_std(rebuilt, view.mask),
            "feature_std": token_std(features),
        }
        pooled = encoder.pool(visible).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput(terms, health, pooled)
