import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmssl.random import generator
from modalities.speech.augment import (
    MEL,
    POLICIES,
    Crop,
    check_crop,
    noise,
    one_by_one,
    pitch,
    reverb,
    room,
    source,
    speed,
    view,
    without_bands,
    without_gaps,
)

RATE = 16_000


def sine(hertz, samples=2 * RATE):
    return torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(samples) / RATE).astype(np.float32))


def spoken(samples=2 * RATE, seed=0):
    return torch.randn(samples, generator=generator("spoken", seed))


def loudest(wave):
    """Hz."""
    spectrum = np.abs(np.fft.rfft(wave.double().numpy() * np.hanning(len(wave)), 16 * RATE))
    return spectrum.argmax() / 16


def energy(wave):
    return float((wave.double() ** 2).sum())


def amplitude(wave, hertz):
    """Of that frequency in the middle of the wave."""
    middle = wave.double().numpy()[len(wave) // 4 : -len(wave) // 4]
    turns = np.exp(-2j * np.pi * hertz * np.arange(len(middle)) / RATE)
    return 2 * abs((middle * turns).mean())


# One change at a time


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.07, 1.5])
def test_speed_multiplies_frequencies_and_divides_the_length(factor):
    wave = sine(440.0)
    faster = speed(wave, factor)
    assert len(faster) == math.ceil(len(wave) / factor - 1e-9)
    assert abs(loudest(faster) - 440 * factor) < 0.2
    t = np.arange(2000, 12_000)  # away from the ends, where the filter hears silence
    assert_close(faster.numpy()[t], np.sin(2 * np.pi * 440 * factor * t / RATE), rtol=0, atol=0.01, check_dtype=False)


def test_what_speed_needs():
    assert [source(400, factor) for factor in (0.5, 0.9, 1.0, 1.1, 1.13, 2.0)] == [200, 360, 400, 440, 452, 800]
    assert source(401, 1.1) == 442  # 441.1
    for percent in (50, 87, 100, 107, 200):
        for length in (399, 400, 16_001):
            needed = source(length, percent / 100)
            assert len(speed(spoken(needed), percent / 100)) >= length


@pytest.mark.parametrize("semitones", [-12, -3, -0.6, 2, 7])
def test_pitch_multiplies_frequencies_and_keeps_the_length(semitones):
    higher = pitch(sine(440.0), semitones)
    assert len(higher) == 2 * RATE
    factor = 2 ** (semitones / 12)
    assert abs(loudest(higher) - 440 * factor) < 440 * 0.005 + 0.5  # it is done in hundredths
    assert_close(energy(higher), energy(sine(440.0)), rtol=1e-4, atol=0)
    assert not bool(pitch(torch.zeros(1000), semitones).any())


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
@pytest.mark.parametrize("colour", [0.0, 1.0, 2.0])
def test_noise_is_as_loud_as_asked(snr, colour):
    wave = spoken(30_001) * 0.3
    added = noise(wave, snr, colour, generator("noise")) - wave
    assert_close(10 * math.log10(energy(wave) / energy(added)), snr, rtol=0, atol=1e-3)


@pytest.mark.parametrize("colour", [0.0, 1.0, 2.0])
def test_the_power_of_coloured_noise_falls_with_frequency(colour):
    wave = torch.full((1 << 17,), 0.1)
    added = noise(wave, 0.0, colour, generator("colour")) - wave
    power = np.abs(np.fft.rfft(added.double().numpy())) ** 2
    octaves = [10 * math.log10(power[1 << k : 2 << k].mean()) for k in range(8, 16)]
    slope = np.polyfit(range(len(octaves)), octaves, 1)[0]
    assert abs(slope + 10 * math.log10(2) * colour) < 0.15  # dB for each octave


def test_noise_on_silence_is_silent():
    assert not bool(noise(torch.zeros(1000), 5.0, 1.0, generator("noise")).any())


@pytest.mark.parametrize("decay", [0.1, 0.5])
def test_a_room_decays_by_60_db_in_its_time(decay):
    heard = room(decay, generator("room"))
    assert len(heard) == round(decay * RATE)
    assert_close(energy(heard), 1.0, rtol=1e-5, atol=0)
    assert_close(float(heard[0]) ** 2, 0.5, rtol=1e-5, atol=0)  # the direct sound has half of it
    parts = heard[1:].double().numpy()[: len(heard) // 50 * 50 - 50].reshape(-1, 50)
    decibels = 10 * np.log10((parts**2).mean(1))
    slope = np.polyfit(np.arange(len(parts)) * 50 / RATE, decibels, 1)[0]
    assert abs(slope * decay + 60) < 3


def test_reverberation_is_a_convolution_with_the_room():
    wave = spoken(3000)
    heard = reverb(wave, 0.2, generator("room"))
    expected = np.convolve(wave.double().numpy(), room(0.2, generator("room")).double().numpy())[:3000]
    assert_close(heard.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    assert 0.9 < energy(reverb(spoken(RATE), 0.2, generator("room"))) / energy(spoken(RATE)) < 1.1


def test_bands_remove_a_sine_inside_and_leave_one_outside():
    def mel(hertz):
        return 2595 * math.log10(1 + hertz / 700)

    wave = sine(300, 30_000) + sine(1000, 30_000) + sine(1900, 30_000) + sine(5000, 30_000)
    left = without_bands(wave, torch.tensor([[mel(900), mel(1100)], [mel(4500), mel(6000)]]))
    assert len(left) == 30_000
    for hertz, stays in ((300, 1), (1000, 0), (1900, 1), (5000, 0)):
        assert abs(amplitude(left, hertz) - stays) < 0.01
    assert abs(mel(8000) - MEL) < 1e-9


def test_gaps_are_silent_and_nothing_else_changes():
    wave = torch.arange(1.0, RATE + 1)
    left = without_gaps(wave, torch.tensor([[0.25, 0.5], [0.4, 0.75]]))
    assert not bool(left[4000:12_000].any())
    assert torch.equal(left[:4000], wave[:4000])
    assert torch.equal(left[12_000:], wave[12_000:])


# A view


def test_a_crop_without_changes_is_a_copied_piece_whose_record_says_where():
    sample = torch.arange(1.0, 40_001)
    starts = set()
    for i in range(200):
        x, record = view(sample, 39_990, Crop(), generator(i))
        start = round(record["start"] * RATE)
        assert torch.equal(x, sample[start : start + 39_990])
        assert x.untyped_storage().nbytes() == 39_990 * 4
        starts.add(start)
    assert starts == set(range(11))
    assert {k: v for k, v in record.items() if k != "start"} == {
        **{"speed": 1.0, "pitch": 0.0, "decay": 0.0, "noise": 0.0, "gain": 0.0, "polarity": 1.0}
    }


def test_gain_and_polarity_are_as_recorded():
    found = [view(spoken(), RATE, Crop(gain=(-6.0, 3.0), flip=0.5), generator("gain", i)) for i in range(60)]
    for x, record in found:
        start = round(record["start"] * RATE)
        plain = spoken()[start : start + RATE]
        assert_close(10 * math.log10(energy(x) / energy(plain)), record["gain"], rtol=0, atol=1e-3)
        assert float((x * plain).sum()) * record["polarity"] > 0
    gains = [record["gain"] for _, record in found]
    assert -6 <= min(gains) < -5
    assert 2 < max(gains) <= 3
    assert {record["polarity"] for _, record in found} == {1.0, -1.0}


def test_speed_and_pitch_are_as_recorded():
    crop = Crop(speed=(0.8, 1.25), pitch=(-5.0, 5.0))
    for i in range(6):
        x, record = view(sine(500.0, 4 * RATE), 2 * RATE, crop, generator("both", i))
        assert len(x) == 2 * RATE
        expected = 500 * record["speed"] * 2 ** (record["pitch"] / 12)
        assert abs(loudest(x) - expected) < 1.5
        assert record["speed"] != 1
        assert record["pitch"] != 0


def test_noise_is_as_recorded_and_as_frequent_as_asked():
    plain, crop = spoken(4000), Crop(noise=0.3, snr=(3.0, 9.0))
    found = [view(plain, 4000, crop, generator("noise", i)) for i in range(400)]
    shares = [record["noise"] for _, record in found]
    for (x, _), share in zip(found, shares):
        assert_close(math.sqrt(energy(x - plain) / energy(plain)), share, rtol=1e-4, atol=1e-6)
    chosen = [share for share in shares if share]
    assert abs(len(chosen) / 400 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 400)
    assert 10 ** (-9 / 20) <= min(chosen) < max(chosen) <= 10 ** (-3 / 20)


def test_reverberation_is_recorded():
    decays = [view(spoken(2000), 2000, Crop(reverb=0.5, decay=(0.1, 0.2)), generator(i))[1]["decay"] for i in range(40)]
    assert 0.0 in decays
    assert all(decay == 0 or 0.1 <= decay <= 0.2 for decay in decays)


def test_gaps_and_bands_stay_within_their_widths():
    gone = []
    for i in range(50):
        x, _ = view(torch.ones(RATE), RATE, Crop(gaps=1, gap=0.2), generator("gap", i))
        silent = (x == 0).nonzero().flatten()
        assert len(silent) == 0 or len(silent) == int(silent[-1] - silent[0]) + 1  # one stretch
        gone.append(len(silent) / RATE)
    assert 0.15 < max(gone) <= 0.2 + 1 / RATE
    assert abs(np.mean(gone) - 0.1) < 4 * 0.2 / math.sqrt(12 * 50)
    lost = [
        1 - energy(view(spoken(1 << 14), 1 << 14, Crop(bands=1, band=0.3), generator(i))[0]) / energy(spoken(1 << 14))
        for i in range(40)
    ]
    assert min(lost) >= -1e-4
    assert 0.2 < max(lost) < 0.65  # the upper 0.3 of the mel scale are 55 % of the frequencies


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_finite_views_of_the_asked_length(name):
    for crop in one_by_one(name)[0]:
        for i in range(3):
            x, record = view(spoken(), 20_011, crop, generator(name, i))
            assert x.shape == (20_011,)
            assert x.dtype == torch.float32
            assert bool(x.isfinite().all())
            assert all(math.isfinite(value) for value in record.values())


def test_a_view_depends_on_its_generator_alone():
    (crop, _), _ = one_by_one("pair-strong")
    before = torch.get_rng_state()
    (a, ra), (b, rb), (c, rc) = (view(spoken(), 20_000, crop, generator(i)) for i in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert ra == rb
    assert not torch.equal(a, c)
    assert all(ra[name] != rc[name] for name in ("start", "speed", "gain"))


# Options


def test_full_size_comes_first():
    kinds, full = one_by_one([Crop(2, seconds=1.0), Crop(1, flip=0.1), Crop(2)])
    assert ([crop.seconds for crop in kinds], full) == ([None, None, None, 1.0, 1.0], 3)
    assert kinds[0].flip == 0.1
    kinds, full = one_by_one([Crop(1, seconds=1.0), Crop(2, seconds=2.0)])
    assert ([crop.seconds for crop in kinds], full) == ([2.0, 2.0, 1.0], 2)
    assert one_by_one(None) == ([], 1)


def test_an_unknown_policy_is_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"^crops: 'pair-stron' is no known policy \(did you mean pair-strong\?\); known are cut, "
    ):
        one_by_one("pair-stron")
    with pytest.raises(ValueError, match=r"^crops: none are listed; name a policy, one of cut, pair"):
        one_by_one([])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"count": 0}, "count: 0"),
        ({"count": 65}, "count: 65"),
        ({"noise": 1.1}, "noise: 1.1, must be a chance"),
        ({"reverb": -0.1}, "reverb"),
        ({"flip": math.nan}, "flip"),
        ({"snr": (9.0, 3.0)}, "snr: [9.0, 3.0], must be a range, the lower end first, within [-40, 100]"),
        ({"speed": (0.0, 1.0)}, "speed"),
        ({"speed": (1.0, 2.1)}, "speed"),
        ({"pitch": (-13.0, 0.0)}, "pitch"),
        ({"decay": (0.0, 0.5)}, "decay"),
        ({"colour": (0.0, 9.0)}, "colour"),
        ({"gain": (math.nan, 0.0)}, "gain"),
        ({"bands": -1}, "bands"),
        ({"bands": 10, "band": 0.1}, "band: 0.1, 10 of them"),
        ({"band": 0.0}, "band"),
        ({"gaps": 65}, "gaps"),
        ({"gap": 0.0}, "gap"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(options, name):
    with pytest.raises(ValueError, match="must be") as caught:
        check_crop(Crop(**options), "crops.3")
    assert str(caught.value).startswith(f"crops.3.{name}")
