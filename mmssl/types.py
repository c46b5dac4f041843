"""What crosses module boundaries: tensors in NamedTuples. The file to read first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which tokens the student does not see. The rows of one sample's masks are adjacent, all rows keep as many tokens."""

    hidden: Tensor  # (M*B, L) bool, True = masked
    keep: Tensor  # (M*B, L_visible) visible positions, ascending; where a row has fewer, padding fills it up
    restore: Tensor  # (M*B, L) order that puts visible + filler tokens back in place
    wanted: Tensor | None = (
        None  # (M*B, K, n) places of K groups to predict, one apart from the other; None: all that is hidden
    )

    @classmethod
    def of(cls, hidden: Tensor, pad: Tensor | None = None) -> Mask:
        """Index a boolean mask.

        Args:
            hidden: (M*B, L) bool, True = masked.
            pad: (B, L) bool, True = padding. Padding is neither masked nor needed: a row that keeps fewer tokens than
                another keeps some of its padding too.
        Raises: ValueError if rows without padding keep different numbers of tokens, if padding is masked, or if nothing or
            everything of a row is visible.
        """
        if pad is None:
            waste = torch.zeros_like(hidden)
        else:
            waste = pad.repeat_interleave(hidden.shape[0] // pad.shape[0], 0)
            if bool((hidden & waste).any()):
                raise ValueError("mask: padding must not be masked")
        visible = (~hidden & ~waste).sum(1)
        kept = int(visible.max())
        if not bool((visible + waste.sum(1) >= kept).all()):
            raise ValueError(f"mask: rows keep between {int(visible.min())} and {int(visible.max())} tokens, they must agree")
        if not (bool((visible > 0).all()) and bool(hidden.any(1).all())):
            raise ValueError(
                f"mask: {int(visible.min())} of {hidden.shape[1]} tokens stay visible in a row; "
                "at least one must be visible and one hidden"
            )
        order = (waste.to(torch.uint8) + 2 * hidden.to(torch.uint8)).argsort(dim=1, stable=True)  # visible, padding, hidden
        keep = order[:, :kept].sort(1).values
        rest = torch.ones_like(hidden).scatter_(1, keep, False)
        return cls(hidden, keep, rest.to(torch.uint8).argsort(dim=1, stable=True).argsort(dim=1))

    @classmethod
    def replacing(cls, hidden: Tensor) -> Mask:
        """A mask whose places the encoder sees with something else in them: rows may hide any number of tokens, even none.

        Args:
            hidden: (M*B, L) bool, True = masked.
        """
        everywhere = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape)
        return cls(hidden, everywhere, everywhere)

    def complement(self) -> Mask:
        """The mask that hides what this one shows, where nothing is padding. It asks the device nothing."""
        rest = self.rest
        return Mask(~self.hidden, rest, torch.cat([rest, self.keep], dim=1).argsort(dim=1))

    @property
    def rest(self) -> Tensor:
        """(M*B, L - L_visible) the other places, ascending: those that fillers take."""
        return self.restore.argsort(dim=1)[:, self.keep.shape[1] :]

    @property
    def count(self) -> int:
        """Places per row that fillers take: masked tokens, and padding beyond what is kept."""
        return self.hidden.shape[1] - self.keep.shape[1]


class View(NamedTuple):
    """One version of each sample of a batch."""

    x: Tensor  # vision (B, C, H, W) | speech (B, samples) | spectrogram (B, T, F) | text (B, L) ids
    modality: str  # a registry name
    pad: Tensor | None = None  # (B, L) bool, True = padding; in tokens or frames, not in samples of sound
    mask: Mask | None = None  # drawn with the view; rows (M*B, L)
    record: dict[str, Tensor] = {}  # how the view was made, each (B, ...): box, flip, gain ...; what a modality can tell

    @property
    def copies(self) -> int:
        """M, masks per sample."""
        return 1 if self.mask is None else self.mask.hidden.shape[0] // self.x.shape[0]


class Batch(NamedTuple):
    """Views of the same B samples."""

    views: list[View]  # global crops first, then local crops
    index: Tensor  # (B,) position of each sample in the data set
    keys: tuple[int, ...] = ()  # one per sample and step: seeds of draws on the device, the same on any number of ranks

    def tensors(self) -> dict[str, Tensor]:
        """Flat dict, the only form that travels through loaders and engines unharmed."""
        flat: dict[str, Tensor] = {"index": self.index}
        for i, view in enumerate(self.views):
            flat[f"{i}.{view.modality}.x"] = view.x
            if view.pad is not None:
                flat[f"{i}.{view.modality}.pad"] = view.pad
            if view.mask is not None:
                own = {name: t for name, t in view.mask._asdict().items() if t is not None}
                flat.update({f"{i}.{view.modality}.mask.{name}": t for name, t in own.items()})
            flat.update({f"{i}.{view.modality}.record.{name}": t for name, t in view.record.items()})
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor], keys: tuple[int, ...] = ()) -> Batch:
        """The inverse of `tensors`."""
        views = []
        for number in sorted({int(name.split(".")[0]) for name in flat if name[0].isdigit()}):
            own = {tuple(name.split(".")[1:]): t for name, t in flat.items() if name.startswith(f"{number}.")}
            modality = next(iter(own))[0]
            masks = {place[2]: t for place, t in own.items() if place[1] == "mask"}
            mask = Mask(**masks) if masks else None
            record = {place[2]: t for place, t in own.items() if place[1] == "record"}
            views.append(View(own[modality, "x"], modality, own.get((modality, "pad")), mask, record))
        return cls(views, flat["index"], keys)


class Encoded(NamedTuple):
    """What an encoder made of a view."""

    tokens: Tensor  # (B, L, D) content only, extra tokens removed
    cls: Tensor | None = None  # (B, D)
    layers: tuple[Tensor, ...] = ()  # per trunk block (B, L, D): FFN output before the residual sum, on request
    pad: Tensor | None = None  # (B, L) bool, True = padding


class StepOutput(NamedTuple):
    """What a method returns for one micro-batch."""

    losses: dict[str, Tensor]  # weighted scalars; their sum is back-propagated and is the logged loss
    health: dict[str, Tensor] = {}  # detached scalars, logged only
    embedding: Tensor | None = None  # (B, D) detached, one row a sample: what the online linear probe learns from
    bound: Tensor | None = None  # (B, F) with gradient: what is compared with the same rows of other kinds of data


class Rebuilt(NamedTuple):
    """What a method made of what it did not see, for people to look at."""

    truth: Tensor  # (R, L, n) raw values of each token, or (R, L) ids
    guess: Tensor  # of the same shape; what the method says nothing about is not looked at
    hidden: Tensor  # (R, L) bool, True = not seen as it is
    seen: Tensor | None = None  # as `truth`: what was seen instead; None where hidden tokens were left out


class Clock(NamedTuple):
    """Where the run stands."""

    step: int = 0  # optimizer updates applied so far
    steps: int = 1  # updates the run will make
    epoch: int = 0  # passes over the data begun, from 0


class Rejected(Exception):
    """A sample that cannot be used. Counted and replaced, never fatal by itself."""

    kinds = (
        *("unreadable", "truncated", "too_large", "too_long", "too_short", "empty", "wrong_type", "bad_text", "non_finite"),
        "crash",
    )

    def __init__(self, kind: str, reason: str = ""):
        if kind not in self.kinds:
            raise ValueError(f"rejected: unknown kind {kind!r}, known are {', '.join(self.kinds)}")
        super().__init__(kind, reason)  # both in args, so that it survives pickling
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind
