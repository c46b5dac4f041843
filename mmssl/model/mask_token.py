"""What encoders that see all places find in hidden ones: a learned vector, a token of its own, other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import random
from mmssl.types import Mask, View


class MaskToken(nn.Module):
    """Replaces masked tokens for encoders that see the whole sequence.

    Features that have a token of their own for it (`mask_id`, text) get that one in their input, others a learned vector in
    place of the feature.

    Args:
        start: what the vector is drawn from, normal with std 0.02 or uniform between 0 and 1 (wav2vec 2.0 and its kin); or
            zeros (iBOT).
    """

    def __init__(self, features: Any, start: Literal["normal", "uniform", "zeros"] = "normal"):
        super().__init__()
        self.mask_id: int | None = features.mask_id
        if self.mask_id is None:
            vector = torch.zeros(features.dim)
            if start != "zeros":
                vector = vector.normal_(std=0.02) if start == "normal" else vector.uniform_()
            self.vector = nn.Parameter(vector)

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
        whole: Tensor = encoder.local(view.x) if features is None else features
        return torch.where(hidden[..., None], self.vector.to(whole.dtype), whole.repeat_interleave(view.copies, 0))


@dataclass(frozen=True)
class Corruption:
    """What takes the place of hidden ids, as shares of them; the others stay as they are. The defaults are those of RoBERTa."""

    mask: float = 0.8  # the mask token
    random: float = 0.1  # ids drawn evenly
    special: bool = False  # whether these may be the beginning, the end, padding or the mask token, as in BERT
    by: Literal["token", "span"] = "token"  # what shares one fate: a token, or hidden ones next to each other (SpanBERT)

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


def check_corruption(features: Any, corruption: Corruption, name: str) -> None:
    """Raises: ValueError if inputs are not ids, have no mask token, or if the shares are none."""
    if getattr(features, "input_name", None) != "input_ids":
        raise ValueError(f"data.modality: {name} puts other ids in hidden places, and its inputs must be ids; take text")
    if features.mask_id is None:
        raise ValueError(f"model.mask_token_id: missing; {name} puts that token in place of masked ones")
    if min(corruption.mask, corruption.random) < 0 or corruption.mask + corruption.random > 1:
        raise ValueError(
            f"corruption: mask {corruption.mask} and random {corruption.random}, must be shares that add up to at most 1"
        )


@torch.no_grad()
def corrupt(view: View, features: Any, keys: Sequence[int], corruption: Corruption) -> View:
    """A view of ids with others in its hidden places, for each of its masks: M*B rows, no mask. Drawn on their device.

    Args:
        features: of ids, see `features_of`.
        keys: B seeds, one a sample.
    Source: arXiv:1810.04805, section 3.1.
    """
    assert view.mask is not None
    hidden, ids = view.mask.hidden, view.x.repeat_interleave(view.copies, 0)  # (M*B, L)
    place = torch.arange(ids.shape[1], device=ids.device)
    # For as many tokens as there could be: what happens to one does not depend on how far its batch is padded.
    own = [random.key(key, "corruption") for key in keys]
    drawn = random.uniform(own, (view.copies, 2, features.length), ids.device)
    fate, which = drawn.flatten(0, 1)[..., : len(place)].unbind(1)  # (M*B, L)
    if corruption.by == "span":
        first = hidden & ~F.pad(hidden, (1, -1))
        fate = fate.gather(1, torch.where(first, place, 0).cummax(1).values)
    kept = 1 - corruption.mask - corruption.random
    ids = torch.where(hidden & (fate >= kept), _evenly(which, features, corruption.special), ids)
    ids = ids.masked_fill(hidden & (fate >= 1 - corruption.mask), features.mask_id)
    return View(ids, view.modality, None if view.pad is None else view.pad.repeat_interleave(view.copies, 0))


def asked(mask: Mask) -> Tensor:
    """(M*B, n) places among which are all hidden ones, as few as a mask tells without a look at its values."""
    if mask.wanted is not None:
        return mask.wanted.flatten(1)
    return mask.rest if mask.count else mask.keep


def _evenly(drawn: Tensor, features: Any, special: bool) -> Tensor:
    """Ids for numbers from [0, 1): of the whole vocabulary, or without special ones."""
    known = (features.pad_token_id, features.bos_token_id, features.eos_token_id, features.mask_id)
    out = [] if special else sorted({one for one in known if one is not None})
    count = features.vocab_size - len(out)
    ids = (drawn * count).long().clamp(max=count - 1)
    for one in out:
        ids = ids + (ids >= one)
    return ids
