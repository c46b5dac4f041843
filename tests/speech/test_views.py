import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, Data2VecAudioConfig, HubertConfig, Wav2Vec2Config, Wav2Vec2FeatureExtractor

from mmssl.random import generator
from mmssl.types import Rejected
from modalities.speech.features import SpeechFeatures
from modalities.speech.processor import Convolutions, plain_views, processor
from modalities.speech.views import MaskOptions, SpeechViews

RATE = 16_000


def wave(samples=3 * RATE, seed=0):
    """Speech-like in that loudness and mean drift."""
    draw = np.random.default_rng(seed)
    loud = 0.05 + 0.1 * np.sin(np.linspace(0, 7, samples)) ** 2
    return torch.from_numpy((draw.normal(0, 1, samples) * loud + np.linspace(-0.1, 0.3, samples)).astype(np.float32))


def drawn(*parts):
    return lambda view: generator(*parts, view)


def collated(views, lengths, seeds=None):
    samples = [views(wave(n, s), drawn(s)) for n, s in zip(lengths, seeds or range(len(lengths)))]
    return samples, views.collate(samples)[0]


# One sample


def test_a_wave_has_mean_0_and_variance_1_as_a_whole_and_its_crop_has_not():
    views, sample = SpeechViews(SpeechFeatures, longest=1.0, shortest=0.5), wave()
    whole = SpeechViews(SpeechFeatures, longest=3.0)(sample, drawn(0))["x"]
    assert_close(float(whole.mean()), 0.0, rtol=0, atol=1e-5)
    assert_close(float(whole.var(correction=0)), 1.0, rtol=0, atol=2e-3)  # eps is beside a variance of 0.02
    x, y = sample.double(), whole.double()
    assert_close(y, (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt(), rtol=0, atol=1e-5)
    crop = views(sample, drawn(0))["x"]
    assert abs(float(crop.mean())) + abs(float(crop.var()) - 1) > 0.1
    assert any(torch.equal(crop, whole[i : i + RATE]) for i in (whole == crop[0]).nonzero().flatten().tolist())


def test_normalising_can_be_turned_off_and_silence_stays_silent():
    sample = wave()
    assert torch.equal(SpeechViews(SpeechFeatures, normalise=False)(sample, drawn(0))["x"], sample)
    assert not bool(SpeechViews(SpeechFeatures)(torch.full((3 * RATE,), 0.5), drawn(0))["x"].any())


def test_crops_start_anywhere_and_are_no_views_of_the_whole():
    views, sample = SpeechViews(SpeechFeatures, longest=0.05, shortest=0.05, normalise=False), torch.arange(1000.0)
    crops = [views(sample, drawn(i))["x"] for i in range(4000)]
    starts = torch.stack([crop[0] for crop in crops])
    assert all(torch.equal(crop, sample[int(crop[0]) : int(crop[0]) + 800]) for crop in crops)
    assert (float(starts.min()), float(starts.max())) == (0.0, 200.0)
    assert abs(float(starts.mean()) - 100) < 4 * 58 / math.sqrt(4000)
    assert crops[0].untyped_storage().nbytes() == 800 * 4


def test_a_view_is_cut_to_the_length_of_its_update():
    views = SpeechViews(SpeechFeatures, longest=3.0, shortest=1.0)
    assert len(views(wave(5 * RATE), drawn(0))["x"]) == 3 * RATE
    assert len(views(wave(2 * RATE), drawn(0))["x"]) == 2 * RATE
    assert len(views(wave(5 * RATE), drawn(0), 20_000)["x"]) == 20_000
    assert len(views(wave(20_000), drawn(0), 20_000)["x"]) == 20_000


def test_a_sample_shorter_than_promised_or_wanted_is_rejected():
    views = SpeechViews(SpeechFeatures, longest=3.0, shortest=1.0)
    for length, kind in ((20_000, "truncated"), (None, "too_short")):
        with pytest.raises(Rejected) as caught:
            views(wave(15_999), drawn(0), length)
        assert caught.value.kind == kind
    assert len(views(wave(16_000), drawn(0))["x"]) == 16_000


def test_a_view_depends_on_its_key_alone():
    views = SpeechViews(SpeechFeatures, longest=1.0, shortest=1.0)
    one, other = views(wave(), drawn(1)), views(wave(), drawn(2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = views(wave(), drawn(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one["seed"].dtype == torch.int64
    for name in ("x", "seed"):
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])


# Batches


@pytest.mark.parametrize("kind", ["block", "span"])
def test_unequal_waves_are_cut_to_the_shortest_and_keep_equally_many_frames(kind):
    views = SpeechViews(SpeechFeatures, mask=MaskOptions(kind=kind, copies=3))
    lengths = [40_000, 64_000, 33_333, 320_000, 48_001]
    samples, view = collated(views, lengths)
    frames = SpeechFeatures.frames(33_333)
    assert (view.modality, view.pad, view.copies, view.x.shape) == ("speech", None, 3, (5, 33_333))
    assert view.mask.hidden.shape == (15, frames)
    assert len(set((~view.mask.hidden).sum(1).tolist())) == 1
    for sample, x in zip(samples, view.x):  # each is a piece of its wave
        starts = (sample["x"] == x[0]).nonzero().flatten().tolist()
        assert any(torch.equal(sample["x"][s : s + 33_333], x) for s in starts)
    rows = {tuple(row.tolist()) for row in view.mask.hidden}
    assert len(rows) == 15


@pytest.mark.parametrize(("options", "masked"), [(MaskOptions(), 499), (MaskOptions(ratio=0.55, adjust=0.1, copies=12), 549)])
def test_twenty_seconds_hide_as_many_frames_as_in_the_paper(options, masked):
    _, view = collated(SpeechViews(SpeechFeatures, mask=options), [320_000, 400_000])
    assert view.mask.hidden.shape == (2 * options.copies, 999)
    assert set(view.mask.hidden.sum(1).tolist()) == {masked}


@pytest.mark.parametrize("kind", ["block", "span"])
def test_crop_and_masks_do_not_depend_on_the_company(kind):
    views = SpeechViews(SpeechFeatures, mask=MaskOptions(kind=kind, copies=2))
    _, one = collated(views, [50_000, 40_000, 60_000], [7, 8, 9])
    _, two = collated(views, [40_000, 70_000, 80_000, 50_000], [8, 4, 5, 7])
    for here, there in ((0, 3), (1, 0)):
        assert torch.equal(one.x[here], two.x[there])
        ours, theirs = (view.mask.hidden[2 * i : 2 * i + 2] for view, i in ((one, here), (two, there)))
        if kind == "block":
            assert torch.equal(ours, theirs)
        else:  # the fewest hidden in the batch decides how many are left of the same spans
            fewer, more = sorted((ours, theirs), key=lambda hidden: int(hidden.sum()))
            assert not bool((fewer & ~more).any())


def test_the_shorter_the_company_the_shorter_the_crop_and_another_mask():
    views = SpeechViews(SpeechFeatures, mask=MaskOptions(copies=1))
    (_, alone), (_, cut) = collated(views, [50_000], [7]), collated(views, [50_000, 35_000], [7, 8])
    assert (alone.x.shape[1], cut.x.shape[1]) == (50_000, 35_000)
    assert alone.mask.hidden.shape != cut.mask.hidden.shape


def test_collating_draws_from_the_seeds_alone():
    views = SpeechViews(SpeechFeatures, mask=MaskOptions(kind="span"))
    samples, view = collated(views, [40_000, 50_000])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = views.collate(samples)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.x, view.x)
    assert torch.equal(again.mask.hidden, view.mask.hidden)


def test_spans_hide_about_half():
    views = SpeechViews(SpeechFeatures, mask=MaskOptions(kind="span", ratio=0.65, width=10, copies=1))
    shares = [float(collated(views, [320_000], [seed])[1].mask.hidden.float().mean()) for seed in range(40)]
    assert abs(np.mean(shares) - 0.49) < 0.01  # alone, one copy: nothing is made equal


def test_without_masks_there_are_none():
    assert collated(SpeechViews(SpeechFeatures), [40_000, 50_000])[1].mask is None


# Evaluation


def test_plain_pads_with_zeros_and_marks_frames_that_reach_into_padding():
    views, lengths = SpeechViews(SpeechFeatures, longest=3.0), [16_000, 40_000, 400, 30_500]
    view = views.plain([wave(n, n) for n in lengths])
    assert (view.x.shape, view.pad.shape, view.mask) == ((4, 40_000), (4, 124), None)
    for x, pad, n in zip(view.x, view.pad, lengths):
        alone = views.plain([wave(n, n)])
        assert torch.equal(alone.x[0], x[:n])
        assert alone.pad is None
        assert not bool(x[n:].any())
        for frame, padding in enumerate(pad.tolist()):  # it hears samples 320 f up to 320 f + 400
            assert padding == (320 * frame + 400 > n)


def test_plain_marks_as_the_model_does():
    view = SpeechViews(SpeechFeatures, longest=3.0).plain([wave(n, n) for n in (16_000, 40_000, 8001)])
    valid = torch.arange(40_000) < torch.tensor([16_000, 40_000, 8001])[:, None]
    assert torch.equal(view.pad, SpeechFeatures(16, 16).pad(valid.long()))


def test_plain_takes_the_middle_of_what_is_too_long():
    views = SpeechViews(SpeechFeatures, longest=1.0, shortest=0.0, normalise=False)
    view = views.plain([torch.arange(20_000.0), torch.arange(500.0)])
    assert torch.equal(view.x[0], torch.arange(2000.0, 18_000.0))
    assert torch.equal(view.x[1, :500], torch.arange(500.0))
    assert views.plain([wave(16_000), wave(16_000)]).pad is None
    assert views.plain([wave(16_000), wave(16_001)]).pad is None  # as many frames


# Export


@pytest.mark.parametrize("normalise", [True, False])
def test_the_exported_processor_does_what_the_plain_view_does(normalise):
    views = SpeechViews(SpeechFeatures, normalise=normalise)
    exported, waves = processor(None, views), [wave(n, n) for n in (16_000, 24_000, 9000)]
    theirs = exported([w.numpy() for w in waves], sampling_rate=RATE, padding=True, return_tensors="pt")
    ours = views.plain(waves)
    # 1e-5 beside a variance of at least 0.01 makes waves smaller by 0.05 %.
    assert_close(ours.x, theirs["input_values"], rtol=1e-3, atol=1e-5)
    assert torch.equal(ours.pad, SpeechFeatures(16, 16).pad(theirs["attention_mask"]))


@pytest.mark.parametrize("normalise", [True, False])
def test_views_of_a_saved_model_are_those_it_was_trained_with(tmp_path, normalise):
    processor(None, SpeechViews(SpeechFeatures, normalise=normalise)).save_pretrained(tmp_path)
    model = SimpleNamespace(config=SimpleNamespace())
    assert plain_views(model, tmp_path).normalise is normalise
    assert plain_views(model, tmp_path / "nothing").normalise is True
    assert len(plain_views(model, tmp_path).plain([wave(400)]).x[0]) == 400  # nothing is too short to be looked at


def test_a_model_for_another_rate_is_refused(tmp_path):
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="8000 Hz"):
        plain_views(SimpleNamespace(config=SimpleNamespace()), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        Data2VecAudioConfig(),
        HubertConfig(),
        Wav2Vec2Config(conv_dim=(8, 8), conv_kernel=(20, 5), conv_stride=(10, 3)),
        Wav2Vec2Config(add_adapter=True, num_adapter_layers=2),
    ],
)
def test_frames_are_counted_as_transformers_counts_them(config, tmp_path):
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    frames = pickle.loads(pickle.dumps(plain_views(model, tmp_path))).frames
    for samples in (400, 799, 16_000, 16_001, 320_000):
        assert frames(samples) == int(model._get_feat_extract_output_lengths(torch.tensor(samples)))


def test_our_own_frames():
    for samples in (0, 399, 400, 719, 720, 16_000, 32_000, 160_000, 320_000):
        assert Convolutions().frames(samples) == SpeechFeatures.frames(samples)


# Options


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"longest": 0.04, "shortest": 0.0}, "longest"),
        ({"longest": 1.0}, "longest"),
        ({"longest": 2000.0}, "longest"),
        ({"longest": math.nan}, "longest"),
        ({"shortest": -1.0}, "shortest"),
        ({"shortest": math.nan}, "shortest"),
        ({"shortest": 0.0, "mask": MaskOptions()}, "shortest"),
        ({"shortest": 0.03, "mask": MaskOptions()}, "shortest"),
        ({"mask": MaskOptions(ratio=0.0)}, "mask.ratio"),
        ({"mask": MaskOptions(ratio=1.0)}, "mask.ratio"),
        ({"mask": MaskOptions(ratio=0.01)}, "mask.ratio"),  # of 99 frames
        ({"mask": MaskOptions(width=0)}, "mask.width"),
        ({"mask": MaskOptions(width=100)}, "mask.width"),
        ({"mask": MaskOptions(kind="span", width=99)}, "mask.width"),
        ({"mask": MaskOptions(copies=0)}, "mask.copies"),
        ({"mask": MaskOptions(copies=1025)}, "mask.copies"),
        ({"mask": MaskOptions(adjust=1.0)}, "mask.adjust"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(options, name):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        SpeechViews(SpeechFeatures, **options)


@pytest.mark.parametrize("kind", ["block", "span"])
@pytest.mark.parametrize(("seconds", "ratio", "width"), [(0.045, 0.5, 1), (0.3, 0.08, 5), (0.3, 0.99, 13), (2.0, 0.02, 98)])
def test_what_is_not_refused_can_be_drawn(kind, seconds, ratio, width):
    mask = MaskOptions(kind=kind, ratio=ratio, width=width, copies=4)
    views = SpeechViews(SpeechFeatures, longest=3.0, shortest=seconds, mask=mask)
    for seed in range(20):
        collated(views, [views.shortest, views.shortest + 999], [seed, seed + 1])


def test_attributes_of_the_protocol():
    views = SpeechViews(SpeechFeatures, longest=15.0, shortest=0.5)
    assert (views.ragged, views.longest, views.shortest) == (True, 240_000, 8000)
