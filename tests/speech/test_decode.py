import io
import struct

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

from mmssl.config import DataOptions
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import open_source
from mmssl.types import Rejected
from modalities.speech import MODALITY, data
from modalities.speech.data import COLUMNS, FORMATS, FRAME, RATE, SUFFIXES, decode, prepare, raw
from modalities.speech.features import SpeechFeatures
from modalities.speech.views import SpeechViews


def noise(samples=16_000, channels=1, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (samples, channels)).astype(np.float32)


def sine(hertz, seconds, rate):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def encoded(samples, rate=RATE, format="WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def rejection(value) -> str:
    with pytest.raises(Rejected) as caught:
        decode(value)
    return caught.value.kind


# Decoding


def test_every_way_to_name_a_sound_gives_the_same_wave(tmp_path):
    wave, file = noise(), tmp_path / "ein Geräusch.wav"
    soundfile.write(file, wave, RATE, subtype="FLOAT")
    for value in (str(file), file, file.read_bytes(), {"bytes": file.read_bytes(), "path": None}, {"path": str(file)}):
        assert decode(value).dtype == torch.float32
        assert_close(decode(value), torch.from_numpy(wave[:, 0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("format", "subtype", "within"),
    [
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "PCM_16", 1 / 32768),
        ("WAV", "PCM_24", 2e-7),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 0.02),
        ("FLAC", "PCM_16", 1 / 32768),
        ("FLAC", "PCM_24", 2e-7),
        ("AIFF", "PCM_16", 1 / 32768),
        ("AU", "PCM_16", 1 / 32768),
        ("CAF", "PCM_16", 1 / 32768),
        ("W64", "PCM_16", 1 / 32768),
        ("RF64", "PCM_16", 1 / 32768),
        ("NIST", "PCM_16", 1 / 32768),
    ],
)
def test_exact_formats(format, subtype, within):
    wave = noise()
    assert_close(decode(encoded(wave, RATE, format, subtype)), torch.from_numpy(wave[:, 0]), rtol=0, atol=within)


@pytest.mark.parametrize(("format", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_lossy_formats(format, subtype):
    wave = sine(440, 1.0, RATE)
    found = decode(encoded(wave, RATE, format, subtype))
    assert len(found) == RATE
    middle = slice(2000, 14_000)
    assert np.corrcoef(found[middle], wave[middle])[0, 1] > 0.99


@pytest.mark.parametrize(
    "rate", [8000, 11_025, 12_000, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000, 11_127, 44_101]
)
def test_resampling_keeps_duration_and_pitch(rate):
    found = decode(encoded(sine(1000, 1.0, rate), rate, "WAV", "FLOAT"))
    assert abs(len(found) - RATE) <= 1
    middle = slice(1000, 15_000)  # the filter sees silence beyond the ends
    wanted = sine(1000, 1.0, RATE)[middle]
    assert_close(found[middle].double(), torch.from_numpy(wanted), rtol=0, atol=0.02 if rate in (11_127, 44_101) else 0.005)


def test_resampling_removes_what_16_kHz_cannot_hold():
    high = decode(encoded(sine(11_000, 1.0, 48_000), 48_000, "WAV", "FLOAT"))
    assert high[1000:-1000].abs().max() < 0.01


def test_channels_are_averaged():
    left, right = noise(seed=1), noise(seed=2)
    found = decode(encoded(np.concatenate([left, right], 1), RATE, "WAV", "FLOAT"))
    assert_close(found, torch.from_numpy((left + right)[:, 0] / 2), rtol=0, atol=1e-7)


def test_nothing_is_normalised():
    assert decode(encoded(np.full((800, 1), 0.25, np.float32), RATE, "WAV", "FLOAT")).unique().tolist() == [0.25]


# Rejections


@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("FLAC", "PCM_16")],
)
def test_truncated(format, subtype, share):
    whole = encoded(noise(), RATE, format, subtype)
    assert len(decode(whole)) == 16_000
    assert rejection(whole[: int(len(whole) * share)]) == "truncated"


def variable_rate_mp3() -> bytes:
    """Four seconds, with an index frame that tells how many samples there are."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 1, format="MP3", bitrate_mode="VARIABLE") as file:
        file.write(np.concatenate([np.zeros((32_000, 1), np.float32), noise(32_000)]))
    return buffer.getvalue()


def test_an_mp3_is_truncated_if_its_index_promises_more():
    whole = variable_rate_mp3()
    assert len(decode(whole)) == 64_000
    assert rejection(whole[: len(whole) // 2]) == "truncated"


def test_an_mp3_without_an_index_is_as_long_as_it_is():
    whole = variable_rate_mp3()
    bare = whole[whole.index(whole[:2], 2) :]  # from the second frame on
    promised = soundfile.info(io.BytesIO(bare)).frames
    assert promised > 1.1 * 64_000  # a guess from the first frames
    assert abs(len(decode(bare)) - 64_000) < 4000


def test_a_wave_file_of_a_pipe_is_whole_although_its_header_promises_gigabytes():
    whole = encoded(noise(), RATE, "WAV", "PCM_16")
    for size in (0xFFFFFFFF, 0x7FFFF000):
        assert len(decode(whole[:40] + struct.pack("<I", size) + whole[44:])) == 16_000


def test_not_sounds(tmp_path):
    (tmp_path / "text.wav").write_text("I am no sound. " * 99)
    (tmp_path / "empty.wav").touch()
    assert rejection(str(tmp_path / "text.wav")) == "unreadable"
    assert rejection(str(tmp_path / "absent.wav")) == "unreadable"
    assert rejection(str(tmp_path)) == "unreadable"
    assert rejection(np.random.default_rng(0).bytes(9999)) == "unreadable"
    assert rejection(encoded(noise(), RATE, "MAT5", "PCM_16")) == "unreadable"  # libsndfile reads matrices, we do not
    assert rejection(str(tmp_path / "empty.wav")) == rejection(b"") == rejection(encoded(noise(0))) == "empty"
    assert rejection(17) == rejection({"bytes": None, "path": None}) == rejection(None) == "wrong_type"


def test_reasons_name_the_fault_and_no_object_in_memory():
    with pytest.raises(Rejected) as caught:
        decode(b"RIFF" + b"x" * 99)
    assert caught.value.reason
    assert "0x" not in caught.value.reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite(value):
    wave = noise()
    wave[77] = value
    assert rejection(encoded(wave, RATE, "WAV", "FLOAT")) == "non_finite"


def test_finite_samples_whose_sum_is_not():
    loud = np.full((800, 1), 1e38, np.float32)
    assert_close(decode(encoded(loud, RATE, "WAV", "FLOAT")), torch.full((800,), 1e38))


def test_one_frame_is_the_least():
    assert len(decode(encoded(noise(400)))) == 400
    assert rejection(encoded(noise(399))) == "too_short"
    assert len(decode(encoded(noise(200), 8000))) == 400
    assert len(decode(encoded(noise(1100), 44_100))) == 400
    assert rejection(encoded(noise(1099), 44_100)) == "too_short"


def test_long_sounds_are_refused_by_their_header(monkeypatch):
    whole = encoded(np.zeros((30 * 60 * 1000, 1), np.int16), 1000, "WAV", "PCM_U8")
    more = encoded(np.zeros((30 * 60 * 1000 + 1000, 1), np.int16), 1000, "WAV", "PCM_U8")
    many = encoded(np.zeros((2_097_153, 1), np.int16), RATE, "WAV", "PCM_U8")
    # As if the two minutes had 256 channels.
    many = many[:22] + struct.pack("<HIIHH", 256, RATE, RATE * 256, 256, 8) + many[36:]
    assert len(decode(whole)) == 30 * 60 * RATE

    def read(*_, **__):
        raise AssertionError("samples were read")

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    assert rejection(more) == "too_long"
    monkeypatch.setattr(data, "MAX_VALUES", 2_097_000)
    assert rejection(many) == "too_large"


def test_a_missing_library_is_named_with_the_mend(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"speech needs soundfile.*pip install"):
        decode(b"RIFF")


def test_files_are_closed_even_if_they_are_refused(tmp_path, monkeypatch):
    for name, samples in (("short", 10), ("long", 500)):
        soundfile.write(tmp_path / f"{name}.wav", noise(samples), RATE)
    opened, make = [], soundfile.SoundFile
    monkeypatch.setattr(soundfile, "SoundFile", lambda place: opened.append(make(place)) or opened[-1])
    assert rejection(tmp_path / "short.wav") == "too_short"
    decode(tmp_path / "long.wav")
    assert [file.closed for file in opened] == [True, True]


# Raw features


def test_raw_is_mean_and_deviation_of_a_log_mel_spectrogram():
    wave = noise(4000)[:, 0].astype(np.float64) + sine(700, 0.25, RATE)
    padded = np.pad(wave, 256)
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.stack([np.abs(np.fft.rfft(window * padded[i : i + 512])) ** 2 for i in range(0, len(padded) - 511, 160)])
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82)
    edges, bins = 700 * (10 ** (mels / 2595) - 1), np.arange(257) * RATE / 512
    bands = np.zeros((len(power), 80))
    for b in range(80):
        low, centre, high = edges[b : b + 3]
        weight = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
        bands[:, b] = np.log(np.maximum(power @ weight, 1e-6))
    wanted = np.concatenate([bands.mean(0), bands.std(0)])
    assert_close(raw(torch.from_numpy(wave).float()).double(), torch.from_numpy(wanted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [1, 400, 16_001])
def test_raw_of_any_length(samples):
    for wave in (torch.zeros(samples), torch.randn(samples, generator=torch.Generator().manual_seed(0))):
        assert raw(wave).shape == (160,)
        assert bool(raw(wave).isfinite().all())


# Headers of a whole set


@pytest.fixture
def clips(tmp_path):
    """Folder of two classes: (name, seconds, rate) good ones, a short one, and three that cannot be used."""
    made = {"a/1.wav": (1.0, 16_000), "a/2.flac": (2.5, 44_100), "b/3.wav": (0.3, 8000), "b/4.ogg": (1.5, 22_050)}
    for name, (seconds, rate) in made.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, noise(round(seconds * rate)), rate)
    (tmp_path / "a" / "5.wav").write_bytes(b"nothing")
    (tmp_path / "b" / "6.wav").write_bytes(encoded(noise())[:16_000])
    soundfile.write(tmp_path / "b" / "7.wav", noise(50), RATE)
    return tmp_path


def opened(folder):
    return open_source(DataOptions(path=str(folder), modality="speech"), MODALITY, "train")


def test_prepare_measures_leaves_out_and_records(clips, monkeypatch):
    source, quarantine = opened(clips), Quarantine(clips.parent / "bad.jsonl", 0.0, 0)
    monkeypatch.setattr(data, "CHUNK", 3)  # more than one turn of the threads
    found = prepare(source, SpeechViews(SpeechFeatures, shortest=0.5), quarantine)
    names = [source.identity(i)[len(str(clips)) + 1 :] for i in range(source.size)]
    wanted = {"a/1.wav": 16_000, "a/2.flac": 40_000, "b/4.ogg": 24_000}
    assert dict(zip(names, found.lengths.tolist())) == {name: wanted.get(name, -1) for name in names}
    assert len(names) == source.size == found.size == 7  # rows stay, so that an index means the same sample
    assert found.lengths.dtype == torch.int64
    assert torch.equal(found.labels, source.labels)
    assert found.facts["left_out"] == {"shorter than 0.5 s (views.shortest)": 1, "unusable": 3}
    assert found.facts["hours"] == round(5 / 3600, 3)
    assert (quarantine.totals(), quarantine.summary()["kinds"]) == ((3, 7), {"unreadable": 1, "truncated": 1, "too_short": 1})
    assert (clips.parent / "bad.jsonl").read_text().count("5.wav") == 1
    for index, length in enumerate(found.lengths.tolist()):
        if length > 0:
            assert len(decode(source.value(index))) == length


def test_prepare_leaves_nothing_out_that_is_long_enough(clips):
    found = prepare(opened(clips), SpeechViews(SpeechFeatures, shortest=0.0), Quarantine(None, 0, 0))
    assert int((found.lengths > 0).sum()) == 4
    assert found.facts["left_out"] == {"unusable": 3}


def test_prepare_says_when_nothing_remains(clips):
    with pytest.raises(ValueError, match=r"^data\.path: nothing remains of the 7 samples.* 4 shorter than 9 s .*5\.wav.*Lower"):
        prepare(opened(clips), SpeechViews(SpeechFeatures, shortest=9.0), Quarantine(None, 0, 0))


def test_prepare_leaves_streams_alone(clips):
    rows = opened(clips).rows.to_iterable_dataset()
    source = opened(clips)._replace(rows=rows)
    assert prepare(source, None, None) is source


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000, 11_127, 999_983])
def test_lengths_from_headers_are_those_of_decoded_waves(rate):
    for samples in (rate // 10, rate // 10 + 1, rate // 3):
        file = soundfile.SoundFile(io.BytesIO(encoded(noise(samples), rate)))
        assert data._length(file.frames, rate) == len(decode(encoded(noise(samples), rate)))


# Names


def test_names_and_numbers():
    assert {"audio", "path"} <= set(COLUMNS)
    assert {".wav", ".flac", ".ogg", ".mp3"} <= set(SUFFIXES)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)
    assert set(FORMATS) <= set(soundfile.available_formats())
    assert (SpeechFeatures.sample_rate, SpeechFeatures.receptive_field) == (RATE, FRAME)


@pytest.mark.realdata
def test_recordings_of_a_table_are_read(real_data):
    source = open_source(DataOptions(path=str(real_data / "fsdd"), modality="speech"), MODALITY, "test")
    found = prepare(source, SpeechViews(SpeechFeatures, shortest=0.2), Quarantine(None, 0, 0))
    assert source.label == "label"
    assert int((found.lengths > 0).sum()) >= 295
    assert len(decode(source.value(0))) == found.lengths[0]
