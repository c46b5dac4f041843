"""Texts for a model with a head, as the tokenizer in its folder cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from modalities.text.tokenizer import load


class Inputs:
    """Texts to `input_ids`.

    Args:
        path: of the model, in whose folder its tokenizer is.
        max_tokens: of a text, which is cut at its end; what the tokenizer says if unset.
    Raises: ValueError if there is no tokenizer, or if it takes fewer tokens.
    """

    def __init__(self, path: Any, max_tokens: int | None = None):
        self.processor = load(path)
        most = min(self.processor.model_max_length, 1 << 20)
        if max_tokens is not None and not 3 <= max_tokens <= most:
            raise ValueError(f"max_tokens: {max_tokens}, must be between 3 and the {most} that the tokenizer says")
        self.most = max_tokens or min(most, 512)

    def __call__(self, samples: Sequence[str], seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """(B, L) `input_ids` and `attention_mask`; nothing is drawn."""
        how = {"padding": True, "truncation": True, "max_length": self.most, "return_token_type_ids": False}
        return dict(self.processor([*samples], return_tensors="pt", split_special_tokens=True, **how))
