"""wav2vec 2.0 finds quantised frames among others; HuBERT says units that were found in the same run."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch.testing import assert_close
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from mmssl import losses
from mmssl.config import Recipe, WatchOptions
from mmssl.distributed import all_sum, world
from mmssl.errors import CollapseError, RecipeError
from mmssl.masks import uniform
from mmssl.methods import METHODS
from mmssl.methods.method import Guard
from mmssl.methods.wav2vec2 import distractors
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.random import generator
from mmssl.schedules import linear
from mmssl.training import checkpoint
from mmssl.training.limits import Limits
from mmssl.training.pretrain import pretrain
from mmssl.types import Batch, Clock, Mask, View
from modalities.speech import convert
from modalities.speech.features import SpeechFeatures, mfcc
from modalities.speech.processor import Convolutions, processor
from modalities.speech.views import SpeechViews
from tests.losses.cases import MASKED, tensor
from tests.ranks import on_two_ranks

SAMPLES, FRAMES, EPOCH = 6, 16, 2  # of the data set, frames of each, updates of a pass
OPTIONS = {
    "wav2vec2": {"dim": 8, "entries": 5, "negatives": 4, "dropout": 0.0},
    "hubert": {
        "dim": 8,
        "units": 7,
        "units_again": 5,
        "again": (1,),
        "layer": 1,
        "frames": 48,
        "iterations": 3,
        "dropout": 0.0,
    },
}
NAMES = [*OPTIONS]


def encoder(**options):
    shape = {"hidden_size": 16, "depth": 2, "heads": 2, "extra_tokens": 0, "norm_eps": 1e-5, "alibi": False}
    shape |= {"conv_channels": 8, "positions": "single", "position_kernel": 5, "position_groups": 4}
    torch.manual_seed(0)
    return Encoder.from_config(MmsslConfig(modality="speech", **shape | options))


def build(name, model=(), **options):
    method = METHODS[name](encoder(**dict(model)), **OPTIONS[name] | options)
    method.attach(SAMPLES, 0)
    return method.double().train()


def batch_of(rows, copies=2):
    draw = torch.Generator().manual_seed(1)
    waves = torch.randn(SAMPLES, 400 + 320 * (FRAMES - 1), generator=draw, dtype=torch.float64)
    hidden = uniform(FRAMES, SAMPLES * copies, 0.5, draw).unflatten(0, (SAMPLES, copies))
    view = View(waves[rows], "speech", mask=Mask.of(hidden[rows].flatten(0, 1)))
    return Batch([view], rows, tuple(100 + row for row in rows.tolist()))


def begin(method, clock):
    """A pass, described first if need be."""
    method.eval()
    with torch.no_grad():
        whole = batch_of(torch.arange(SAMPLES)).views[0]
        method.on_epoch(clock, method.describe(whole) if method.needs_description(clock) else None)
    method.train()


def train(rank, name, steps=3):
    """Losses, gradients of the last update, and state, of plain descent, weighted as the trainer does."""
    method, found, mean = build(name), [], torch.empty(0)
    weights = dict(method.named_parameters())
    for step in range(steps):
        clock = Clock(step, steps, step // EPOCH)
        if step % EPOCH == 0:
            begin(method, clock)
        batch = batch_of(torch.arange(SAMPLES)[rank :: world()])
        method.before_step(clock)
        out = method(batch, clock)
        terms = method.terms(batch)
        loss = terms * world() / all_sum(terms) * torch.stack(list(out.losses.values())).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        mean = all_sum(torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])) / world()
        found.append(mean[0])
        for parameter, gradient in zip(weights.values(), mean[1:].split([p.numel() for p in weights.values()])):
            parameter.data -= 0.05 * gradient.view_as(parameter)
        method.after_step(clock._replace(step=step + 1))
    gradients = dict(zip(weights, mean[1:].split([p.numel() for p in weights.values()])))
    return torch.stack(found), gradients, {key: value.detach().clone() for key, value in method.state_dict().items()}


def train_all(rank):
    return {name: train(rank, name) for name in NAMES}


@pytest.fixture(scope="module")
def alone():
    return train_all(0)


@pytest.mark.distributed
def test_two_ranks_equal_one_process(alone, tmp_path):
    """Of HuBERT with new units on the way."""
    for one in on_two_ranks(train_all, folder=tmp_path):
        for name in NAMES:
            for mine, theirs in zip(alone[name], one[name]):
                assert_close(theirs, mine, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_weight_gets_a_finite_gradient(name, alone):
    _, gradients, _ = alone[name]
    assert set(gradients) == {key for key, parameter in build(name).named_parameters() if parameter.requires_grad}
    assert not [key for key, gradient in gradients.items() if not bool(gradient.isfinite().all() and gradient.any())]


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    method, batch, found = build(name), batch_of(torch.arange(SAMPLES)), []
    begin(method, Clock())
    optimizer = torch.optim.Adam(method.parameters(), 0.01)
    for step in range(20):
        out = method(batch, Clock(step, 20))
        found.append(next(iter(out.losses.values())).item())
        optimizer.zero_grad()
        torch.stack(list(out.losses.values())).sum().backward()
        optimizer.step()
    for value in (*out.losses.values(), *out.health.values()):
        assert value.shape == ()
        assert bool(value.isfinite())
    assert not any(value.requires_grad for value in (*out.health.values(), out.embedding))
    assert out.embedding.shape == (SAMPLES, 16)
    assert {normal.metric for normal in method.normal} <= {*out.health}
    assert found[-1] < 0.9 * found[0], found


@pytest.mark.parametrize("size", ["base", "large", "small", "demo", "fsdd-cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_built(name, size):
    recipe = Recipe.load(f"speech/{name}-{size}")
    with torch.device("meta"):
        method = recipe.build()
    method.attach(100_000, 0)
    views = recipe.build_views()
    if size in ("demo", "fsdd-cpu"):
        waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (9600, 8000, 12_000)]
        samples = [views(wave, lambda view, i=i: generator(i, view), 8000) for i, wave in enumerate(waves)]
        batch, method = Batch(views.collate(samples), torch.arange(3), (1, 2, 3)), recipe.build()
        assert all(bool(loss.isfinite()) for loss in method(batch, Clock(0, 10)).losses.values())


@pytest.mark.parametrize("size", ["base", "large"])
def test_published_sizes(size):
    with torch.device("meta"):
        method = Recipe.load(f"speech/wav2vec2-{size}").build()
    assert sum(p.numel() for p in method.parameters()) == MASKED["hf_param_counts"][f"wav2vec2_{size}_pretraining"]


# The front end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_get_a_share_of_their_gradient(name):
    batch, found = batch_of(torch.arange(SAMPLES)), []
    for scale in (1.0, 0.1):
        method = build(name, feature_grad_scale=scale)
        begin(method, Clock())
        loss = torch.stack(list(method(batch, Clock()).losses.values())).sum()
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in method.named_parameters()}))
    (loss, whole), (other, part) = found
    assert torch.equal(loss, other)
    for key, gradient in whole.items():
        share = 0.1 if ".features.convs." in key or ".features.norms." in key else 1.0
        assert_close(part[key], share * gradient, rtol=1e-9, atol=1e-14, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_the_penalty_is_the_mean_square_before_the_norm(name):
    method, batch = build(name), batch_of(torch.arange(SAMPLES))
    begin(method, Clock())
    wanted = 10 * method.student.encoder.features.listen(batch.views[0].x).square().mean()
    assert_close(method(batch, Clock()).losses["penalty"], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_frames_are_not_heard(name):
    """What the transformer is given does not change with them; what is to be found does."""
    method, batch = build(name), batch_of(torch.arange(SAMPLES), copies=1)
    (view,) = batch.views
    moved = view.x.clone()
    row, frame = 0, int(view.mask.hidden[0].nonzero()[0])
    moved[row, 320 * frame + 80 : 320 * frame + 320] += 1.0  # heard by this frame alone
    heard = [method.listening(method.student.encoder, view._replace(x=x)) for x in (view.x, moved)]
    assert torch.equal(heard[0].tokens, heard[1].tokens)
    assert (heard[0].frames != heard[1].frames).any(2).nonzero().tolist() == [[row, frame]]


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_learned_from_is_refused(name):
    batch = batch_of(torch.arange(2))
    method = build(name)
    begin(method, Clock())
    with pytest.raises(ValueError, match=f"views.mask: {name} needs masks"):
        method(batch._replace(views=[batch.views[0]._replace(mask=None)]), Clock())
    with pytest.raises(ValueError, match=f"data.modality: {name} learns from frames of waves; take speech"):
        METHODS[name](torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"dropout: 1\.0, must be at least 0 and below 1"):
        build(name, dropout=1.0)


# wav2vec 2.0 -------------------------------------------------------------------------------------------------------------

BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


@pytest.mark.parametrize("kind", [BASE, LARGE], ids=["base", "large"])
def test_it_is_wav2vec2_for_pre_training_of_transformers(kind, monkeypatch):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    shape |= {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 4}
    codes = {"num_codevectors_per_group": 5, "codevector_dim": 8, "proj_codevector_dim": 8, "num_negatives": 4}
    torch.manual_seed(0)
    theirs = Wav2Vec2ForPreTraining(Wav2Vec2Config(**shape, **codes, **kind)).double().eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    weights = dict(theirs.state_dict())
    config, found = convert.from_native(theirs.config, weights)
    method = METHODS["wav2vec2"](Encoder.from_config(config), **OPTIONS["wav2vec2"]).double().eval()
    found = {f"student.encoder.{name}": weight for name, weight in found.items()}
    found["listening.mask_token.vector"] = weights["wav2vec2.masked_spec_embed"]
    found["quantizer.entries"] = weights["quantizer.codevectors"].view(2, 5, 4)
    for ours, other in {"quantizer.logits": "quantizer.weight_proj", "predict": "project_hid", "project": "project_q"}.items():
        found |= {f"{ours}.{part}": weights[f"{other}.{part}"] for part in ("weight", "bias")}
    method.load_state_dict(found)

    batch = batch_of(torch.arange(SAMPLES), copies=1)
    (view,), hidden = batch.views, batch.views[0].mask.hidden
    places = hidden.nonzero()[:, 1].view(SAMPLES, -1)
    others = places[torch.arange(SAMPLES)[:, None, None], distractors(batch.keys, places, 4)]  # (B, n, 4) frames
    negatives = torch.zeros(SAMPLES, FRAMES, 4, dtype=torch.int64)
    negatives[hidden] = (others + FRAMES * torch.arange(SAMPLES)[:, None, None]).flatten(0, 1)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # theirs rounds its logits
    with torch.no_grad():
        wanted = theirs(view.x, mask_time_indices=hidden, sampled_negative_indices=negatives)
        states = {}
        for name in ("predict", "project"):
            getattr(method, name).register_forward_hook(lambda *args, name=name: states.update({name: args[2]}))
        out = method(batch, Clock())
    n = int(hidden.sum())
    assert_close(states["predict"].flatten(0, 1), wanted.projected_states[hidden], rtol=0, atol=1e-10)
    assert_close(states["project"].flatten(0, 1), wanted.projected_quantized_states[hidden], rtol=0, atol=1e-10)
    assert_close(n * out.losses["contrastive"], wanted.contrastive_loss, rtol=1e-10, atol=0)
    assert_close(out.health["code_perplexity"], wanted.codevector_perplexity, rtol=0, atol=1e-5)
    # In evaluation theirs is about the codes taken, in training and always in ours about their probabilities.
    with torch.no_grad():
        logits = theirs.quantizer.weight_proj(theirs.wav2vec2(view.x).extract_features).view(-1, 2, 5)
    perplexity = theirs.quantizer._compute_perplexity(logits.softmax(-1), hidden)
    assert_close(out.losses["diversity"], 0.1 * (10 - perplexity) / 10, rtol=0, atol=1e-6)


def test_distractors_are_the_other_masked_frames_of_the_utterance():
    case = MASKED["wav2vec2_negative_index_shift"]
    drawn = torch.tensor(case["draws_d"])
    assert (drawn + (drawn >= torch.arange(case["n"])[:, None])).tolist() == case["negatives"]
    found = distractors((1, 2), torch.zeros(4, 5, dtype=torch.int64), 4000)  # two rows of each of two samples
    for t in range(5):
        share = found[:, t].flatten().bincount(minlength=5) / 16_000
        assert_close(share, torch.where(torch.arange(5) == t, 0.0, 0.25), rtol=0, atol=0.02)
    assert torch.equal(found[2:], distractors((2,), torch.zeros(2, 5, dtype=torch.int64), 4000))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("frames", [0, 1])
def test_an_utterance_with_one_hidden_frame_has_no_distractor(frames):
    with pytest.raises(ValueError, match=r"views\.mask: hides \d frame of an utterance, .*raise views\.mask\.ratio or"):
        distractors((1,), torch.zeros(1, frames, dtype=torch.int64), 3)


def test_masks_of_unequal_rows_are_refused():
    batch = batch_of(torch.arange(2), copies=1)
    mask = Mask.replacing(torch.rand(2, FRAMES, generator=torch.Generator().manual_seed(0)) < 0.5)
    with pytest.raises(ValueError, match=r"views\.mask: wav2vec2 needs masks that hide as many frames"):
        build("wav2vec2")(batch._replace(views=[batch.views[0]._replace(mask=mask)]), Clock())


def test_a_frame_with_the_same_code_is_no_distractor_whatever_the_precision():
    method, batch = build("wav2vec2", entries=2), batch_of(torch.arange(SAMPLES), copies=1)
    method.eval()
    quantised = {}
    method.quantizer.register_forward_hook(lambda *args: quantised.update(found=args[2]))
    seen = {}
    method.project.register_forward_hook(lambda *args: args[2] + 1e-9 * torch.randn_like(args[2]))  # as bf16 kernels may
    method.predict.register_forward_hook(lambda *args: seen.update(context=args[2]))
    out = method(batch, Clock())
    places, found = batch.views[0].mask.rest, quantised["found"]
    others = distractors(batch.keys, places, 4)
    target, total = method.project(found.vectors), 0.0
    for b in range(SAMPLES):
        for t in range(places.shape[1]):
            candidates = [t, *(k for k in others[b, t].tolist() if found.ids[b, k] != found.ids[b, t])]
            scores = F.cosine_similarity(seen["context"][b, t], target[b, candidates], dim=-1) / 0.1
            total -= scores.log_softmax(0)[0].item()
    assert out.losses["contrastive"].item() == pytest.approx(total / places.numel(), rel=1e-6)


def test_collapsed_codebooks_are_named_with_a_mend():
    method, batch = build("wav2vec2"), batch_of(torch.arange(SAMPLES))
    begin(method, Clock())
    torch.nn.init.normal_(method.quantizer.logits.weight, std=3.0)
    method.eval()

    def judged():
        health = {f"health/{name}": float(value) for name, value in method(batch, Clock()).health.items()}
        return health["health/code_perplexity"], method.judge(health)

    perplexity, words = judged()
    assert perplexity > 4
    assert words == []
    method.quantizer.logits.bias.data[[0, 5]] = 1e4  # all frames have the first entry of both
    perplexity, words = judged()
    assert perplexity == pytest.approx(2.0, abs=1e-4)
    assert len(words) == 1
    assert "the codebooks have collapsed" in words[0]
    assert "raise method.diversity" in words[0]
    assert float(method(batch, Clock()).health["accuracy"]) == 0.0
    assert build("wav2vec2", groups=4).normal[0].least == 8.0


def test_temperatures_must_be_above_zero():
    with pytest.raises(ValueError, match=r"gumbel_temperature: from 2\.0 to 0\.0, must be above 0"):
        build("wav2vec2", gumbel_temperature=linear(2.0, 0.0))


# MFCC --------------------------------------------------------------------------------------------------------------------


def test_what_first_units_are_clusters_of_is_kaldis():
    waves = 0.1 * torch.randn(2, 250_000 // 8, generator=torch.Generator().manual_seed(0)).cumsum(1).sin()
    for wave, own, exact in zip(waves, mfcc(waves), mfcc(waves.double())):
        wanted = torchaudio.compliance.kaldi.mfcc(wave[None].double(), sample_frequency=16_000, use_energy=False)
        assert float(wanted.std()) > 1
        for found in (own.double(), exact):  # theirs has filters in single precision
            assert_close(found, wanted, rtol=0, atol=1e-4)
    found = SpeechFeatures.units_input(waves)
    wanted = mfcc(waves).mT
    change = torchaudio.functional.compute_deltas(wanted)
    wanted = torch.cat([wanted, change, torchaudio.functional.compute_deltas(change)], 1).mT[:, ::2]
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_each_frame_has_the_label_of_the_samples_that_it_hears():
    """As authors align them; of theirs the last frame is left out where labels end one frame early."""
    for row in MASKED["hubert_label_alignment"]["rows"]:
        wave = torch.randn(1, row["samples"], generator=torch.Generator().manual_seed(0))
        every, own = mfcc(wave), SpeechFeatures.units_input(wave)
        assert every.shape[1] == row["labels_100hz_kaldi"]
        assert own.shape == (1, row["features"], 39)
        kept = row["features_after_trim"]
        labels = [math.floor(t * row["ratio"]) for t in range(kept)]
        assert torch.equal(own[:, :kept, :13], every[:, labels])


# HuBERT ------------------------------------------------------------------------------------------------------------------


def test_hubert_is_a_cross_entropy_of_cosines():
    case = MASKED["hubert_loss"]
    logits = losses.code_scores(tensor(case["proj"]), tensor(case["codewords"]), case["tau"])
    found = losses.masked_cross_entropy(logits, torch.tensor(case["targets"]))
    assert float(found) == pytest.approx(case["ce_mean"], abs=1e-12)


@pytest.mark.parametrize("units", [100, 500])
def test_hubert_begins_at_chance(units):
    method = build("hubert", units=units, dim=256)
    torch.nn.init.normal_(method.units[0].centroids)
    loss = method(batch_of(torch.arange(SAMPLES)), Clock()).losses["units"]
    assert float(loss.detach()) == pytest.approx(math.log(units), rel=0.02)


def test_hubert_says_the_units_of_hidden_frames():
    """A slow loop, in both stages; the units of the second are those of the student as it was."""
    method, rows = build("hubert"), torch.arange(SAMPLES)
    batch, net = batch_of(rows), method.student.encoder
    (view,) = batch.views
    begin(method, Clock())
    then = {}
    for stage, clock in enumerate((Clock(0, 4, 0), Clock(2, 4, 1))):
        if stage:
            begin(method, clock)
            with torch.no_grad():
                then = net.contextualize(net.features(view.x), collect="block").layers[0]
            for parameter in method.student.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()
            method.after_step(Clock(3, 4, 1))
        frames = then if stage else SpeechFeatures.units_input(view.x)
        codes = torch.cdist(frames, method.units[stage].centroids).argmin(-1)
        features, total, count = net.features(view.x), 0.0, 0
        for row in range(2 * SAMPLES):
            own = features[row // 2].clone()
            own[view.mask.hidden[row]] = method.listening.mask_token.vector
            said = method.predict(net.contextualize(own[None]).tokens[0])
            first = 7 * stage
            vectors = method.vectors.weight[first : first + method.units[stage].count]
            for t in view.mask.hidden[row].nonzero().flatten().tolist():
                scores = F.cosine_similarity(said[t], vectors, dim=-1) / 0.1
                total, count = total - scores.log_softmax(0)[codes[row // 2, t]].item(), count + 1
        assert method(batch, clock).losses["units"].item() == pytest.approx(total / count, rel=1e-9)
    assert len(codes.unique()) > 2


def test_units_are_clusters_of_frames_of_all_samples():
    method = build("hubert", units=20, frames=SAMPLES * FRAMES)
    view = batch_of(torch.arange(SAMPLES)).views[0]
    described = method.describe(view)
    assert described.shape == (SAMPLES, 1 + FRAMES * 39)
    assert described[:, 0].tolist() == [FRAMES] * SAMPLES
    frames = SpeechFeatures.units_input(view.x)
    mine = described[:, 1:].unflatten(1, (FRAMES, 39))
    for own, all_frames in zip(mine, frames):  # each once, from somewhere on
        assert torch.equal(own.sort(0).values, all_frames.sort(0).values)
    assert not torch.equal(mine[:, 0], frames[:, 0])
    begin(method, Clock())
    codes, centroids = method.units[0](frames), method.units[0].centroids
    assert torch.equal(codes, torch.cdist(frames, centroids).argmin(-1))
    spread = (frames - frames.mean((0, 1))).square().sum()
    assert float((frames - centroids[codes]).square().sum() / spread) < 0.75
    assert float(method.units[0].use(codes)) == pytest.approx(
        torch.special.entr(codes.flatten().bincount() / codes.numel()).sum().exp().item() / 20, rel=1e-5
    )


def test_padding_is_in_no_cluster():
    """A clip of three frames gives three, whatever it is padded with."""
    method = build("hubert", frames=SAMPLES * 8)
    (view,) = batch_of(torch.arange(2)).views
    pad = torch.arange(FRAMES)[None] >= torch.tensor([3, 10])[:, None]
    x = view.x.masked_fill(torch.arange(view.x.shape[1])[None] >= torch.tensor([1040, 3280])[:, None], 0.0)
    described = method.describe(view._replace(x=x, pad=pad))
    assert described[:, 0].tolist() == [3, 10]
    frames, own = SpeechFeatures.units_input(x), described[:, 1:].unflatten(1, (8, 39))
    for row, (valid, kept) in enumerate(((3, 3), (10, 8))):
        distance = torch.cdist(own[row, :kept], frames[row])
        assert distance.argmin(1).max() < valid
        assert len(distance.argmin(1).unique()) == kept
    method.each = 8
    with pytest.raises(ValueError, match=r"method\.units: 7, the data hold 3 frames; use fewer units"):
        method.on_epoch(Clock(), described[:1])


def test_more_units_than_frames_are_refused():
    with pytest.raises(ValueError, match=r"^units: 7, the data hold at most 0 frames; use fewer units"):
        build("hubert").attach(0, 0)
    with pytest.raises(ValueError, match=r"^units_again: 9000, the data hold at most 5994 frames"):
        build("hubert", units_again=9000)
    with pytest.raises(ValueError, match=r"^layer: 3, the trunk has 2 \(model\.depth\)"):
        build("hubert", layer=3)
    with pytest.raises(ValueError, match=r"^again: \[2, 1\], must be passes in ascending order"):
        build("hubert", again=(2, 1))


# A whole run ---------------------------------------------------------------------------------------------------------------

RUN = """
data: {path: DATA, modality: speech, workers: 0, buckets: 2}
model: {hidden_size: 16, depth: 2, heads: 2, conv_channels: 8, conv_norm: NORM, position_kernel: 5, position_groups: 4}
method: METHOD
views: {longest: 0.6, shortest: 0.2, mask: {width: 3}}
optim: {lr: 1.0e-2, warmup: 2}
train: {steps: 8, global_batch: 8, device: cpu, log_every: 1, threads: 1}
watch: {every: 0, samples: 20, linear: false}
save: {every: 2, keep: 9}
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Function: method block, run folder -> recipe on 24 wav files, three updates a pass."""
    folder, draw = tmp_path_factory.mktemp("waves"), np.random.default_rng(0)
    for i in range(24):
        length = int(draw.integers(4000, 10_000))
        tone = np.sin(np.arange(length) * (0.05, 0.2)[i % 2]) * 0.5
        soundfile.write(folder / f"{i}.wav", tone + draw.normal(0, 0.05, length), 16_000)

    def build(method, out, norm="layer", *more):
        out.parent.mkdir(parents=True, exist_ok=True)
        (file := out.parent / "run.yaml").write_text(
            RUN.replace("DATA", str(folder)).replace("METHOD", method).replace("NORM", norm)
        )
        return Recipe.load(file, f"out={out}", *more)

    return build


def tensors_of(run):
    parts = checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]
    return {name: tensor for part in parts.values() for name, tensor in part.items()}


def curve(run):
    return [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_hubert_is_one_run_from_a_folder_of_wav_files_resumable_in_any_phase(load, tmp_path):
    """MFCCs before pass 0, features of a layer before passes 1 and 2; resumed within passes and where one begins."""
    block = "{name: hubert, units: 8, units_again: 6, again: [1, 2], layer: 1, frames: 200, iterations: 5, dim: 8}"
    recipe = load(block, tmp_path / "whole")
    run = pretrain(recipe)
    tensors, steps = tensors_of(run), [int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*")]
    assert float(tensors["method.fitted"]) == 3
    assert {tuple(tensors[f"method.units.{i}.centroids"].shape) for i in range(3)} == {(8, 39), (6, 16)}
    assert all(bool(tensors[f"method.units.{i}.centroids"].any()) for i in range(3))
    for step in (2, 4, 6):  # in the first phase, in the second, and right where the third begins
        assert step in steps
        again = tmp_path / f"from-{step}"
        shutil.copytree(run, again)
        for folder in (again / "checkpoints").glob("step-*"):
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)
        pretrain(recipe.model_copy(update={"out": str(again)}), resume=True)
        assert curve(again)[-8 + step :] == curve(run)[-8 + step :]
        assert all(torch.equal(value, tensors[name]) for name, value in tensors_of(again).items())


def test_more_units_than_frames_in_the_folder_stop_the_run(load, tmp_path):
    with pytest.raises(CollapseError, match=r"method\.units: 2000, the data hold \d+ frames; use fewer units"):
        pretrain(load("{name: hubert, units: 2000}", tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"method\.units: 30000, the data hold at most"):
        pretrain(load("{name: hubert, units: 30000}", tmp_path / "other"))


def test_collapsed_codebooks_stop_the_run(load, tmp_path):
    block = "{name: wav2vec2, dim: 8, entries: 5, negatives: 4}"
    guard = ("watch.guard={code_perplexity: 11}", "watch.guard_after=2")  # more than there can be
    with pytest.raises(CollapseError, match=r"health/code_perplexity is .* below the 11 of watch\.guard"):
        pretrain(load(block, tmp_path / "run", "group", *guard))


def test_codebooks_that_collapse_stop_a_run_whose_recipe_says_nothing_of_them(load, tmp_path):
    block = "{name: wav2vec2, dim: 8, entries: 5, negatives: 4, diversity: 0.0, penalty: 0.0}"
    more = ("optim.lr=1.0", "optim.warmup=0", "optim.clip=0", "train.log_every=1", "watch.guard_after=1")
    with pytest.raises(CollapseError, match=r"health/code_perplexity is .* was below 4 in the last 3 lines") as caught:
        pretrain(load(block, tmp_path / "run", "layer", *more, "train.steps=30"))
    assert caught.value.code == 4
    for mend in (
        "method.diversity",
        "method.gumbel_temperature",
        "optim.lr",
        "optim.warmup",
        "watch.guard={code_perplexity: 0}",
    ):
        assert mend in str(caught.value)
    assert '"code": 4' in (tmp_path / "run" / "status.json").read_text()
    pretrain(load(block, tmp_path / "off", "layer", *more, "train.steps=12", "watch.guard={code_perplexity: 0}"))


def test_a_guard_of_the_method_waits_for_three_lines_in_a_row():
    watch, guard = WatchOptions(guard_after=10), Guard("rows", 2.0, "take more rows")
    limits = Limits([guard], watch)
    given = [(5, 1), (11, 1), (12, 1), (13, 2), (14, 1), (15, float("nan")), (16, 1.5), (17, 1)]
    found = [limits.breached({"step": step, "loss": 1.0, "health/rows": value}).get("rows") for step, value in given]
    assert [error is not None for error in found] == [False] * 6 + [True, False]
    assert "health/rows is 1.5 at step 16" in str(found[6])
    assert "take more rows" in str(found[6])
    assert not limits.breached({"step": 99})  # a line of probes
    assert not Limits([guard], WatchOptions(guard={"rows": 0.0})).guards


# Group norm --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_where_zeros_would_change_every_frame_samples_are_repeated():
    net = encoder(conv_norm="group").features
    views = SpeechViews(net, shortest=0.0)
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (16_000, 6000, 4001)]
    view = views.plain(waves)
    assert (~view.pad).sum(1).tolist() == [net.frames(len(wave)) for wave in waves]
    zeros = SpeechViews(SpeechFeatures, shortest=0.0).plain(waves).x
    for row, wave in enumerate(waves[1:], 1):
        alone = net(views.plain([wave]).x)[0]
        repeated, padded = (net(x)[row, : len(alone)] for x in (view.x, zeros))
        assert float((repeated - alone).abs().max()) < 0.1 * float((padded - alone).abs().max())


def test_the_exported_processor_makes_no_mask_for_group_norm():
    for norm in ("layer", "group"):
        views = SpeechViews(SimpleNamespace(frames=SpeechFeatures.frames, conv_norm=norm))
        assert processor(None, views).return_attention_mask is (norm == "layer")
    assert SpeechViews(Convolutions(conv_norm="group")).repeats
