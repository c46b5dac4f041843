"""Samples of sound and text with the colours of their tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmssl.types import View
from modalities.speech.picture import GAP, STRIPE, TALL, WIDE
from modalities.speech.picture import sketch as sketch_sound
from modalities.text.picture import LINE
from modalities.text.picture import sketch as sketch_text


def test_a_tone_is_a_line_in_its_band_and_frames_are_a_stripe():
    time = torch.arange(16_000) / 16_000
    wave = torch.stack([torch.sin(2 * torch.pi * 2000 * time), torch.sin(2 * torch.pi * 6000 * time)])
    pad = torch.zeros(2, 10, dtype=torch.bool)
    pad[1, 5:] = True
    colours = torch.zeros(2, 10, 3)
    colours[:, 4] = torch.tensor([0.0, 1.0, 0.0])
    low, high = (np.asarray(image).astype(int) for image in sketch_sound(View(wave, "speech", pad), None, None, colours))
    assert low.shape == high.shape == (TALL + GAP + STRIPE, WIDE, 3)
    assert low[:TALL].sum((1, 2)).argmax() == pytest.approx(TALL * (1 - 2000 / 8000), abs=TALL / 32)
    assert high[:TALL].sum((1, 2)).argmax() == pytest.approx(TALL * (1 - 6000 / 8000), abs=TALL / 32)
    green = [np.argwhere((image[-1] == (0, 255, 0)).all(-1))[:, 0] for image in (low, high)]
    assert (green[0].min(), green[0].max()) == (WIDE * 4 // 10, WIDE // 2 - 1)
    assert (green[1].min(), green[1].max()) == (WIDE * 4 // 5, WIDE - 1)  # without what is padding


def test_patches_of_a_spectrogram_lie_as_they_were_cut():
    cells = torch.linspace(0, 1, 8 * 4).view(1, 8, 4)  # frames, bands
    colours = torch.zeros(1, 4, 3)
    colours[0, 1] = 1.0  # of the first frames, the upper bands
    (image,) = sketch_sound(View(cells, "spectrogram"), None, SimpleNamespace(columns=2), colours)
    found = np.asarray(image)[TALL + GAP :]
    assert found[: TALL // 2, : WIDE // 2].min() == 255
    assert found[TALL // 2 :].max() == found[:, WIDE // 2 :].max() == 0


def test_tokens_stand_on_their_colours():
    words = ["<pad>", "\u2581one", "\u2581two"]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=words.__getitem__)
    views = SimpleNamespace(tokenizer=tokenizer, pieces=SimpleNamespace(opens=torch.tensor([False, True, True])))
    view = View(torch.tensor([[1, 2, 0], [1, 1, 1]]), "text", torch.tensor([[False, False, True], [False] * 3]))
    plain = [np.asarray(image) for image in sketch_text(view, views, None, None)]
    assert all(image.shape[0] == LINE for image in plain)
    assert (plain[0] == 255).mean() > 0.8
    colours = torch.zeros(2, 3, 3)
    colours[:, 1] = torch.tensor([1.0, 0.0, 0.0])
    first = np.asarray(sketch_text(view, views, None, colours)[0])
    pale = np.argwhere((first == (255, 115, 115)).all(-1))[:, 1]
    grey = np.argwhere((first == (115, 115, 115)).all(-1))[:, 1]
    assert grey.max() < pale.min()
