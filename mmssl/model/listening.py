"""How wav2vec 2.0 and HuBERT listen: to a wave as it is, and to one in which frames are hidden."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from mmssl.model.mask_token import MaskToken
from mmssl.types import View


class Heard(NamedTuple):
    """What the convolutions make of a view, on its way to the transformer."""

    raw: Tensor  # (B, L, C) before the norm
    frames: Tensor  # (B, L, C) normalised, nothing hidden
    tokens: Tensor  # (M*B, L, D) projected, hidden ones replaced


class Listening(nn.Module):
    """Convolutions, norm, projection, dropout, then a learned vector in hidden places.

    Args:
        dropout: of what is projected.
        grad_scale: factor of the gradient that the convolutions get.
        name: of the method, for messages.
    Raises: ValueError that begins with the option that is wrong.
    Source: arXiv:2006.11477, section 2; the factor, as in the authors' code.
    """

    def __init__(self, encoder: Any, dropout: float, grad_scale: float, name: str):
        super().__init__()
        if not hasattr(getattr(encoder, "features", None), "listen"):
            raise ValueError(f"data.modality: {name} learns from frames of waves; take speech")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout}, must be at least 0 and below 1")
        self.dropout, self.grad_scale = nn.Dropout(dropout), grad_scale
        self.mask_token = MaskToken(encoder.features, "uniform")

    def forward(self, encoder: Any, view: View) -> Heard:
        """view: with a mask."""
        features = encoder.features
        raw = features.listen(view.x)
        if raw.requires_grad and self.grad_scale != 1:
            raw.register_hook(lambda gradient: gradient * self.grad_scale)
        frames = features.norm(raw)
        return Heard(raw, frames, self.mask_token(encoder, view, self.dropout(features.proj(frames))))
