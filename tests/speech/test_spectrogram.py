"""Spectrograms: features, views, the exported processor and model."""

import json
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModel

from mmssl import registry
from mmssl.config import Recipe, shipped_recipes
from mmssl.errors import RecipeError
from mmssl.hub.flatten import flatten
from mmssl.methods import METHODS
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.token_decoder import TokenDecoderOptions
from mmssl.random import generator
from mmssl.types import Batch, Clock, Rejected, View
from modalities.speech.mel_alter import Alterations, altered, block_starts
from modalities.speech.mel_features import MelFeatures, interleaved
from modalities.speech.mel_views import MelMask, MelViews, frames, log_mel, samples
from modalities.speech.spectrogram import MODALITY, plain_views, processor

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())
WAVE = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 0.3, 16_000)
SHAPE = {"bands": 8, "frames": 24, "patch_frames": 4, "patch_bands": 2}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The registry as it is once the package is installed anew."""
    point = EntryPoint("spectrogram", "modalities.speech.spectrogram:MODALITY", registry.GROUP)
    points = {**registry._points(), "spectrogram": point}
    monkeypatch.setattr(registry, "_points", lambda: points)


def draws(seed=0):
    return lambda view: generator(seed, view)


def encoder(**options):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "depth": 2, "heads": 2, "extra_tokens": 0, **SHAPE} | options
    return Encoder.from_config(MmsslConfig(modality="spectrogram", **shape)).eval()


# Features ---------------------------------------------------------------------------------------------------------------


def test_patches_follow_in_time_then_over_bands_and_a_frames_bands_are_adjacent():
    features = MelFeatures(8, **SHAPE, mean=2.0, std=4.0)
    x = torch.randn(2, 14, 8, generator=torch.Generator().manual_seed(0))  # 3 patches in time, two frames are left over
    found = features.raw(x)
    assert (features.grid, features.length, features.raw_width, found.shape) == ((6, 4), 24, 8, (2, 12, 8))
    for b in range(2):
        for row in range(3):
            for column in range(4):
                cells = [(x[b, row * 4 + i, column * 2 + j] - 2) / 4 for i in range(4) for j in range(2)]
                assert_close(found[b, row * 4 + column], torch.stack(cells))
    assert_close(features.unraw(found), (x[:, :12] - 2) / 4)
    weight = features.proj.weight.view(8, 1, 4, 2)  # the convolution of AST
    other = F.conv2d((x[:, None, :12] - 2) / 4, weight, features.proj.bias, stride=(4, 2)).flatten(2).transpose(1, 2)
    assert_close(features(x), other)


def test_positions_of_a_sequence_are_interleaved_and_of_a_grid_those_of_audio_mae():
    table = interleaved(4, 4)
    assert_close(table[1], torch.tensor(VECTORS["sinusoid_layouts"]["interleaved_tera"]))
    assert_close(table[3], torch.tensor(VECTORS["sinusoid_layouts"]["position_3_interleaved"]))
    whole = MelFeatures(12, 8, 6, 2).positions(1, 0)
    assert_close(whole.table[0], interleaved(3, 12))
    grid = MelFeatures(12, 8, 6, 2, 4, position_scale=0.5).positions(1, 0).table[0].view(3, 2, 12)
    for time in range(3):
        for band in range(2):
            angles = [place * 10000 ** (-i / 3) for place in (band, time) for i in range(3)]
            code = np.concatenate([f(angles[k : k + 3]) for k in (0, 3) for f in (np.sin, np.cos)])
            assert_close(grid[time, band], 0.5 * torch.tensor(code, dtype=torch.float32))


def test_a_shorter_input_is_the_beginning_of_a_longer_one_and_a_longer_one_is_refused():
    net = encoder()
    x = torch.randn(1, 24, 8)
    assert_close(net.positions(net.features(x[:, :9]))[0], net.positions(net.features(x))[0][:, :8])
    with pytest.raises(ValueError, match=r"frames: 28 patches are more than the 24 .*model\.frames"):
        net(View(torch.zeros(1, 28, 8), "spectrogram"))
    for wrong in (torch.zeros(1, 3, 8), torch.zeros(1, 8, 9)):
        with pytest.raises(ValueError, match=r"frames and \d bands; at least 4 frames"):
            net.features(wrong)


def test_a_patch_that_padding_reaches_into_is_padding():
    valid = torch.arange(11) < torch.tensor([[11], [8], [7], [3]])
    wanted = [[False] * 8, [False] * 8, [False] * 4 + [True] * 4, [True] * 8]
    assert MelFeatures(8, **SHAPE).pad(valid).tolist() == wanted


FEATURES = [
    ({"bands": 3}, "bands: 3"),
    ({"frames": 25}, r"frames: 25 is not a multiple of patch_frames 4; try model\.frames=24"),
    ({"patch_frames": 0}, "frames: 24 is not a multiple of patch_frames 0"),
    ({"patch_bands": 3}, r"patch_bands: 3, must divide the 8 bands"),
    ({"std": 0.0}, r"std: 0\.0, must be above 0"),
    ({"position_scale": -1.0}, "position_scale: -1"),
]


@pytest.mark.parametrize(("options", "text"), FEATURES)
def test_features_refuse_what_does_not_fit(options, text):
    with pytest.raises(ValueError, match=text):
        MelFeatures(8, **SHAPE | options)


# Views ------------------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_whole_windows():
    assert [frames(n) for n in (0, 399, 400, 559, 560, 16_000)] == [0, 0, 1, 1, 2, 98]
    assert all(frames(samples(n)) == n and frames(samples(n) - 1) == n - 1 for n in range(1, 50))
    assert len(log_mel(WAVE, 40)) == 98


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("torchaudio", [True, False])
def test_the_processor_gives_the_numbers_of_the_plain_view(normalise, torchaudio, monkeypatch):
    """With torchaudio, and with numpy where that is missing."""
    from transformers.models.speech_to_text import feature_extraction_speech_to_text as theirs

    monkeypatch.setattr(theirs, "is_speech_available", lambda: torchaudio)
    features = MelFeatures(8, 80, 100, 4, 16)
    views = MelViews(features, shortest=0.1, normalise=normalise)
    waves = [WAVE, WAVE[:9000]]
    mine = views.plain(waves)
    given = processor(features, views)([w.numpy() for w in waves], sampling_rate=16_000, padding=True, return_tensors="pt")
    assert_close(mine.x, given["input_features"], rtol=0, atol=1e-4 if torchaudio else 2e-3)
    assert torch.equal(mine.pad, features.pad(given["attention_mask"]))
    assert mine.pad.sum().tolist() == 5 * (98 // 4 - frames(9000) // 4)


def test_a_band_that_never_changes_is_zero():
    view = MelViews(MelFeatures(8, 20, 100), shortest=0.1).plain([torch.zeros(4000)])
    assert torch.equal(view.x, torch.zeros(1, 23, 20))


def test_padding_changes_no_embedding():
    net, views = encoder(frames=100), MelViews(MelFeatures(8, **SHAPE | {"frames": 100}), shortest=0.1)
    both, alone = views.plain([WAVE, WAVE[:7000]]), views.plain([WAVE[:7000]])
    assert alone.pad is None
    assert_close(net.pool(net(both))[1], net.pool(net(alone))[0], rtol=1e-4, atol=1e-5)


def test_padding_keeps_whole_samples_where_cutting_would_take_their_ends():
    views = MelViews(MelFeatures(8, **SHAPE | {"frames": 80}), shortest=0.1, pad=True)
    waves = [torch.randn(n, generator=draws()(0)) for n in (4000, 9000)]
    found = [views(wave, draws(), length=4000) for wave in waves]  # whatever the shortest of the update has
    (view,), plain = views.collate(found), views.plain([wave[: samples(len(one["x"]))] for wave, one in zip(waves, found)])
    assert len(found[0]["x"]) < len(found[1]["x"])
    assert len(view.x[0]) == len(found[1]["x"])
    assert torch.equal(view.x[0, : len(found[0]["x"])], found[0]["x"])
    assert view.pad is not None
    assert torch.equal(view.pad, plain.pad)
    with pytest.raises(ValueError, match="pad: masks and alterations are drawn for rows of one length"):
        MelViews(MelFeatures(8, **SHAPE), shortest=0.24, mask=MelMask("span", 0.5, width=2), pad=True)


def test_views_are_keyed_crops_of_whole_patches_of_one_length():
    views = MelViews(MelFeatures(8, **SHAPE | {"frames": 80}), shortest=0.1)
    first, again, other = (views(WAVE, draws(seed), 12_000)["x"] for seed in (0, 0, 1))
    assert first.shape == (frames(12_000) // 4 * 4, 8) == (72, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    loose = [views(WAVE[:n], draws(n)) for n in (16_000, 10_000)]
    (view,) = views.collate(loose)
    assert view.x.shape == (2, 60, 8)
    assert (loose[0]["x"].unfold(0, 60, 1).transpose(1, 2) == view.x[0]).all(2).all(1).sum() == 1  # a stretch of it
    assert torch.equal(view.x[1], loose[1]["x"])
    for sample, length, kind in ((WAVE[:1000], None, "too_short"), (WAVE[:9000], 9001, "truncated"), (WAVE, 800, "too_short")):
        with pytest.raises(Rejected) as caught:
            views(sample, draws(), length)
        assert caught.value.kind == kind
    with pytest.raises(Rejected, match="no patch of 4 frames"):
        views.plain([WAVE[:800]])


GRIDS = [
    ({"kind": "patch", "ratio": 0.8}, 102),
    ({"kind": "grid", "time": 0.6, "band": 0.5}, 25 * 4),
    ({"kind": "grid", "time": 0.7, "band": 0.3}, 19 * 5),
]


@pytest.mark.parametrize(("options", "kept"), GRIDS)
def test_masks_keep_as_many_patches_as_audio_mae(options, kept):
    told = VECTORS["audiomae"]
    assert kept in (told["keep_unstructured_0_8"], told["keep_2d_t0_6_f0_5"][2], told["keep_2d_defaults_t0_7_f0_3"][2])
    features = MelFeatures(8, 128, 1024, 16, 16)
    assert [list(features.grid), features.length] == [told["grid"], told["tokens"]]
    views = MelViews(features, shortest=10.25, mask=MelMask(**options, copies=2))
    hidden = views._hidden(views.mask, 64, [1, 2])
    assert (~hidden).sum(1).tolist() == [kept] * 4
    assert not torch.equal(hidden[0], hidden[1])
    if options["kind"] == "grid":
        seen = ~hidden[0].view(64, 8)
        assert torch.equal(seen, seen.any(1)[:, None] & seen.any(0))


def test_spans_hide_whole_times_and_rows_agree():
    views = MelViews(MelFeatures(8, **SHAPE), shortest=0.24, mask=MelMask("span", 0.5, width=2, copies=3))
    (view,) = views.collate([views(WAVE[: 4000 + 100 * i], draws(i)) for i in range(4)])
    hidden = view.mask.hidden.unflatten(1, (-1, 4))
    assert torch.equal(hidden.any(2), hidden.all(2))
    assert len({*view.mask.hidden.sum(1).tolist()}) == 1
    assert view.copies == 3


VIEWS = [
    ({"longest": 1.0}, r"longest: 1\.0 s are 98 frames, the model takes 24; raise model\.frames"),
    ({"shortest": 0.3}, r"shortest: 0\.3 s, must be between 0 and the 0\.255 s .*model\.frames=24"),
    ({"longest": 0.05, "shortest": 0.0}, r"longest: 0\.05 s, shorter than a patch of 4 frames"),
    ({"mask": MelMask(ratio=1.0)}, r"mask\.ratio: 1\.0 leaves none or all"),
    ({"mask": MelMask("grid", time=0.9)}, r"mask\.time: 0\.9 leaves none or all of the 5 x 4 patches"),
    ({"mask": MelMask("span", 0.5, width=5)}, r"mask\.width: 5, must be between 1 and 4"),
    ({"mask": MelMask("block", 0.5, width=5)}, r"mask\.width: 5, must be between 1 and 4"),
    ({"mask": MelMask(copies=0)}, r"mask\.copies: 0"),
    ({"alter": Alterations(time=1.0)}, r"alter\.time: 1\.0"),
    ({"alter": Alterations(zero=0.9, swap=0.2)}, r"alter\.swap: 0\.2, must leave zero=0\.9"),
    ({"alter": Alterations(width=0)}, r"alter\.width: 0"),
    ({"alter": Alterations(time=0.0, band=0.0)}, "alter: nothing is altered"),
]


@pytest.mark.parametrize(("options", "text"), VIEWS)
def test_views_refuse_what_does_not_fit(options, text):
    with pytest.raises(ValueError, match=text):
        MelViews(MelFeatures(8, **SHAPE), **{"shortest": 0.23} | options)


# Alterations ------------------------------------------------------------------------------------------------------------


def test_as_many_blocks_as_tera_draws():
    for row in VECTORS["tera_counts"]["rows"]:
        starts = block_starts(row["T"], Alterations(), generator(row["T"]))
        assert len(starts) == len({*starts}) == row["starts"]
    every = {start for seed in range(300) for start in block_starts(20, Alterations(time=0.5), generator(seed))}
    assert every == {*range(13)}  # 0 .. T - width - 1
    assert VECTORS["tera_counts"]["rows"][0]["valid_start_max"] == 100 - 7 - 1


def test_alterations_are_as_frequent_as_in_tera():
    told, count = VECTORS["tera_statistics"], 800
    x = torch.full((1000, 80), 3.0)
    x += torch.arange(1000)[:, None]  # each frame another, so that swapped ones show
    kinds, hit, widths = [], [], []
    for seed in range(count):
        out, label = altered(x, Alterations(), generator(seed))
        whole, band = label.all(1), label.all(0)
        widths.append(int(band.sum()))
        hit.append(int(whole.sum()))
        inside = out[whole][:, ~band]
        kinds.append("zero" if bool((inside == 0).all()) else "kept" if torch.equal(inside, x[whole][:, ~band]) else "swap")
        if seed < 50:
            assert torch.equal(out[~label], x[~label])
            assert torch.equal(out[:, band], torch.zeros(1000, widths[-1]))
            assert torch.equal(label, whole[:, None] | band)
            assert bool(torch.isin(inside, x).all()) or kinds[-1] == "zero"
    assert kinds.count("zero") / count == pytest.approx(0.8, abs=0.02)
    assert kinds.count("swap") / count == pytest.approx(0.1, abs=0.02)
    assert np.mean(widths) == pytest.approx(8.0, abs=0.4)
    assert (max(widths), max(hit)) <= (told["max_frequency_width"], told["max_masked_frames"])
    assert np.mean(hit) == pytest.approx(told["mean_masked_frames"], abs=0.7)
    assert min(widths) == 0


def test_noise_alone_is_about_every_cell_and_is_drawn_for_each_utterance():
    x, noise = torch.zeros(60, 40), Alterations(time=0.0, band=0.0, noise=0.5)
    pairs = [altered(x, noise, generator(seed), std=3.0) for seed in range(40)]
    assert all(bool(label.all()) for _, label in pairs)
    loud = [out.std().item() for out, _ in pairs if bool(out.any())]
    assert 10 <= len(loud) <= 30
    assert np.mean(loud) == pytest.approx(0.6, abs=0.02)


def test_altered_views_carry_what_was_there():
    views = MelViews(
        MelFeatures(8, 8, 30, mean=5.0), shortest=0.2, normalise=False, alter=Alterations(0.5, 3, zero=1.0, swap=0.0)
    )
    batch = [views(WAVE[: 3600 + 200 * i], draws(i)) for i in range(3)]
    (view,) = views.collate(batch)
    clean, label = view.record["clean"], view.record["altered"]
    assert clean.shape == label.shape == view.x.shape == (3, 21, 8)
    assert torch.equal(view.x[~label], clean[~label])
    assert bool((view.x[label] == 5.0).all())  # the mean of the data set
    (same,) = Batch.from_tensors(Batch([view], torch.arange(3)).tensors()).views
    assert torch.equal(same.record["altered"], label)
    assert torch.equal(views.collate(batch)[0].x, view.x)


# Methods, recipes, export -----------------------------------------------------------------------------------------------


def test_mae_rebuilds_patches_of_clips_shorter_than_the_longest():
    torch.manual_seed(0)
    method = METHODS["mae"](encoder(), TokenDecoderOptions(16, 1, 2), normalise=False)
    views = MelViews(MelFeatures(8, **SHAPE), shortest=0.2, mask=MelMask(ratio=0.75, copies=2))
    batch = Batch(views.collate([views(WAVE[i * 4000 :][:3500], draws(i)) for i in range(4)]), torch.arange(4), (1, 2, 3, 4))
    optimizer, losses = torch.optim.Adam(method.parameters(), 1e-2), []
    for step in range(20):
        loss = method(batch, Clock(step, 20)).losses["rebuilt"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    made = method.rebuild(batch, Clock())
    assert made.truth.shape == made.guess.shape == (8, 5 * 4, 8)  # 20 frames
    assert torch.equal(made.truth[~made.hidden], made.guess[~made.hidden])
    drawn = method.student.encoder.features.unraw(made.truth[::2])
    assert_close(drawn, batch.views[0].x)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith(("spectrogram/", "speech/cpc"))])
def test_recipes_build(name):
    recipe = Recipe.load(name, "data.path=somewhere")
    with torch.device("meta"):
        method = recipe.build()
    if name == "spectrogram/tera-base":  # 21.33 million in the paper
        assert sum(p.numel() for p in method.student.parameters()) == 21_327_360
    views = recipe.build_views()
    (view,) = views.collate([views(torch.randn(views.longest), draws(i)) for i in range(2)])
    assert len(view.x) == 2


def test_a_recipe_without_options_takes_those_of_its_method(tmp_path):
    for method, views in (("mae", "mask"), ("tera", "alter"), ("data2vec2", "mask"), ("data2vec1", "mask"), ("cpc", "longest")):
        file = tmp_path / f"{method}.yaml"
        file.write_text(
            f"data: {{path: null, modality: spectrogram}}\nmodel: {{}}\nmethod: {{name: {method}}}\ntrain: {{steps: 1}}\n"
        )
        assert getattr(Recipe.load(file).views, views) is not None
    with pytest.raises(RecipeError, match=r"views\.mask: mae learns from hidden tokens"):
        Recipe.load(tmp_path / "mae.yaml", "views.mask=null")


def test_the_exported_code_needs_none_of_ours():
    """Flattened, it runs by itself and gives the same numbers."""
    source = flatten(MODALITY.features.__module__)
    alone = types.ModuleType("alone")
    alone.__dict__["__name__"] = "alone"
    sys.modules["alone"] = alone
    try:
        exec(compile(source, "alone", "exec"), alone.__dict__)
        mine = encoder(mean=1.0, std=2.0)
        config = alone.MmsslConfig(**{k: v for k, v in mine.config.to_dict().items() if k != "model_type"})
        theirs = alone.Encoder.from_config(config).eval()
        theirs.load_state_dict(mine.state_dict())
        x = torch.randn(2, 17, 8)
        assert_close(theirs(alone.View(x, "spectrogram")).tokens, mine(View(x, "spectrogram")).tokens)
    finally:
        del sys.modules["alone"]


def test_the_exported_model_takes_what_the_processor_gives(tmp_path):
    """A folder of both; the views that are made for it normalise as its processor does."""
    config = MmsslConfig(modality="spectrogram", hidden_size=16, depth=1, heads=2, extra_tokens=0, **SHAPE | {"frames": 100})
    model = AutoModel.from_config(config).eval()
    for normalise in (True, False):
        views = MelViews(model.encoder.features, shortest=0.1, normalise=normalise)
        prepare = processor(config, views)
        prepare.save_pretrained(tmp_path)
        found = plain_views(model, tmp_path)
        assert (found.normalise, found.longest, found.features.grid) == (normalise, samples(100), (25, 4))
        given = prepare([WAVE.numpy(), WAVE[:9000].numpy()], sampling_rate=16_000, padding=True, return_tensors="pt")
        plain = found.plain([WAVE, WAVE[:9000]])
        assert model.main_input_name in given
        out = model(**given)
        assert_close(out.pooler_output, model.encoder.pool(model.encoder(plain)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is no model of ours"):
        plain_views(types.SimpleNamespace(config=types.SimpleNamespace(model_type="ast")), tmp_path)
