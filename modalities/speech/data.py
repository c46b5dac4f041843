"""Sound files to waves: one channel at 16 kHz, length checked by the header before any sample is allocated."""

from __future__ import annotations

import importlib
import io
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmssl.types import Rejected

RATE, FRAME = 16_000, 400  # Hz, and samples that one frame needs: those of SpeechFeatures
COLUMNS = ("audio", "speech", "wav", "audio_filepath", "file_name", "path", "file")
SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    *(".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".sph"),
)
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "NIST", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")
MAX_SECONDS, MAX_VALUES = 30 * 60, 1 << 29  # of a file; samples of all channels, 2 GiB once they are decoded
WHOLE = 0.99  # share of the promised samples that makes a file whole: some encoders miscount
STREAMED = (1 << 31) - (1 << 16)  # sizes from here on are what programs write that do not know them yet
THREADS, CHUNK = 4, 4096  # headers are read by so many threads, and so many before the next are asked for

# libsndfile's log of a header: what the header says of the samples' bytes, and how many there are.
_CUT = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)


def decode(value: Any) -> Tensor:
    """A wave at 16 kHz, channels averaged, not normalised. (n,) float32, n at least 400.

    Args:
        value: path, bytes of a file, or dict with `bytes` or `path`.
    Raises: Rejected; `too_long` above 30 minutes and `too_short` below one frame of 25 ms, by the header alone.
    """
    with _opened(value) as file:
        try:
            samples = file.read(dtype="float32", always_2d=True)  # (frames, channels)
        except MemoryError:
            raise Rejected("too_large", "does not fit into memory") from None
        except Exception as error:
            raise Rejected("truncated" if "lost sync" in str(error) else "unreadable", _text(error)) from None
        # Without an index frame, which such files may lack, the length of an MP3 is a guess from its first bytes.
        guessed = re.search(r"bitrate mode\s*: constant", file.extra_info)
        if len(samples) < WHOLE * file.frames and not guessed:
            raise Rejected("truncated", f"{len(samples)} of {file.frames} samples")
        wave = torch.from_numpy(samples)
        wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(1)
        if not math.isfinite(wave.sum()) and not bool(wave.isfinite().all()):  # of finite samples the sum may overflow
            raise Rejected("non_finite", "NaN or infinite samples")
        wave = _resampled(wave, file.samplerate)
    _check_length(len(wave))
    return wave


def sizes(sample: Tensor) -> dict[str, float]:
    """Duration in seconds."""
    return {"seconds": len(sample) / RATE}


def raw(sample: Tensor) -> Tensor:
    """Mean and standard deviation over time of the log-mel spectrogram: 80 bands, windows of 25 ms every 10 ms. (160,)."""
    bands = _mel()(sample).clamp(min=1e-6).log()  # (80, frames)
    return torch.cat([bands.mean(1), bands.std(1, correction=0)])


def prepare(source: Any, views: Any, quarantine: Any) -> Any:
    """Learn how long all samples are, from their headers.

    Returns: the source with `lengths`, in samples at 16 kHz. It is -1 for those shorter than `views.shortest`, which
        `facts["left_out"]` counts, and for those that cannot be used, which are recorded in the quarantine. `facts["hours"]`
        is what remains. A stream comes back as it is, and so do recordings that belong to pairs.
    Raises: ValueError if nothing remains, or if soundfile or torchaudio is missing.
    """
    if source.streaming:
        return source
    try:
        for name in ("soundfile", "torchaudio"):
            _library(name)
    except ImportError as error:
        raise ValueError(f"data.modality: {error}") from None
    if source.paired:
        return source
    found: list[int | Rejected] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, source.size, CHUNK):
            found += pool.map(lambda index: _measured(source, index), range(first, min(first + CHUNK, source.size)))
    quarantine.seen(source.size)
    bad = {index: why for index, why in enumerate(found) if isinstance(why, Rejected)}
    for index, why in bad.items():
        quarantine.record(source.identity(index), why.kind, why.reason)
    lengths = torch.tensor([-1 if isinstance(length, Rejected) else length for length in found])
    short = (lengths >= 0) & (lengths < views.shortest)
    lengths[short] = -1
    left_out = {f"shorter than {views.shortest / RATE:g} s (views.shortest)": int(short.sum()), "unusable": len(bad)}
    left_out = {why: count for why, count in left_out.items() if count}
    if not bool((lengths >= 0).any()):
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
        first_bad = f" The first unusable one is {source.identity(min(bad))} ({bad[min(bad)]})." if bad else ""
        raise ValueError(
            f"data.path: nothing remains of the {source.size} samples of {source.facts.get('path')}: {reasons}.{first_bad} "
            "Lower views.shortest or give other recordings."
        )
    hours = round(float(lengths.clamp(min=0).sum()) / RATE / 3600, 3)
    return source._replace(lengths=lengths, facts={**source.facts, "hours": hours, "left_out": left_out})


def _measured(source: Any, index: int) -> int | Rejected:
    """Samples at 16 kHz, by the header."""
    try:
        with _opened(source.value(index)) as file:
            return _length(file.frames, file.samplerate)
    except Rejected as bad:
        return bad
    except Exception as error:
        return Rejected("unreadable", _text(error))


def _opened(value: Any) -> Any:
    """A `soundfile.SoundFile` whose header is sound. Raises: Rejected."""
    soundfile = _library("soundfile")
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (bytes, bytearray, memoryview)):
        size, place = len(value), io.BytesIO(value)
    elif isinstance(value, (str, os.PathLike)):
        if not os.path.isfile(value):  # a pipe would block for ever
            raise Rejected("unreadable", "no such file")
        size, place = os.path.getsize(value), os.fsencode(value)
    else:
        raise Rejected("wrong_type", f"{type(value).__name__} is no path or bytes")
    if not size:
        raise Rejected("empty", "zero bytes")
    try:
        file = soundfile.SoundFile(place)
    except Exception as error:
        raise Rejected("unreadable", _text(error)) from None
    try:
        _check_header(file)
    except Rejected:
        file.close()
        raise
    return file


def _check_header(file: Any) -> None:
    if file.format not in FORMATS:
        raise Rejected("unreadable", f"{file.format} is not among the formats that are read")
    if not 1000 <= file.samplerate <= 1_000_000:
        raise Rejected("unreadable", f"a sample rate of {file.samplerate} Hz")
    if not file.frames:
        raise Rejected("empty", "no samples")
    if file.frames > 1 << 40:
        raise Rejected("unreadable", "the header does not say how many samples there are; encode it anew")
    if file.frames > MAX_SECONDS * file.samplerate:
        minutes = file.frames / file.samplerate / 60
        raise Rejected("too_long", f"{minutes:.0f} minutes, at most {MAX_SECONDS // 60}; cut it into pieces")
    if file.frames * file.channels > MAX_VALUES:
        raise Rejected("too_large", f"{file.frames} samples of {file.channels} channels")
    cut = _CUT.search(file.extra_info)
    if cut and int(cut[1]) < STREAMED and int(cut[2]) < WHOLE * int(cut[1]):
        raise Rejected("truncated", f"{cut[2]} of {cut[1]} bytes of samples")
    _check_length(_length(file.frames, file.samplerate))


def _check_length(length: int) -> None:
    if length < FRAME:
        raise Rejected("too_short", f"{length} samples at 16 kHz; a frame needs {FRAME}")


def _ratio(rate: int) -> Fraction:
    """Of 16 kHz to a rate: exact for all usual rates, within 0.01 % for odd ones, whose filters would take gigabytes."""
    return Fraction(RATE, rate).limit_denominator(1000)


def _length(samples: int, rate: int) -> int:
    """Samples that `_resampled` makes of so many."""
    return math.ceil(samples * _ratio(rate))


def _resampled(wave: Tensor, rate: int) -> Tensor:
    """(n,) at any rate to (n',) at 16 kHz."""
    ratio = _ratio(rate)
    if ratio == 1:
        return wave
    resample = _library("torchaudio").functional.resample
    return resample(wave, ratio.denominator, ratio.numerator)[: _length(len(wave), rate)]


@cache
def _mel() -> Any:
    # 512 points: with 400 the lowest of 80 bands would lie between two frequencies. Zeros around, so that any clip will do.
    return _library("torchaudio").transforms.MelSpectrogram(
        RATE, n_fft=512, win_length=400, hop_length=160, n_mels=80, pad_mode="constant"
    )


def _library(name: str) -> Any:
    """Import on first use. Raises: ImportError with the mend."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # a torchaudio of another torch or CUDA raises any of them
        raise ImportError(
            f"speech needs {name}, which cannot be imported ({' '.join(str(error).split())[:200]}). "
            "Install matching versions: pip install -c constraints.txt torch torchaudio soundfile"
        ) from error


def _text(error: Exception) -> str:
    """Of libsndfile's errors without the name of the file object."""
    return getattr(error, "error_string", str(error)) or type(error).__name__
