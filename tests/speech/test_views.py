import math
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoModel, Data2VecAudioConfig, HubertConfig, Wav2Vec2Config, Wav2Vec2FeatureExtractor

from mmssl.data.dataset import KeyedDataset
from mmssl.data.quarantine import Quarantine
from mmssl.masks import blocks
from mmssl.random import generator
from mmssl.types import Batch, Rejected
from modalities.speech import DEFAULTS
from modalities.speech.augment import POLICIES, Crop
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


def test_padding_keeps_whole_samples_where_cutting_would_take_their_ends():
    lengths = (8000, 12000, 9000)
    views = SpeechViews(SpeechFeatures, longest=1.0, shortest=0.1, pad=True)
    samples, view = collated(views, lengths)
    assert [len(sample["x"]) for sample in samples] == [*lengths]
    assert view.x.shape == (3, 12000)
    for row, sample, length in zip(view.x, samples, lengths):
        assert torch.equal(row[:length], sample["x"])
        assert not bool(row[length:].any())
    assert view.pad is not None
    assert (~view.pad).sum(1).tolist() == [SpeechFeatures.frames(length) for length in lengths]
    assert len(views(wave(12000), drawn(0), length=8000)["x"]) == 12000  # whatever the shortest of the update has
    with pytest.raises(ValueError, match="pad: masks are drawn for rows of one length"):
        SpeechViews(SpeechFeatures, mask=MaskOptions(), pad=True)


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


def test_a_single_view_is_drawn_as_ever():
    """First the seed, then the place; runs that were begun before there were several views go on as they were."""
    views, sample = SpeechViews(SpeechFeatures, longest=1.0, shortest=1.0, normalise=False, mask=MaskOptions(copies=2)), wave()
    made = views(sample, drawn("old"))
    source = generator("old", 0)
    seed = int(torch.randint(2**63 - 1, (), generator=source))
    start = int(torch.randint(len(sample) - RATE + 1, (), generator=source))
    assert (int(made["seed"]), [*made]) == (seed, ["x", "seed"])
    assert torch.equal(made["x"], sample[start : start + RATE])
    (view,) = views.collate([made, {"x": made["x"][:-1600], "seed": made["seed"]}])
    cut = int(torch.randint(1601, (), generator=generator(seed, "crop")))
    assert torch.equal(view.x[0], made["x"][cut : cut + RATE - 1600])
    hidden = blocks((SpeechFeatures.frames(RATE - 1600),), 2, 0.5, 5, 0.05, generator(seed, "mask"))
    assert torch.equal(view.mask.hidden[:2], hidden)
    assert view.record == {}


# Several views


def ramp(samples, first=0):
    return torch.arange(float(first), first + samples)


def test_two_crops_lie_at_places_of_their_own_as_recorded():
    views, sample = SpeechViews(SpeechFeatures, longest=1.0, shortest=1.0, normalise=False, crops="cut"), ramp(3 * RATE)
    assert (views.count, views.crops) == (2, 0)
    made = [views(sample, drawn(i)) for i in range(300)]
    one, two = views.collate(made)
    assert one.x.shape == two.x.shape == (300, RATE)
    for view in (one, two):
        assert torch.equal(view.x, view.x[:, :1] + torch.arange(RATE))
        assert_close(view.record["start"] * RATE, view.x[:, 0], rtol=1e-6, atol=0.01)
        assert {record.shape for record in view.record.values()} == {(300,)}
        assert view.pad is view.mask is None
    starts = torch.stack([one.record["start"], two.record["start"]])
    assert abs(float(torch.corrcoef(starts)[0, 1])) < 4 / math.sqrt(300)
    assert all(abs(float(mean) - 1) < 4 * 2 / math.sqrt(12 * 300) for mean in starts.mean(1))


def test_a_view_is_the_same_whatever_others_there_are():
    sample = wave()
    two, six = (SpeechViews(SpeechFeatures, shortest=2.0, crops=name)(sample, drawn(3)) for name in ("pair", "multi"))
    assert [name for name in two if not torch.equal(two[name], six[name])] == []
    assert not torch.equal(two["0.x"], two["1.x"])
    again = SpeechViews(SpeechFeatures, shortest=2.0, crops="pair")(sample, drawn(3))
    assert all(torch.equal(two[name], again[name]) for name in two)


def test_the_shortest_sample_fills_the_fastest_view():
    views = SpeechViews(SpeechFeatures, longest=2.0, shortest=0.5, crops=[Crop(2, speed=(0.8, 1.25))])
    for length in (8000, 8001, 20_011):
        for seed in range(10):  # the sampler passes the least length of the update, which this sample has
            made = views(wave(length), drawn(seed), length)
            assert len(made["0.x"]) == len(made["1.x"]) == math.floor(length / 1.25)
    assert len(views(wave(20_011), drawn(0), 8000)["0.x"]) == 6400


def test_views_of_a_stream_are_cut_to_the_shortest_and_records_follow():
    views = SpeechViews(SpeechFeatures, longest=3.0, shortest=0.5, normalise=False, crops=[Crop(2), Crop(1, seconds=0.4)])
    lengths = [20_000, 9000, 48_000]
    made = [views(ramp(n, 100_000 * i), drawn(i)) for i, n in enumerate(lengths)]
    batch = views.collate(made)
    assert [view.x.shape for view in batch] == [(3, 9000), (3, 9000), (3, 6400)]
    for view in batch:
        first = view.x[:, 0] - 100_000 * torch.arange(3)
        assert_close(view.record["start"] * RATE, first, rtol=1e-5, atol=0.01)
        assert torch.equal(view.x, view.x[:, :1] + torch.arange(view.x.shape[1]))
    assert not torch.equal(batch[0].x, batch[1].x)
    faster = SpeechViews(SpeechFeatures, longest=3.0, shortest=0.5, normalise=False, crops=[Crop(speed=(1.25, 1.25))])
    (view,) = faster.collate([faster(ramp(n), drawn(i)) for i, n in enumerate(lengths)])
    middle = view.x.shape[1] // 2
    assert_close((view.record["start"] + 1.25 * middle / RATE) * RATE, view.x[:, middle], rtol=1e-3, atol=1.0)


def test_smaller_crops_have_a_length_of_their_own_and_no_masks():
    views = SpeechViews(SpeechFeatures, longest=3.0, shortest=2.0, mask=MaskOptions(copies=2), crops="multi")
    assert (views.count, views.crops) == (2, 4)
    batch = views.collate([views(wave(n, n), drawn(n), 40_000) for n in (40_000, 50_000)])
    assert [view.x.shape[1] for view in batch] == [math.floor(40_000 / 1.1)] * 2 + [RATE] * 4
    assert [view.copies if view.mask else 0 for view in batch] == [2, 2, 0, 0, 0, 0]
    assert not torch.equal(batch[0].mask.hidden, batch[1].mask.hidden)


def test_short_samples_are_rejected_with_a_reason():
    views = SpeechViews(SpeechFeatures, shortest=1.0, crops="pair")
    for length, reason in ((None, "too_short: 0.50 s, less than views.shortest=1"), (12_000, "truncated: the header promised")):
        with pytest.raises(Rejected) as caught:
            views(wave(8000), drawn(0), length)
        assert str(caught.value).startswith(reason)


def test_silence_and_loud_sound_stay_finite():
    views = SpeechViews(SpeechFeatures, shortest=1.0, crops="pair-strong")
    for sample in (torch.zeros(2 * RATE), torch.full((2 * RATE,), 0.5), wave() * 1e4):
        made = views(sample, drawn("extreme"))
        assert all(bool(tensor.isfinite().all()) for tensor in made.values())


class Waves:
    """As much of a source as a data set asks for."""

    size, lengths, paired = 12, None, False
    value = staticmethod(lambda index: wave(2 * RATE + 500 * index, index))
    label_at = staticmethod(lambda index: -1)
    identity = staticmethod(str)


def test_two_workers_and_none_give_the_same_batches():
    kind, views = SimpleNamespace(decode=lambda value: value), SpeechViews(SpeechFeatures, crops="pair-strong")
    data = KeyedDataset(Waves(), kind, views, 0, Quarantine(None, 0, 0))
    keys = [[(0, 3, 32_000), (0, 1, 32_000)], [(0, 7, 35_000), (0, 9, 35_000)], [(1, 3, 32_000), (1, 5, 32_000)]]
    own, theirs = ([*DataLoader(data, batch_sampler=keys, collate_fn=data.collate, num_workers=workers)] for workers in (0, 2))
    for one, other in zip(own, theirs, strict=True):
        assert {*one} == {*other}
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(own[0]["0.speech.x"][0], own[2]["0.speech.x"][0])  # another epoch
    (first, second) = Batch.from_tensors(own[0]).views
    assert first.x.shape == second.x.shape == (2, math.floor(32_000 / 1.1))
    assert {*first.record} == {"start", "speed", "pitch", "decay", "noise", "gain", "polarity"}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_fit_the_defaults(name):
    views = SpeechViews(SpeechFeatures, crops=name)
    assert views.count == 2
    assert views.crops == (4 if name == "multi" else 0)


@pytest.mark.parametrize("method", ["simclr", "byol", "barlow_twins", "vicreg", "swav", "dino"])
def test_defaults_of_joint_embedding_are_two_views(method):
    views = SpeechViews(SpeechFeatures, **DEFAULTS[method]["views"])
    assert (views.count, views.crops, views.mask) == (2, 0, None)
    assert views.longest <= 5 * RATE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crops": "pairs"}, "crops: 'pairs' is no known policy (did you mean pair?)"),
        ({"crops": []}, "crops: none are listed"),
        ({"crops": [Crop(), Crop(noise=2.0)]}, "crops.1.noise: 2.0, must be a chance"),
        ({"crops": [Crop(), Crop(seconds=21.0)]}, "crops.1.seconds: 21.0 s, must be at most views.longest=20"),
        ({"crops": [Crop(), Crop(seconds=math.nan)]}, "crops.1.seconds: nan"),
        ({"crops": [Crop(seconds=2.5)]}, "crops.0.seconds: 2.5 s at a speed of up to 1 are more than the shortest"),
        ({"crops": [Crop(seconds=1.9, speed=(0.9, 1.1))]}, "crops.0.seconds: 1.9 s at a speed of up to 1.1"),
        ({"crops": [Crop(), Crop(seconds=0.04)]}, "crops.1.seconds: a crop of 0.04 s has fewer than 2 frames"),
        ({"crops": [Crop(), Crop(seconds=-1.0)]}, "crops.1.seconds: a crop of -1 s"),
        ({"crops": "cut", "shortest": 0.0}, "shortest: a crop of 0 s has fewer than 2 frames"),
        (
            {"crops": [Crop(gaps=4, gap=0.5)]},
            "crops.0.gap: 4 gaps of up to 0.5 s can silence a whole crop, the shortest have 2 s",
        ),
        ({"crops": [Crop(seconds=0.5), Crop(seconds=0.25, gaps=1, gap=0.25)]}, "crops.1.gap: 1 gaps"),
        ({"crops": "pair", "mask": MaskOptions(width=95)}, "mask.width: 95, must be between 1 and 90"),  # of a shorter view
    ],
)
def test_bad_crops_are_refused_by_their_name(options, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        SpeechViews(SpeechFeatures, **options)


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
