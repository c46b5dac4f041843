"""Token ids to embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmssl.model.encoder import features_of
from mmssl.model.positions import NoPositions


@features_of("text")
class TextFeatures(nn.Module):
    """Token and learned position embeddings, layer norm, dropout, as in RoBERTa or BERT. (B, L) ids -> (B, L, D).

    Position ids begin at `pad_token_id + 1` and count tokens that are not padding; padding has the row `pad_token_id`. With
    `count_padding` they begin at 0 and count all, as in BERT. With `positions` none there are none. Of `token_types` kinds of
    tokens, all are of the first.

    Where places are drawn as large as tokens (`position_std` 0.02), half of what an untrained network says of a token is its
    place. A teacher whose targets can be told by place alone teaches nothing else in a short run: draw them smaller.
    """

    input_name = "input_ids"
    normed = True

    def __init__(
        self,
        dim: int,
        vocab_size: int | None = None,
        pad_token_id: int = 1,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        mask_token_id: int | None = None,
        max_tokens: int = 512,
        norm_eps: float = 1e-5,
        input_dropout: float = 0.0,
        position_std: float = 0.02,
        count_padding: bool = False,
        token_types: int = 0,
        positions: Literal["learned", "none"] = "learned",
    ):
        super().__init__()
        if vocab_size is None:
            raise ValueError("vocab_size: missing; name a tokenizer with views.tokenizer, which decides it")
        if not 3 <= vocab_size <= 1 << 24 or not 0 <= pad_token_id < vocab_size:
            raise ValueError(f"vocab_size: {vocab_size}, must be at least 3 and more than pad_token_id {pad_token_id}")
        if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
            raise ValueError(
                f"mask_token_id: {mask_token_id} is no token of a vocabulary of {vocab_size}. Leave out vocab_size, "
                "pad_token_id and mask_token_id: the tokenizer decides them."
            )
        if not 3 <= max_tokens <= 1 << 20:
            raise ValueError(f"max_tokens: {max_tokens}, must be between 3 and {1 << 20} tokens")
        if position_std < 0:
            raise ValueError(f"position_std: {position_std}, must be at least 0")
        if not 0 <= token_types <= 1 << 10:
            raise ValueError(f"token_types: {token_types}, must be between 0 and {1 << 10}")
        self.dim, self.vocab_size, self.pad_token_id, self.max_tokens = dim, vocab_size, pad_token_id, max_tokens
        self.bos_token_id, self.eos_token_id, self.mask_id = bos_token_id, eos_token_id, mask_token_id
        self.grid, self.length = (max_tokens,), max_tokens
        self.tokens = nn.Embedding(vocab_size, dim, pad_token_id)
        self.count_padding, self.placed = count_padding, positions == "learned"
        self.places = None
        if self.placed and count_padding:
            self.places = nn.Embedding(max_tokens, dim)
        elif self.placed:
            self.places = nn.Embedding(max_tokens + pad_token_id + 1, dim, pad_token_id)
        self.types = nn.Embedding(token_types, dim) if token_types else None
        self.norm, self.dropout = nn.LayerNorm(dim, norm_eps), nn.Dropout(input_dropout)
        with torch.no_grad():
            for table, std in ((self.tokens, 0.02), (self.places, position_std), (self.types, 0.02)):
                if table is not None:
                    table.weight.normal_(std=std)
                    if table.padding_idx is not None:
                        table.weight[table.padding_idx].zero_()

    @property
    def raw_width(self) -> int:
        """Different ids."""
        return self.vocab_size

    def raw(self, x: Tensor) -> Tensor:
        """(B, L) ids, as they are."""
        return x

    def pad(self, attention_mask: Tensor) -> Tensor:
        """(B, L) as transformers has it, 1 = valid -> bool, True = padding."""
        return attention_mask == 0

    def positions(self, heads: int, extra: int) -> nn.Module:
        """They are in the features already, if there are any."""
        return NoPositions()

    def forward(self, x: Tensor) -> Tensor:
        """Look up."""
        if x.shape[1] > self.max_tokens:
            raise ValueError(f"{x.shape[1]} tokens; the longest input has {self.max_tokens} (model.max_tokens)")
        tokens = self.tokens(x)
        if self.types is not None:
            tokens = tokens + self.types(torch.zeros_like(x))
        if self.places is not None:
            tokens = tokens + self.places(self._place(x))
        return self.dropout(self.norm(tokens))

    def _place(self, x: Tensor) -> Tensor:
        """(B, L), or (1, L) where padding counts."""
        if self.count_padding:
            return torch.arange(x.shape[1], device=x.device)[None]
        valid = (x != self.pad_token_id).long()
        return valid.cumsum(1) * valid + self.pad_token_id
