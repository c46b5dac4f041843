"""Which tokens of a text are hidden from an encoder that sees all places, with something else in these."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmssl.types import Mask

Rounding = Literal["random", "nearest", "up"]
ENDING, LONGEST = 0.2, 10  # of spans: the chance to end after each word, and the most words (arXiv:1907.10529, section 3.1)
MARKS = {"\u2581": True, "\u0120": True, "##": False}  # how pieces begin that open a word, or do not; of three kinds of models
BREAKS = ("\u0120", "\u010a", "\u0109", "\u010d")  # white space in byte-level pieces


class Pieces(NamedTuple):
    """What is known of each token of a vocabulary, each (V,) bool."""

    special: Tensor  # no text
    opens: Tensor  # begins a word
    closes: Tensor  # what comes after it begins one

    def words(self, ids: Tensor) -> Tensor:
        """(n,) int64: the number of the word that each token belongs to. A special token is a word by itself."""
        after = torch.cat([ids.new_ones(1).bool(), self.closes[ids[:-1]]])
        return (self.opens[ids] | after).cumsum(0) - 1


def pieces(tokenizer: Any, special: Iterable[int | None]) -> Pieces:
    """Read from a vocabulary how its pieces begin: sentencepiece's and byte-level BPE mark words, WordPiece what is none.

    Args:
        special: ids that stand for no text.
    Returns: without any mark, no token opens a word but for special ones.
    """
    names: list[str] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    counts = {mark: sum(name.startswith(mark) for name in names) for mark in MARKS}
    mark = max(counts, key=lambda m: counts[m])  # a vocabulary may hold another's mark as a character
    begin, end = ((mark,), ()) if mark != "\u0120" else (BREAKS, BREAKS)
    opens = torch.tensor([name.startswith(begin) == MARKS[mark] for name in names]) & (counts[mark] > 0)
    closes = torch.tensor([name.endswith(end) for name in names])
    none = torch.zeros(len(names), dtype=torch.bool)
    none[[i for i in special if i is not None]] = True
    return Pieces(none, opens | none, closes | none)


def budget(length: int, ratio: float, rounding: Rounding, draw: torch.Generator) -> int:
    """How many of `length` tokens to hide, at least 1.

    Args:
        rounding: of ratio * length: down after a uniform draw from [0, 1) was added (RoBERTa); to the nearest, halves to the
            even number (BERT); up (SpanBERT).
    """
    share = ratio * length
    if rounding == "random":
        share = math.floor(share + float(torch.rand((), generator=draw, dtype=torch.float64)))
    return max(1, math.ceil(share) if rounding == "up" else round(share))


def single(free: Tensor, number: int, draw: torch.Generator) -> Tensor:
    """Tokens at uniformly drawn places.

    Args:
        free: (n,) bool, True = may be hidden.
        number: how many to hide; all that are free if there are fewer.
    Returns: (n,) bool, True = masked.
    Source: arXiv:1907.11692, section 2.
    """
    return _at(_shuffled(free, draw)[:number], free)


def whole_words(word: Tensor, free: Tensor, number: int, draw: torch.Generator) -> Tensor:
    """Words in uniformly drawn order, passing over those that do not fit any more.

    Args:
        word: (n,) int64, ascending, which word each token belongs to.
        free, number: as in `single`.
    Returns: (n,) bool, True = masked, at most `number`. If no word fits, the beginning of one is hidden.
    Source: whole word masking of the authors' code of arXiv:1810.04805.
    """
    sizes, room, chosen = word.bincount().tolist(), number, []
    order = _shuffled(torch.zeros(len(sizes)).index_put((word[free],), torch.ones(())).bool(), draw)
    for one in order.tolist():
        if sizes[one] <= room:
            chosen.append(one)
            room -= sizes[one]
    hidden = torch.isin(word, torch.tensor(chosen, dtype=word.dtype)) & free
    return hidden if chosen else _beginning(word, order, number)


def word_spans(word: Tensor, free: Tensor, number: int, draw: torch.Generator) -> Tensor:
    """Spans of whole words, their lengths geometric, each from the word of a uniformly drawn token.

    A span ends before what is hidden already, may not be hidden or does not fit any more. Arguments and result as in
    `whole_words`.

    Source: arXiv:1907.10529, section 3.1. Departs from it: its code cuts the last word where the budget ends.
    """
    sizes, at = word.bincount().tolist(), word.tolist()
    starts = [0, *word.bincount().cumsum(0).tolist()]
    open_words = torch.zeros(len(sizes)).index_put((word[free],), torch.ones(())).bool().tolist()
    anchors, room, hidden = _shuffled(free, draw), number, torch.zeros_like(free)
    for anchor in anchors.tolist():
        if room and open_words[at[anchor]]:
            first = at[anchor]
            for one in range(first, min(first + span_length(draw), len(sizes))):
                if not open_words[one] or sizes[one] > room:
                    break
                hidden[starts[one] : starts[one + 1]], open_words[one] = True, False
                room -= sizes[one]
    return hidden if room < number else _beginning(word, word[anchors], number)


def span_length(draw: torch.Generator) -> int:
    """Words of a span: geometric, cut at the longest, 3.8 on average."""
    return 1 + int(torch.multinomial(LENGTHS, 1, generator=draw))


LENGTHS = (1 - ENDING) ** torch.arange(LONGEST, dtype=torch.float64)
LENGTHS /= LENGTHS.sum()


def replacing(hidden: Tensor) -> Mask:
    """The mask of these tokens, with the places that predictions are wanted for.

    Args:
        hidden: (M*B, L) bool, True = masked.
    Returns: `wanted` (M*B, 1, n), n being the most that a row hides: what is hidden first, then other places.
    """
    most = max(1, int(hidden.sum(1).max()))
    order = hidden.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return Mask.replacing(hidden)._replace(wanted=order[:, None, :most])


def _shuffled(free: Tensor, draw: torch.Generator) -> Tensor:
    places = free.nonzero().flatten()
    return places[torch.randperm(len(places), generator=draw)]


def _at(places: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill(0, places, True)


def _beginning(word: Tensor, order: Tensor, number: int) -> Tensor:
    """The first `number` tokens of the first of some words."""
    return _at((word == order[:1]).nonzero().flatten()[:number], word.bool())
