"""Waves to views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmssl.masks import blocks, spans
from mmssl.random import generator
from mmssl.registry import Views
from mmssl.types import Mask, Rejected, View
from modalities.speech.augment import Crop, one_by_one, source, view
from modalities.speech.data import MAX_SECONDS, RATE

EPS = 1e-5  # added to the variance


@dataclass(frozen=True)
class MaskOptions:
    """Which frames to hide; the defaults are those of the audio base recipe of data2vec 2.0."""

    kind: Literal["block", "span"] = "block"  # segments of data2vec 2, spans of wav2vec 2.0 and data2vec 1
    ratio: float = 0.5  # of spans: the share that they would hide if they did not overlap
    adjust: float = 0.05  # of blocks: share drawn in addition, since they overlap
    width: int = 5  # frames of a segment or span
    copies: int = 8

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class SpeechViews(Views):
    """A random crop of a normalised wave, with its masks; or several crops that are changed at random.

    A batch is cut to its shortest member, then masks are drawn: nothing is padded. Where `crops` change the speed, the crops
    are as much shorter as the fastest needs, so that there is enough of the shortest sample.

    With `pad` nothing is cut to another's length: rows are padded to the longest instead, for what is said in a whole
    recording.

    `longest` and `shortest` are options in seconds and attributes in samples. `crops` as an option is what views there are,
    or the name of a policy, see `modalities.speech.augment`; as an attribute it is how many of them are smaller ones, which
    come without masks.
    """

    ragged = True  # updates differ in length
    count, crops = 1, 0

    def __init__(
        self,
        features: Any,
        longest: float = 20.0,
        shortest: float = 2.0,
        normalise: bool = True,
        mask: MaskOptions | None = None,
        crops: list[Crop] | str | None = None,
        pad: bool = False,
    ):
        if pad and mask is not None:
            raise ValueError("pad: masks are drawn for rows of one length; leave out views.mask, or this")
        if not 0 <= shortest <= MAX_SECONDS:
            raise ValueError(f"shortest: {shortest} s, must be between 0 and {MAX_SECONDS}")
        if not shortest <= longest <= MAX_SECONDS:
            raise ValueError(f"longest: {longest} s, must be between shortest={shortest:g} and {MAX_SECONDS}")
        self.longest: Any = round(longest * RATE)
        self.shortest = round(shortest * RATE)
        self.frames, self.normalise, self.mask, self.pad = features.frames, normalise, mask, pad
        self.repeats = getattr(features, "conv_norm", "layer") == "group"  # see `plain`
        if self.frames(self.longest) < 2:
            raise ValueError(f"longest: {longest} s gives {self.frames(self.longest)} frames, at least 2 are needed")
        self.kinds, self.count = one_by_one(crops)
        self.crops = len(self.kinds) - self.count if self.kinds else 0
        self.fastest = max([crop.speed[1] for crop in self.kinds[: self.count]], default=1.0)
        for i, crop in enumerate(crops if isinstance(crops, list) else self.kinds):
            self._check_length(crop, f"crops.{i}")
        if mask is not None:
            full = self._samples(self.kinds[0], self.shortest) if self.kinds else self.shortest
            self._check(mask, self.frames(full))

    def _check_length(self, crop: Crop, key: str) -> None:
        """Whether every sample has room for the crop, and the crop for its frames and gaps."""
        shortest, seconds = self.shortest / RATE, crop.seconds
        if seconds is not None and not seconds <= self.longest / RATE:
            raise ValueError(f"{key}.seconds: {seconds} s, must be at most views.longest={self.longest / RATE:g}")
        length = self._samples(crop, self.shortest)
        if seconds is not None and source(length, crop.speed[1]) > self.shortest:
            raise ValueError(
                f"{key}.seconds: {seconds} s at a speed of up to {crop.speed[1]:g} are more than the shortest samples have, "
                f"views.shortest={shortest:g} s; raise that or lower this"
            )
        if self.frames(length) < 2:
            name = "shortest" if seconds is None else f"{key}.seconds"
            raise ValueError(f"{name}: a crop of {length / RATE:.3g} s has fewer than 2 frames; 0.045 s are needed")
        if crop.gaps * crop.gap * RATE >= length:
            raise ValueError(
                f"{key}.gap: {crop.gaps} gaps of up to {crop.gap:g} s can silence a whole crop, the shortest have "
                f"{length / RATE:.3g} s; raise views.shortest or lower this"
            )

    def _check(self, m: MaskOptions, frames: int) -> None:
        """Whether masks can be drawn for so many frames, the fewest that a batch can have."""
        fewest = f"the {frames} frames of a sample of shortest={self.shortest / RATE:g} s"
        if frames < 2:
            raise ValueError(f"shortest: {self.shortest / RATE:g} s gives {frames} frames; masks need at least 2: 0.045 s")
        if not (0 < m.ratio < 1 and math.floor(frames * m.ratio) > 0):
            raise ValueError(f"mask.ratio: {m.ratio} leaves none or all of {fewest} visible")
        widest = frames if m.kind == "block" else frames - 1
        if not 1 <= m.width <= widest:
            raise ValueError(f"mask.width: {m.width}, must be between 1 and {widest}, which {fewest} have room for")
        if not 1 <= m.copies <= 1024:
            raise ValueError(f"mask.copies: {m.copies}, must be between 1 and 1024")
        if not -1 < m.adjust < 1:
            raise ValueError(f"mask.adjust: {m.adjust}, must be between -1 and 1")

    def __call__(self, sample: Tensor, draw: Callable[[int], torch.Generator], length: int | None = None) -> dict[str, Tensor]:
        """One crop, or all that `crops` lists.

        Args:
            sample: (n,) at 16 kHz.
            length: samples of the crop; as many as there are, at most `longest`, if None.
        Returns: x (length,) float, normalised over the whole sample; seed () int64, for what is drawn when it is collated.
            Where `crops` is given, the names of view i begin with `i.`, and its record, see `augment.view`, is beside them.
        Raises: Rejected if the sample is shorter than `length`, which its header gave, or without one than `shortest`.
        """
        if length is not None and len(sample) < length:
            raise Rejected("truncated", f"the header promised {length} samples at 16 kHz or more, there are {len(sample)}")
        if length is None and len(sample) < self.shortest:
            seconds = f"{len(sample) / RATE:.2f} s, less than views.shortest={self.shortest / RATE:g}"
            raise Rejected("too_short", seconds)
        room = min(len(sample), self.longest) if length is None or self.pad else length
        wave = self._normalised(sample)
        if not self.kinds:
            first = draw(0)
            seed = _seed(first)
            return {"x": _crop(wave, room, first), "seed": seed}
        found = {}
        for i, crop in enumerate(self.kinds):
            own = draw(i)
            x, record = view(wave, self._samples(crop, room), crop, own)
            tensors = {"x": x, "seed": _seed(own)} | {name: torch.tensor(value) for name, value in record.items()}
            found |= {f"{i}.{name}": tensor for name, tensor in tensors.items()}
        return found

    def _samples(self, crop: Crop, room: int) -> int:
        """Of a view, where that many of the sample may be used."""
        if crop.seconds is not None:
            return round(crop.seconds * RATE)
        return room * 100 // round(100 * self.fastest)

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[View]:
        """Crop to the shortest, stack, draw masks; those of a sample stay adjacent.

        Crop and masks of a sample depend on its own seed and on the common length; of span masks on the fewest hidden, too.
        """
        views = []
        for i, prefix in enumerate([f"{i}." for i in range(len(self.kinds))] or [""]):
            own = [{k.removeprefix(prefix): v for k, v in sample.items() if k.startswith(prefix)} for sample in samples]
            views.append(self._view(own, self.mask if i < self.count else None))
        return views

    def _view(self, samples: Sequence[dict[str, Tensor]], mask: MaskOptions | None) -> View:
        """x, seed and record of each sample, one view of a batch."""
        record = {k: torch.stack([sample[k] for sample in samples]) for k in samples[0] if k not in ("x", "seed")}
        if self.pad:
            return self._padded([sample["x"] for sample in samples])._replace(record=record)
        length = min(len(sample["x"]) for sample in samples)
        seeds = [int(sample["seed"]) for sample in samples]
        cuts = [_place(sample["x"], length, generator(seed, "crop")) for sample, seed in zip(samples, seeds)]
        x = torch.stack([sample["x"][cut : cut + length] for sample, cut in zip(samples, cuts)])
        if record:
            record["start"] += torch.tensor(cuts) / RATE * record["speed"]
        return View(x, "speech", None, None if mask is None else Mask.of(self._hidden(mask, length, seeds)), record)

    def _hidden(self, m: MaskOptions, length: int, seeds: Sequence[int]) -> Tensor:
        """(M*B, L) bool, as many hidden in each row."""
        frames = self.frames(length)
        if m.kind == "block":
            return torch.cat([blocks((frames,), m.copies, m.ratio, m.width, m.adjust, generator(s, "mask")) for s in seeds])
        rows = [spans(frames, m.copies, m.ratio, m.width, generator(seed, "mask")) for seed in seeds]
        fewest = min(int(row[0].sum()) for row in rows)
        return torch.cat([_unmasked(row, fewest, generator(seed, "equal")) for row, seed in zip(rows, seeds)])

    def plain(self, samples: Sequence[Tensor]) -> View:
        """Whole samples, of longer ones the middle `longest`; padded to the longest of the batch."""
        return self._padded([_middle(self._normalised(sample), self.longest) for sample in samples])

    def _padded(self, waves: list[Tensor]) -> View:
        """Zeros at the end, or more of the same.

        Group norm sees the whole row, and zeros would change all of it: for such features a sample is repeated instead, which
        leaves its statistics nearly as they are.
        """
        frames = torch.tensor([self.frames(len(wave)) for wave in waves])
        pad = torch.arange(int(frames.max())) >= frames[:, None]
        longest = max(len(wave) for wave in waves)
        waves = [wave.repeat(-(-longest // len(wave)))[:longest] for wave in waves] if self.repeats else waves
        x = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        return View(x, "speech", pad=pad if bool(pad.any()) else None)

    def _normalised(self, sample: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the whole sample."""
        if not self.normalise:
            return sample
        centred = sample - sample.mean()
        return centred.mul_((centred.square().mean() + EPS).rsqrt())  # `var_mean` takes five times as long


def _crop(wave: Tensor, length: int, draw: torch.Generator) -> Tensor:
    """A copy, since workers send the whole storage of a slice."""
    start = _place(wave, length, draw)
    return wave[start : start + length].clone()


def _place(wave: Tensor, length: int, draw: torch.Generator) -> int:
    return int(torch.randint(len(wave) - length + 1, (), generator=draw))


def _seed(draw: torch.Generator) -> Tensor:
    return torch.randint(2**63 - 1, (), generator=draw)


def _middle(wave: Tensor, length: int) -> Tensor:
    start = max(0, (len(wave) - length) // 2)
    return wave[start : start + length]


def _unmasked(hidden: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """(M, L) with only `count` of each row's hidden frames left, uniformly drawn."""
    order = (torch.rand(hidden.shape, generator=draw) + hidden).argsort(dim=1, descending=True)
    return torch.zeros_like(hidden).scatter_(1, order[:, :count], True)
