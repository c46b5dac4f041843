"""Spoken digits from the espeak-ng library that the pip package espeakng-loader ships; see `make_demo_data.py`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLIPS = {"train": 150, "test": 30}  # of each word
RATE, SEED = 16_000, 0

# An accent sets the sounds, a variant the voice that makes them. No accent and no relative of a variant is in both splits.
ACCENTS = {
    "train": ("en", "en-us", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"),
    "test": ("en-gb-scotland", "en-us-nyc"),
}
VARIANTS = {
    "train": "f1 f2 f4 f5 m1 m2 m3 m4 m5 m6 m8 Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco "
    "Mario Michael Mike Nguyen Reed RicishayMax Storm UniRobot adam anika announcer antonio aunty benjamin boris caleb croak "
    "david edward grandma gustave ian iven john kaukovalta klatt klatt2 klatt4 linda marcelo max michel norbert pablo paul "
    "quincy rob robosoft robosoft3 robosoft5 sandro steph travis whisper",
    "test": "f3 m7 belinda ed miguel pedro shelby victor zac grandpa",
}


def speech(folder: Path) -> None:
    """Ten words by many voices, 16 kHz, 16 bits: FOLDER/speech/{train,test}/{word}/{number}-{voice}.wav. The same each time.

    Pitch, speed, loudness, pauses and noise (10 to 25 dB below the voice) vary. Raises: SystemExit if the library is missing.
    """
    import soundfile
    import torch
    from torchaudio.functional import resample

    say, rate = synthesiser()
    draw = np.random.default_rng(SEED)
    for split, count in CLIPS.items():
        for word in WORDS:
            place = folder / "speech" / split / word
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                voice = f"{draw.choice(ACCENTS[split])}+{draw.choice(VARIANTS[split].split())}"
                pitch, speed, liveliness = (int(draw.integers(low, high)) for low, high in ((20, 81), (110, 211), (20, 81)))
                spoken = resample(torch.from_numpy(say(word, voice, pitch, speed, liveliness)), rate, RATE).numpy()
                soundfile.write(place / f"{i:03}-{voice}.wav", recorded(spoken, draw), RATE, subtype="PCM_16")


def recorded(spoken: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A word as a microphone might hear it: pauses of 0.05 to 0.15 s around it, white noise, a peak between 0.1 and 0.9."""
    before, after = (int(draw.integers(RATE // 20, 3 * RATE // 20)) for _ in range(2))
    power, decibels = float(np.mean(spoken**2)), draw.uniform(10, 25)
    sound = np.pad(spoken, (before, after))
    sound = sound + draw.normal(0, (power * 10 ** (-decibels / 10)) ** 0.5, len(sound))
    return sound * (np.exp(draw.uniform(np.log(0.1), np.log(0.9))) / np.abs(sound).max())


def synthesiser() -> tuple[Any, int]:
    """Function (text, voice, pitch, words per minute, pitch range) -> (n,) float32 in [-1, 1], and its sample rate in Hz."""
    try:
        import espeakng_loader
    except ImportError:
        raise SystemExit("The spoken demo data need espeak-ng: pip install espeakng-loader") from None
    library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
    heard: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    # The constants are those of espeak-ng's speak_lib.h: synchronous output 2, do not exit on errors 0x8000; speed 1,
    # pitch 3, range 4; UTF-8 text 1.
    rate = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8000)
    if rate <= 0:
        raise SystemExit("espeak-ng finds no data; reinstall it: pip install --force-reinstall espeakng-loader")
    library.espeak_SetSynthCallback(hear)
    library.hear = hear  # the library's own reference does not keep it alive

    def say(text: str, voice: str, pitch: int, speed: int, liveliness: int) -> np.ndarray:
        heard.clear()
        if library.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"espeak-ng has no voice {voice}; the demo needs that of espeakng-loader 0.2.4")
        for name, value in ((1, speed), (3, pitch), (4, liveliness)):
            library.espeak_SetParameter(name, value, 0)
        line = text.encode() + b"\0"
        library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))  # of breath and whisper, seeded by the clock otherwise
        library.espeak_Synth(line, ctypes.c_size_t(len(line)), 0, 1, 0, 1, None, None)
        return np.concatenate(heard).astype(np.float32) / 32768

    return say, rate
