"""Causal language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmssl import losses
from mmssl.methods.method import Method
from mmssl.model.encoder import Encoder
from mmssl.model.lm_head import Tied
from mmssl.parts import Network
from mmssl.types import Batch, Clock, Rebuilt, StepOutput


class CausalLM(Method):
    """Radford et al. 2018 (GPT), 2019 (GPT-2), Brown et al. 2020, arXiv:2005.14165: the next token from those before it.

    As in GPT-2, layers that write into the residual stream begin smaller, by the root of their number, and logits are products
    with the embeddings.
    """

    paper, family, modalities, coverage = "arXiv:2005.14165", "predictive", ("text",), (25,)

    def __init__(self, encoder: Encoder):
        super().__init__()
        if getattr(getattr(encoder, "features", None), "input_name", None) != "input_ids":
            raise ValueError("data.modality: causal_lm says the next id, and its inputs must be ids; take text")
        if not encoder.transformer.causal:
            raise ValueError("model.causal: false, and causal_lm would see the tokens that it predicts; set it to true")
        if encoder.transformer.extra_tokens:
            raise ValueError("model.extra_tokens: 1, but a text begins with a token of its own; set it to 0")
        self.student = Network(encoder=encoder)
        self.head = Tied(encoder.features.tokens, bias=False)
        shrink_residuals(encoder)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """All next tokens in one pass."""
        (view,), encoder = batch.views, self.student.encoder
        seen = encoder(view)  # tokens (B, L, D)
        logits = self.head(seen.tokens)  # (B, L, V)
        right = logits[:, :-1].detach().argmax(-1) == view.x[:, 1:]
        right = right if view.pad is None else right & ~view.pad[:, 1:]
        health = {
            "accuracy": right.sum() / self.terms(batch).clamp(min=1),
            "prediction_std": losses.token_std(seen.tokens, pad=view.pad),
        }
        return StepOutput({"next": losses.next_token(logits, view.x, view.pad)}, health, encoder.pool(seen).detach())

    @torch.no_grad()
    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """The likeliest tokens, given those that really came before them."""
        (view,) = batch.views
        guess = self.head(self.student.encoder(view).tokens).argmax(-1)  # of the next ones
        asked = torch.ones_like(view.x, dtype=torch.bool) if view.pad is None else ~view.pad
        asked[:, 0] = False
        return Rebuilt(view.x, torch.cat([view.x[:, :1], guess[:, :-1]], 1), asked)

    def terms(self, batch: Batch) -> Tensor:
        """Tokens that have one before them."""
        (view,) = batch.views
        later = view.x[:, 1:]
        return (torch.ones_like(later) if view.pad is None else ~view.pad[:, 1:]).sum()


@torch.no_grad()
def shrink_residuals(encoder: Encoder) -> None:
    """Divide the weights at the end of each residual branch by the root of how many branches there are."""
    blocks: list[Any] = encoder.compilable()
    ends = [layer for block in blocks for layer in (block.attn.proj, block.mlp.fc2)]
    for layer in ends:
        layer.weight /= len(ends) ** 0.5
