"""data2vec."""

from __future__ import annotations

from typing import Literal

from torch import nn

from mmssl import losses
from mmssl.losses import Norm, average_layers, token_std
from mmssl.methods.method import Method, check_error, check_layers, masked_share
from mmssl.model.encoder import Encoder
from mmssl.model.mask_token import MaskToken
from mmssl.parts import Network, Teacher
from mmssl.schedules import Schedule, linear
from mmssl.types import Batch, Clock, StepOutput


class Data2Vec1(Method):
    """Baevski et al. 2022, arXiv:2202.03555: regress the teacher's layers where the student's input was replaced."""

    paper, family, modalities, coverage = "arXiv:2202.03555", "masked", ("vision", "speech", "spectrogram", "text"), (19,)
    masks = True

    def __init__(
        self,
        encoder: Encoder,
        top_k: int = 8,
        collect: Literal["ffn", "block"] = "ffn",
        each_norm: Norm = "instance",
        final_norm: Norm = "none",
        loss_scale: float | None = None,
        beta: float = 0.0,
        head_hidden: int = 0,
        mask_start: Literal["normal", "uniform"] = "normal",
        momentum: Schedule = linear(0.999, 0.9999, steps=30_000),
        teacher_features: Literal["average", "copy", "share"] = "average",
        teacher_positions: Literal["average", "copy"] = "average",
    ):
        super().__init__()
        check_layers(encoder, top_k)
        check_error(loss_scale, beta)
        if not 0 <= head_hidden <= 1 << 17:
            raise ValueError(f"head_hidden: {head_hidden}, must be between 0 (a single linear layer) and {1 << 17}")
        if encoder.features.input_name == "input_ids" and encoder.features.mask_id is None:
            raise ValueError("model.mask_token_id: missing; data2vec1 puts that token in place of masked ones")
        self.student = Network(encoder=encoder)
        self.teacher = Teacher(self.student, momentum, teacher_features, teacher_positions)
        self.mask_token = MaskToken(encoder.features, mask_start)
        dim = encoder.dim
        wide = nn.Sequential(nn.Linear(dim, head_hidden), nn.GELU(), nn.Linear(head_hidden, dim)) if head_hidden else None
        self.head = wide or nn.Linear(dim, dim)
        self.head.apply(_init)
        self.top_k, self.loss_scale, self.beta = top_k, loss_scale, beta
        self.collect: Literal["ffn", "block"] = collect
        self.each_norm: Norm = each_norm
        self.final_norm: Norm = final_norm

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Tokens under the mask from all tokens, those under the mask replaced."""
        (view,), encoder = batch.views, self.student.encoder
        if view.mask is None:
            raise ValueError("views.mask: data2vec1 needs masks")
        # Text is masked in its ids; features of the whole input are then of no use to the student.
        features = (
            None if self.mask_token.mask_id is not None and not self.teacher.shares else encoder.local(view.x)
        )  # (B, L, D)
        whole = self.teacher.encode(view, features, self.collect)
        target = average_layers(whole.layers, self.top_k, self.each_norm, self.final_norm, view.pad).detach()  # (B, L, D)
        pad = None if view.pad is None else view.pad.repeat_interleave(view.copies, 0)
        replaced = self.mask_token(encoder, view, features)  # (M*B, L, D)
        seen = encoder.contextualize(replaced, pad=pad)  # tokens (M*B, L, D)
        rebuilt = self.head(seen.tokens)
        terms = {"tokens": losses.data2vec_regression(rebuilt, target, view.mask, self.loss_scale, self.beta)}
        health = {
            "target_std": token_std(target, view.mask),
            "prediction_std": token_std(rebuilt, view.mask),
            "feature_std": token_std(replaced, pad=pad) if features is None else token_std(features, pad=view.pad),
            "encoder_std": token_std(seen.tokens, pad=pad),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput(terms, health, pooled)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
