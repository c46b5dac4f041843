"""Waves to log-mel spectrograms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmssl.masks import blocks, spans, uniform
from mmssl.random import generator
from mmssl.registry import Views
from mmssl.types import Mask, Rejected, View
from modalities.speech.data import MAX_SECONDS, RATE, _library
from modalities.speech.mel_alter import Alterations, altered, check
from modalities.speech.views import _seed, _unmasked

WINDOW, HOP = 400, 160  # samples: 25 ms every 10 ms
EPS = 1e-5  # added to the variance


@dataclass(frozen=True)
class MelMask:
    """Which patches to hide; the defaults are those of Audio-MAE (arXiv:2207.06405)."""

    kind: Literal["patch", "grid", "span", "block"] = (
        "patch"  # any; whole rows and columns; segments of time; blocks of data2vec 2
    )
    ratio: float = 0.8  # of patch, span and block; of spans the share that they would hide if they did not overlap
    time: float = 0.6  # of grid: share of the times at which all is hidden
    band: float = 0.5  # of grid: share of the bands in which all is hidden
    width: int = 5  # patches of a side of a block, or of a span
    adjust: float = 0.07  # of blocks: share drawn in addition, since they overlap
    inverse: bool = False  # of blocks: they are what is kept
    copies: int = 1

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


def frames(samples: int) -> int:
    """Frames of a wave; 0 if it is shorter than a window."""
    return max(0, (samples - WINDOW) // HOP + 1)


def samples(frames: int) -> int:
    """The shortest wave with so many frames."""
    return (frames - 1) * HOP + WINDOW


def log_mel(wave: Tensor, bands: int) -> Tensor:
    """Log-mel energies as Kaldi and `Speech2TextFeatureExtractor` have them. (n,) of full scale 1 -> (T, bands)."""
    fbank = _library("torchaudio.compliance.kaldi").fbank
    return fbank(wave[None] * 2**15, num_mel_bins=bands, sample_frequency=RATE)


class MelViews(Views):
    """The log-mel spectrogram of a random crop, with its masks, or altered.

    A batch is cut to its shortest member, in whole patches, then masks and alterations are drawn: nothing is padded.
    With `pad` nothing is cut to another's length: rows are padded to the longest instead.

    `longest` and `shortest` are options in seconds and attributes in samples. `normalise` gives each band of a crop mean 0 and
    variance 1; without it, `mean` and `std` of the model are those of the data set.
    """

    ragged = True  # updates differ in length
    count, crops = 1, 0

    def __init__(
        self,
        features: Any,
        longest: float | None = None,
        shortest: float = 2.0,
        normalise: bool = True,
        mask: MelMask | None = None,
        alter: Alterations | None = None,
        pad: bool = False,
    ):
        """longest: as long as the model takes if None."""
        if pad and (mask is not None or alter is not None):
            raise ValueError("pad: masks and alterations are drawn for rows of one length; leave them out, or this")
        most = samples(features.frames)
        if longest is not None and not shortest <= longest <= MAX_SECONDS:
            raise ValueError(f"longest: {longest} s, must be between shortest={shortest:g} and {MAX_SECONDS}")
        self.longest: Any = most if longest is None else round(longest * RATE)
        if frames(self.longest) > features.frames:
            raise ValueError(
                f"longest: {longest} s are {frames(self.longest)} frames, the model takes {features.frames}; raise "
                "model.frames or lower this"
            )
        if not 0 <= shortest <= self.longest / RATE:
            raise ValueError(
                f"shortest: {shortest} s, must be between 0 and the {self.longest / RATE:.4g} s of the longest input, "
                f"model.frames={features.frames}"
            )
        self.shortest, self.features, self.normalise = round(shortest * RATE), features, normalise
        self.mask, self.alter, self.pad = mask, alter, pad
        if self._rows(self.longest) < 1:
            raise ValueError(
                f"longest: {longest} s, shorter than a patch of {features.patch_frames} frames (model.patch_frames)"
            )
        if mask is not None:
            self._check(mask, max(1, self._rows(self.shortest)))
        if alter is not None:
            check(alter)

    def _check(self, m: MelMask, rows: int) -> None:
        """Whether masks can be drawn for so many patches in time, the fewest that a batch can have."""
        columns = self.features.columns
        fewest = f"the {rows} x {columns} patches of a sample of shortest={self.shortest / RATE:g} s"
        if m.kind == "grid":
            for name, count in {"time": rows, "band": columns}.items():
                share = getattr(m, name)
                if not (0 < share < 1 and count > 1 and math.floor(count * (1 - share)) > 0):
                    raise ValueError(f"mask.{name}: {share} leaves none or all of {fewest}; lower it or take another mask.kind")
        whole = rows if m.kind == "span" else rows * columns
        if m.kind != "grid" and not (0 < m.ratio < 1 and 0 < math.floor(whole * (1 - m.ratio)) < whole):
            raise ValueError(f"mask.ratio: {m.ratio} leaves none or all of {fewest} visible; raise views.shortest or change it")
        widest = rows - 1 if m.kind == "span" else min(rows, columns) if columns > 1 else rows
        if m.kind in ("span", "block") and not 1 <= m.width <= widest:
            raise ValueError(f"mask.width: {m.width}, must be between 1 and {widest}, which {fewest} have room for")
        if not 1 <= m.copies <= 1024:
            raise ValueError(f"mask.copies: {m.copies}, must be between 1 and 1024")
        if not -1 < m.adjust < 1:
            raise ValueError(f"mask.adjust: {m.adjust}, must be between -1 and 1")

    def __call__(self, sample: Tensor, draw: Callable[[int], torch.Generator], length: int | None = None) -> dict[str, Tensor]:
        """One crop.

        Args:
            sample: (n,) at 16 kHz.
            length: samples of the crop; as many as there are, at most `longest`, if None.
        Returns: x (T, F) float; seed () int64, for what is drawn when it is collated.
        Raises: Rejected if the sample is shorter than `length`, which its header gave, or without one than `shortest`.
        """
        if length is not None and len(sample) < length:
            raise Rejected("truncated", f"the header promised {length} samples at 16 kHz or more, there are {len(sample)}")
        if length is None and len(sample) < self.shortest:
            seconds = f"{len(sample) / RATE:.2f} s, less than views.shortest={self.shortest / RATE:g}"
            raise Rejected("too_short", seconds)
        cut = self._cut(min(len(sample), self.longest) if length is None or self.pad else length)
        first = draw(0)
        seed = _seed(first)
        start = int(torch.randint(len(sample) - cut + 1, (), generator=first))
        return {"x": self._spectrogram(sample[start : start + cut]), "seed": seed}

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[View]:
        """Crop to the shortest, stack, draw masks and alterations; the masks of a sample stay adjacent.

        All that is drawn depends on a sample's own seed and on the common length; span masks on the fewest hidden, too.
        An altered view has the record `clean` (B, T, F), as it was, and `altered` (B, T, F) bool, True = to be rebuilt.
        """
        if self.pad:
            return [self._padded([sample["x"] for sample in samples])]
        length = min(len(sample["x"]) for sample in samples)
        seeds = [int(sample["seed"]) for sample in samples]
        x = torch.stack([_crop(sample["x"], length, generator(seed, "crop")) for sample, seed in zip(samples, seeds)])
        mask = None if self.mask is None else Mask.of(self._hidden(self.mask, length // self.features.patch_frames, seeds))
        if self.alter is None:
            return [View(x, "spectrogram", None, mask)]
        statistics = self.features.mean, self.features.std
        pairs = [altered(row, self.alter, generator(seed, "alter"), *statistics) for row, seed in zip(x, seeds)]
        changed, label = (torch.stack(column) for column in zip(*pairs))
        return [View(changed, "spectrogram", None, mask, {"clean": x, "altered": label})]

    def _hidden(self, m: MelMask, rows: int, seeds: Sequence[int]) -> Tensor:
        """(M*B, L) bool, as many hidden in each row."""
        columns = self.features.columns
        drawn = [_mask(m, rows, columns, generator(seed, "mask")) for seed in seeds]
        if m.kind != "span":
            return torch.cat(drawn)
        fewest = min(int(times[0].sum()) for times in drawn)
        equal = [_unmasked(times, fewest, generator(seed, "equal")) for times, seed in zip(drawn, seeds)]
        return torch.cat(equal).repeat_interleave(columns, 1)

    def plain(self, samples: Sequence[Tensor]) -> View:
        """Whole samples, of longer ones the middle `longest`; padded to the longest of the batch.

        Raises: Rejected if one is shorter than a patch.
        """
        found = []
        for sample in samples:
            if self._rows(len(sample)) < 1:
                raise Rejected("too_short", f"{len(sample) / RATE:.3f} s give no patch of {self.features.patch_frames} frames")
            start = max(0, (len(sample) - self.longest) // 2)
            found.append(self._spectrogram(sample[start : start + self.longest]))
        return self._padded(found)

    def _padded(self, found: list[Tensor]) -> View:
        """Zeros at the end up to the longest."""
        x = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        pad = self.features.pad(torch.arange(x.shape[1]) < torch.tensor([[len(one)] for one in found]))
        return View(x, "spectrogram", pad if bool(pad.any()) else None)

    def _rows(self, length: int) -> int:
        """Patches in time of so many samples."""
        return frames(length) // self.features.patch_frames

    def _cut(self, length: int) -> int:
        """Samples, at most `length`, that give whole patches. Raises: Rejected if there is not one."""
        rows = self._rows(length)
        if rows < 1:
            raise Rejected("too_short", f"{length / RATE:.3f} s give no patch of {self.features.patch_frames} frames")
        return samples(rows * self.features.patch_frames)

    def _spectrogram(self, wave: Tensor) -> Tensor:
        """(T, F), each band with mean 0 and variance 1 if `normalise`."""
        x = log_mel(wave, self.features.bands)
        if not self.normalise:
            return x
        variance, mean = torch.var_mean(x, 0, correction=0)
        return (x - mean) / (variance + EPS).sqrt()


def _mask(m: MelMask, rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """(M, L) bool, True = masked; of spans (M, rows)."""
    if m.kind == "patch":
        return uniform(rows * columns, m.copies, m.ratio, draw)
    if m.kind == "grid":
        times, bands = uniform(rows, m.copies, m.time, draw), uniform(columns, m.copies, m.band, draw)
        return (times[:, :, None] | bands[:, None]).flatten(1)
    if m.kind == "span":
        return spans(rows, m.copies, m.ratio, m.width, draw)
    grid = (rows,) if columns == 1 else (rows, columns)
    return blocks(grid, m.copies, m.ratio, m.width, m.adjust, draw, m.inverse)


def _crop(x: Tensor, length: int, draw: torch.Generator) -> Tensor:
    start = int(torch.randint(len(x) - length + 1, (), generator=draw))
    return x[start : start + length]
