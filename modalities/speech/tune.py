"""Recordings for a model with a head: prepared as its folder says, cut and made faster or slower in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.random import drawn
from modalities.speech.data import RATE, _library


class Inputs:
    """Waves to `input_values`, or to `input_features` where the model takes spectrograms.

    Args:
        path: of the model, whose folder says how waves are normalised and padded.
        longest: seconds; of longer recordings a random piece is taken in training where classes are learned.
        speed: factors of which each recording of the training gets one, such as [0.9, 1.0, 1.1] (Ko et al. 2015); torchaudio's.
        noise: decibels below which white noise is added in training; 0 = none.
    Raises: ValueError if the folder does not say how to prepare sound, or if the model listens at another rate than 16 kHz.
    """

    def __init__(self, path: Any, longest: float = 20.0, speed: list[float] = [], noise: float = 0.0):  # noqa: B006
        from transformers import AutoFeatureExtractor

        if longest < 0.05:
            raise ValueError(f"longest: {longest} s, must be at least 0.05")
        if any(not 0.5 <= factor <= 2 for factor in speed):
            raise ValueError(f"speed: {speed}, factors must be between 0.5 and 2")
        if noise < 0:
            raise ValueError(f"noise: {noise}, must be decibels below the signal, at least 0")
        self.processor = AutoFeatureExtractor.from_pretrained(str(path), trust_remote_code=False)
        if getattr(self.processor, "sampling_rate", RATE) != RATE:
            raise ValueError(f"{path} listens at {self.processor.sampling_rate} Hz; only models for {RATE} Hz can be used")
        self.longest, self.noise = round(longest * RATE), noise
        self.change = _library("torchaudio").transforms.SpeedPerturbation(RATE, [*speed]) if speed else None

    def __call__(self, samples: Sequence[Tensor], seeds: Sequence[int] | None = None, cut: bool = True) -> dict[str, Tensor]:
        """The processor's output, padded to the longest.

        Args:
            samples: (n,) waves at 16 kHz.
            seeds: one of each sample in training, None in the test.
            cut: whether a part stands for the whole.
        """
        waves = [*samples] if seeds is None else [self._changed(x, seed, cut) for x, seed in zip(samples, seeds)]
        rows = self.processor([wave.numpy() for wave in waves], sampling_rate=RATE, padding=True, return_tensors="pt")
        return dict(rows)

    def _changed(self, wave: Tensor, seed: int, cut: bool) -> Tensor:
        with drawn(seed, "views"):
            if self.change is not None:
                wave = self.change(wave)[0]
            if cut and len(wave) > self.longest:
                first = int(torch.randint(len(wave) - self.longest + 1, ()))
                wave = wave[first : first + self.longest]
            if self.noise:
                wave = wave + torch.randn_like(wave) * wave.std() * 10 ** (-self.noise / 20)
        return wave
