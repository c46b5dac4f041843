"""A learned vector in place of what is hidden."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl.types import View


class MaskToken(nn.Module):
    """Replaces masked tokens for encoders that see the whole sequence.

    Features that have a token of their own for it (`mask_id`, text) get that one in their input, others a learned vector in
    place of the feature.

    Args:
        start: what the vector is drawn from, normal with std 0.02 or uniform between 0 and 1 (wav2vec 2.0 and its kin).
    """

    def __init__(self, features: Any, start: Literal["normal", "uniform"] = "normal"):
        super().__init__()
        self.mask_id: int | None = features.mask_id
        if self.mask_id is None:
            vector = torch.empty(features.dim)
            self.vector = nn.Parameter(vector.normal_(std=0.02) if start == "normal" else vector.uniform_())

    def forward(self, encoder: Any, view: View, features: Tensor | None = None) -> Tensor:
        """Features (M*B, L, D) of a view with its masked places replaced.

        Args:
            encoder: computes features where they are not given, or must be computed from replaced input.
            features: (B, L, D) of the whole view, if they are there already.
        """
        assert view.mask is not None
        hidden = view.mask.hidden  # (M*B, L)
        if self.mask_id is not None:
            return encoder.features(view.x.repeat_interleave(view.copies, 0).masked_fill(hidden, self.mask_id))
        whole: Tensor = encoder.features(view.x) if features is None else features
        return torch.where(hidden[..., None], self.vector.to(whole.dtype), whole.repeat_interleave(view.copies, 0))
