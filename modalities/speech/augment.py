"""Changes that leave what is said as it is: plain functions of waves, and crops whose changes are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmssl.crops import one_by_one as expanded
from modalities.speech.data import RATE

MEL = 2595 * math.log10(1 + RATE / 2 / 700)  # half the sample rate on the mel scale
WIDEST_COUNT = 64  # of views, bands and gaps


@dataclass(frozen=True)
class Crop:
    """How views are cut from a sample and changed, in the order of the fields. Of a range, the value is drawn uniformly.

    Sources: reverberation, noise, bands and gaps on the wave as in arXiv:2007.00991; speed by resampling as in Ko et al. 2015
    (Interspeech); bands and gaps are those of SpecAugment (arXiv:1904.08779), cut out of the wave, which is what is encoded.
    """

    count: int = 1  # views made this way, each at a place of its own
    seconds: float | None = None  # how long; all that the shortest sample of the update has room for if None
    speed: tuple[float, float] = (1.0, 1.0)  # factor, in hundredths; the pitch goes with it
    pitch: tuple[float, float] = (0.0, 0.0)  # semitones, at the same speed; 3 ms for each second of sound
    reverb: float = 0.0  # chance
    decay: tuple[float, float] = (0.1, 0.5)  # of reverberation by 60 dB, in seconds
    noise: float = 0.0  # chance
    snr: tuple[float, float] = (5.0, 20.0)  # dB
    colour: tuple[float, float] = (0.0, 0.0)  # of noise, whose power falls as 1 / frequency ** colour: 0 white, 1 pink, 2 red
    bands: int = 0  # silenced bands
    band: float = 0.1  # greatest width of one, share of the mel scale
    gaps: int = 0  # silenced stretches
    gap: float = 0.1  # longest of them, in seconds
    gain: tuple[float, float] = (0.0, 0.0)  # dB
    flip: float = 0.0  # chance of reversed polarity

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


# The numbers are ours: what recordings of people at various distances from a microphone differ in.
_MILD: dict[str, Any] = {
    "speed": (0.9, 1.1),
    "noise": 0.5,
    "snr": (5.0, 20.0),
    "colour": (0.0, 1.0),
    "bands": 2,
    "gaps": 2,
    "gap": 0.05,
    "gain": (-6.0, 6.0),
}
_STRONG: dict[str, Any] = _MILD | {"pitch": (-3.0, 3.0), "reverb": 0.5, "noise": 0.8, "snr": (0.0, 15.0), "flip": 0.5}
POLICIES: dict[str, tuple[Crop, ...]] = {
    "cut": (Crop(2),),
    "pair": (Crop(2, **_MILD),),
    "pair-strong": (Crop(2, **_STRONG),),
    "weak-strong": (Crop(), Crop(**_STRONG)),
    "multi": (Crop(2, **_MILD), Crop(4, seconds=1.0, **_MILD)),
}

_CHANCES = ("reverb", "noise", "flip")
_LIMITS = {"speed": (0.5, 2), "pitch": (-12, 12), "decay": (0.01, 5), "snr": (-40, 100), "colour": (-2, 4), "gain": (-60, 60)}


def one_by_one(crops: list[Crop] | str | None) -> tuple[list[Crop], int]:
    """One entry for each view, and how many of them, the first ones, are of full size: the longest.

    Raises: ValueError that begins with `crops`.
    """
    return expanded(crops, POLICIES, check_crop, _seconds)


def _seconds(crop: Crop) -> float:
    return math.inf if crop.seconds is None else crop.seconds


def check_crop(crop: Crop, key: str) -> None:
    """Raises: ValueError that begins with `key` and the option that is wrong."""
    for name, least in {"count": 1, "bands": 0, "gaps": 0}.items():
        if not least <= getattr(crop, name) <= WIDEST_COUNT:
            raise ValueError(f"{key}.{name}: {getattr(crop, name)}, must be between {least} and {WIDEST_COUNT}")
    for name in _CHANCES:
        if not 0 <= getattr(crop, name) <= 1:
            raise ValueError(f"{key}.{name}: {getattr(crop, name)}, must be a chance between 0 and 1")
    for name, (least, most) in _LIMITS.items():
        low, high = getattr(crop, name)
        if not least <= low <= high <= most:
            raise ValueError(f"{key}.{name}: [{low}, {high}], must be a range, the lower end first, within [{least}, {most}]")
    if not (crop.band > 0 and crop.band * max(crop.bands, 1) < 1):
        raise ValueError(f"{key}.band: {crop.band}, {crop.bands} of them must be above 0 and leave some of the spectrum")
    if not crop.gap > 0:
        raise ValueError(f"{key}.gap: {crop.gap} s, must be above 0")


def view(sample: Tensor, length: int, crop: Crop, draw: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """One view at a random place, with random changes.

    Args:
        sample: (n,) at 16 kHz, n at least `source(length, crop.speed[1])`.
    Returns: (length,), and what was done: start (s in the sample), speed (factor), pitch (semitones), decay (s, 0 = no
        reverberation), noise (its root mean square over that of the speech, 10 ** (-SNR / 20); 0 = none), gain (dB) and
        polarity (1 or -1).
    """

    def between(limits: tuple[float, float]) -> float:
        return limits[0] + (limits[1] - limits[0]) * float(torch.rand((), generator=draw, dtype=torch.float64))

    def happens(chance: float) -> bool:
        return between((0.0, 1.0)) < chance

    factor = round(between(crop.speed), 2)
    needed = source(length, factor)
    start = int(torch.randint(len(sample) - needed + 1, (), generator=draw))
    semitones = _nearest(between(crop.pitch))
    decay = between(crop.decay) if happens(crop.reverb) else 0.0
    snr = between(crop.snr) if happens(crop.noise) else math.inf
    colour = between(crop.colour)
    decibels, polarity = between(crop.gain), -1.0 if happens(crop.flip) else 1.0

    wave = speed(sample[start : start + needed], factor)[:length]
    if semitones:
        wave = pitch(wave, semitones)
    if decay:
        wave = reverb(wave, decay, draw)
    if snr < math.inf:
        wave = noise(wave, snr, colour, draw)
    if crop.bands:
        widths, places = torch.rand(2, crop.bands, generator=draw)
        wave = without_bands(wave, MEL * _inside(crop.band * widths, places, 1.0))
    if crop.gaps:
        widths, places = torch.rand(2, crop.gaps, generator=draw)
        wave = without_gaps(wave, _inside(crop.gap * widths, places, length / RATE))
    wave = wave * (polarity * 10 ** (decibels / 20))  # a copy in any case, since workers send the whole storage of a slice
    return wave, {
        "start": start / RATE,
        "speed": factor,
        "pitch": semitones,
        "decay": decay,
        "noise": 10 ** (-snr / 20),
        "gain": decibels,
        "polarity": polarity,
    }


def source(length: int, factor: float) -> int:
    """Samples that `speed` needs to give at least `length`."""
    return -(-length * round(100 * factor) // 100)


def speed(wave: Tensor, factor: float) -> Tensor:
    """Faster by a factor in hundredths, and higher by as much. (n,) -> (ceil(n / factor),).

    In hundredths, as the filters for other ratios are large.
    """
    from torchaudio.functional import resample

    return resample(wave, round(100 * factor), 100)


def pitch(wave: Tensor, semitones: float) -> Tensor:
    """Higher at the same speed, frequencies by a factor in hundredths. (n,) -> (n,), as loud."""
    from torchaudio.functional import pitch_shift

    # It cuts the ratio of its rates down to hundredths here; at 16 kHz its filters would make it a thousand times slower.
    shifted = pitch_shift(wave, 100, 12 * math.log2(_ratio(semitones) + 1e-5))  # type: ignore[arg-type]
    return shifted * (wave.norm() / shifted.norm().clamp(min=1e-12))  # its frames overlap out of phase: some dB are lost


def _ratio(semitones: float) -> float:
    return round(100 * 2 ** (semitones / 12)) / 100


def _nearest(semitones: float) -> float:
    """The nearest shift that `pitch` can do."""
    return 12 * math.log2(_ratio(semitones))


def reverb(wave: Tensor, decay: float, draw: torch.Generator) -> Tensor:
    """In a room that is drawn. (n,) -> (n,), as loud on average."""
    heard = room(decay, draw)
    size = _fast(len(wave) + len(heard) - 1)
    return torch.fft.irfft(torch.fft.rfft(wave, size) * torch.fft.rfft(heard, size), size)[: len(wave)]


def room(decay: float, draw: torch.Generator) -> Tensor:
    """An impulse response: the direct sound, then as much energy of white noise that falls by 60 dB in `decay` seconds.

    Returns: (ceil(decay * 16000),) of energy 1.
    Source: Moorer 1979, "About this reverberation business": late reverberation is exponentially decaying noise.
    """
    length = max(2, math.ceil(decay * RATE))
    tail = torch.randn(length, generator=draw) * 10 ** (-3 * torch.arange(length) / (decay * RATE))
    tail[0] = 0
    tail = tail / tail.norm()
    tail[0] = 1
    return tail / math.sqrt(2)


def noise(wave: Tensor, snr: float, colour: float, draw: torch.Generator) -> Tensor:
    """With noise added, `snr` dB below the wave, whose power falls as 1 / frequency ** colour. (n,) -> (n,)."""
    from torchaudio.functional import add_noise

    added = torch.randn(len(wave) if colour == 0 else _fast(len(wave)), generator=draw)
    if colour:
        spectrum = torch.fft.rfft(added)
        spectrum[1:] *= torch.arange(1, len(spectrum)) ** (-colour / 2)
        spectrum[0] = 0
        added = torch.fft.irfft(spectrum, len(added))[: len(wave)]
    return add_noise(wave, added, torch.tensor(snr))


def without_bands(wave: Tensor, bands: Tensor) -> Tensor:
    """Silent in bands, (K, 2) from and to in mel. (n,) -> (n,)."""
    size = _fast(len(wave))
    spectrum = torch.fft.rfft(wave, size)
    mel = 2595 * torch.log10(1 + torch.linspace(0, RATE / 2, len(spectrum)) / 700)
    return torch.fft.irfft(spectrum * ~_within(mel, bands), size)[: len(wave)]


def without_gaps(wave: Tensor, gaps: Tensor) -> Tensor:
    """Silent in stretches, (K, 2) from and to in seconds. (n,) -> (n,)."""
    return wave * ~_within(torch.arange(len(wave)) / RATE, gaps)


def _inside(widths: Tensor, places: Tensor, whole: float) -> Tensor:
    """(K, 2) from and to, of intervals of these widths at these places, shares of where they fit into `whole`."""
    start = places * (whole - widths)
    return torch.stack([start, start + widths], dim=1)


def _within(points: Tensor, intervals: Tensor) -> Tensor:
    """(n,) bool."""
    return ((points >= intervals[:, :1]) & (points < intervals[:, 1:])).any(0)


def _fast(length: int) -> int:
    """The next power of 2: transforms of other lengths, primes above all, are slow."""
    return 1 << (length - 1).bit_length()
