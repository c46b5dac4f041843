"""Text to views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.masks import spans, uniform
from mmssl.registry import Views
from mmssl.types import Mask, Rejected, View
from modalities.text.augment import Crop, one_by_one, view
from modalities.text.masks import Pieces, Rounding, budget, pieces, replacing, single, whole_words, word_spans
from modalities.text.tokenizer import TRAIN, begin_id, encode, end_id, load

WORDS = {"word": whole_words, "wordspan": word_spans}
LEAVE = "Leave out model.vocab_size, model.pad_token_id and model.mask_token_id: the tokenizer decides them."


@dataclass(frozen=True)
class MaskOptions:
    """Which tokens to hide; the defaults are those of the text base recipe of data2vec 2.0.

    `uniform` and `span` hide as many in each row, for encoders that see visible tokens only. `token` (RoBERTa, BERT), `word`
    (whole words) and `wordspan` (spans of whole words, SpanBERT) are for encoders that see all places, with something else in
    the hidden ones; they hide at least one token, and no special one unless `ends`.
    """

    kind: Literal["uniform", "span", "token", "word", "wordspan"] = "uniform"
    ratio: float = 0.48
    width: int = 4  # of the spans of `span`
    copies: int = 8
    rounding: Rounding = "random"  # of ratio times tokens: by chance (RoBERTa), to the nearest (BERT), up (SpanBERT)
    most: int | None = None  # tokens of a row that are hidden
    ends: bool = False  # whether beginning and end of a text may be hidden, as in RoBERTa

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class TextViews(Views):
    """Token ids with their masks, of a whole text or of several crops of it.

    Nothing in the ids tells what is masked: the mask token is never among them.
    """

    count, crops = 1, 0

    def __init__(
        self,
        features: Any,
        tokenizer: str | None = None,
        pack: bool = True,
        mask: MaskOptions | None = None,
        crops: list[Crop] | str | None = None,
    ):
        """Check the options; the tokenizer is loaded when it is needed.

        Args:
            tokenizer: folder or Hub id.
            pack: whether samples are blocks across documents, all full, or documents by themselves.
            crops: what views there are, or the name of a policy, see `modalities.text.augment`; as an attribute how many of
                them are smaller ones, which come without masks.
        """
        if mask is not None:
            if not 0 < mask.ratio < 1 or not 1 <= mask.copies <= 1024:
                raise ValueError("mask: ratio must be above 0 and below 1, copies between 1 and 1024")
            if not 1 <= mask.width < features.max_tokens:
                raise ValueError(f"mask.width: {mask.width}, must be between 1 and {features.max_tokens - 1} tokens")
            if mask.most is not None and mask.most < 1:
                raise ValueError(f"mask.most: {mask.most}, must be at least 1 token")
        self.vocab_size, self.pad_id, self.max_tokens = features.vocab_size, features.pad_token_id, features.max_tokens
        self.mask_id = features.mask_id
        self.name, self.pack, self.mask = tokenizer, pack, mask
        self.replaces = mask is not None and mask.kind in ("token", *WORDS)  # masks are for encoders that see all places
        self.ragged, self.longest = not pack or self.replaces, None if pack else features.max_tokens
        self.kinds, self.count = one_by_one(crops)
        self.crops = len(self.kinds) - self.count if self.kinds else 0

    @cached_property
    def tokenizer(self) -> Any:
        """Raises: ValueError if there is none, or none that fits the model."""
        tokenizer = _load(self.name)
        if len(tokenizer) > self.vocab_size:
            raise ValueError(f"model.vocab_size: {self.vocab_size}, but {self.name} has {len(tokenizer)} tokens. {LEAVE}")
        if tokenizer.pad_token_id != self.pad_id:
            raise ValueError(f"model.pad_token_id: {self.pad_id}, but {self.name} pads with {tokenizer.pad_token_id}. {LEAVE}")
        if self.mask_id not in (None, tokenizer.mask_token_id):
            raise ValueError(
                f"model.mask_token_id: {self.mask_id}, but {self.name} masks with {tokenizer.mask_token_id}. {LEAVE}"
            )
        if self.mask is not None and self.mask.kind in WORDS:
            known = _known(tokenizer)
            if not bool((known.opens & ~known.special).any()):
                raise ValueError(
                    f"views.mask.kind: {self.mask.kind}, but pieces of {self.name} do not tell where words begin; take token"
                )
        return tokenizer

    @cached_property
    def pieces(self) -> Pieces:
        """What the masks must know of each token."""
        return _known(self.tokenizer)

    def __call__(
        self, sample: str | np.ndarray, draw: Callable[[int], torch.Generator], length: int | None = None
    ) -> dict[str, Tensor]:
        """The ids of one sample, or of all views that `crops` lists; of a text that is too long, a window at a random place.

        Args:
            sample: text, or token ids as `prepare` makes them.
            length: not used, since text is padded rather than cut.
        Returns: x (n,) int64, and the seed () int64 of its masks. Where `crops` is given, the names of view i begin with `i.`,
            and its record is beside them; all views are of one window.
        Raises: Rejected if the text has no token, or none that could be hidden.
        """
        first = draw(0)
        ids, begun = self._ids(sample), 0
        if len(ids) > self.max_tokens:
            room = self.max_tokens - 2
            begun = int(torch.randint(len(ids) - 1 - room, (), generator=first))
            ids = torch.cat([ids[:1], ids[1 + begun : 1 + begun + room], ids[-1:]])
        if self.replaces and bool(self.pieces.special[ids].all()):
            raise Rejected("empty", "special tokens only")
        if not self.kinds:
            return {"x": ids, "seed": _seed(first)}
        closed = isinstance(sample, str) or not self.pack
        tokens, end = (ids[1:-1], ids[-1:]) if closed else (ids[1:], ids[:0])
        if not len(tokens):
            raise Rejected("empty", "no token")
        found = {}
        for i, crop in enumerate(self.kinds):
            own = draw(i) if i else first
            run, record = view(tokens, crop, own)
            record["start"] += begun
            tensors = {"x": torch.cat([ids[:1], run, end]), "seed": _seed(own)}
            tensors |= {name: torch.tensor(value) for name, value in record.items()}
            found |= {f"{i}.{name}": tensor for name, tensor in tensors.items()}
        return found

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[View]:
        """Pad each view to its longest; the masks of a sample stay adjacent."""
        views = []
        for i, prefix in enumerate([f"{i}." for i in range(len(self.kinds))] or [""]):
            own = [{k.removeprefix(prefix): v for k, v in sample.items() if k.startswith(prefix)} for sample in samples]
            made = self._view([sample["x"] for sample in own])
            mask = self._masks(own, made.pad) if self.mask is not None and i < self.count else None
            record = {k: torch.stack([sample[k] for sample in own]) for k in own[0] if k not in ("x", "seed")}
            views.append(made._replace(mask=mask, record=record))
        return views

    def plain(self, samples: Sequence[str | np.ndarray]) -> View:
        """The beginning of each text. Raises: Rejected if one has no token."""
        rows = [self._ids(sample) for sample in samples]
        most = self.max_tokens
        return self._view([torch.cat([ids[: most - 1], ids[-1:]]) if len(ids) > most else ids for ids in rows])

    def _ids(self, sample: str | np.ndarray) -> Tensor:
        """With beginning and end; a block of packed text has a beginning only."""
        begin, end = [begin_id(self.tokenizer)], [end_id(self.tokenizer)]
        if isinstance(sample, str):
            (ids,) = encode(self.tokenizer, [sample])
            if not len(ids):
                raise Rejected("empty", "no token")
            return torch.from_numpy(np.concatenate([begin, ids, end]))
        return torch.from_numpy(np.concatenate([begin, sample]) if self.pack else sample)

    def _view(self, rows: Sequence[Tensor]) -> View:
        lengths = torch.tensor([len(ids) for ids in rows])
        pad = torch.arange(int(lengths.max())) >= lengths[:, None]
        x = torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=float(self.pad_id))
        return View(x, "text", pad if bool(pad.any()) else None)

    def _masks(self, samples: Sequence[dict[str, Tensor]], pad: Tensor | None) -> Mask:
        """Each sample's own, from its seed, over its valid tokens."""
        draws = [torch.Generator().manual_seed(int(sample["seed"])) for sample in samples]
        longest = max(len(sample["x"]) for sample in samples)
        if self.replaces:
            rows = [self._replaced(sample["x"], draw) for sample, draw in zip(samples, draws)]
            return replacing(torch.cat([F.pad(hidden, (0, longest - hidden.shape[1])) for hidden in rows]))
        drawn = [self._hidden(len(sample["x"]), draw) for sample, draw in zip(samples, draws)]
        # All rows keep as many places, some of them padding. Hence a row can hide no more than another one hides and pads.
        most = min(longest - hidden.shape[1] + int(hidden[0].sum()) for hidden in drawn)
        rows = [_at_most(hidden, most, draw) for hidden, draw in zip(drawn, draws)]
        return Mask.of(torch.cat([F.pad(hidden, (0, longest - hidden.shape[1])) for hidden in rows]), pad)

    def _hidden(self, length: int, draw: torch.Generator) -> Tensor:
        """(M, length) bool; short texts get narrower spans."""
        m = self.mask
        assert m is not None
        if m.kind == "span":
            return spans(length, m.copies, m.ratio, min(m.width, length - 1), draw)
        return uniform(length, m.copies, m.ratio, draw)

    def _replaced(self, ids: Tensor, draw: torch.Generator) -> Tensor:
        """(M, length) bool; what could be hidden is no reason to count less of the length."""
        m = self.mask
        assert m is not None
        free = torch.ones_like(ids, dtype=torch.bool) if m.ends else ~self.pieces.special[ids]
        rows = torch.zeros(m.copies, len(ids), dtype=torch.bool)
        for row in rows if bool(free.any()) else ():
            number = min(budget(len(ids), m.ratio, m.rounding, draw), m.most or len(ids))
            choose = WORDS.get(m.kind)
            row[:] = choose(self.pieces.words(ids), free, number, draw) if choose else single(free, number, draw)
        return rows


def configure(model: dict[str, Any], views: dict[str, Any]) -> dict[str, Any]:
    """The model's options with what the tokenizer decides, unless `vocab_size` is given. Raises: ValueError as `tokenizer`."""
    if model.get("vocab_size") is not None:
        return model
    tokenizer = _load(views.get("tokenizer"))
    return model | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "bos_token_id": begin_id(tokenizer),
        "eos_token_id": end_id(tokenizer),
    }


def _known(tokenizer: Any) -> Pieces:
    marks = ("pad_token_id", "mask_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return pieces(tokenizer, [getattr(tokenizer, name) for name in marks])


def _seed(draw: torch.Generator) -> Tensor:
    return torch.randint(1 << 62, (), generator=draw)


def _load(name: str | None) -> Any:
    if name is None:
        raise ValueError(f"views.tokenizer: missing; {TRAIN.format('FOLDER')}")
    try:
        return load(name)
    except ValueError as error:
        raise ValueError(f"views.{error}") from None


def _at_most(hidden: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """Rows that hide `most` tokens if they hid more; which ones is drawn."""
    if int(hidden[0].sum()) <= most:
        return hidden
    order = (torch.rand(hidden.shape, generator=draw) + hidden).argsort(dim=1, descending=True)
    return torch.zeros_like(hidden).scatter_(1, order[:, :most], True)
