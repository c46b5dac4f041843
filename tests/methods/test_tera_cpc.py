"""TERA undoes alterations of spectrograms; CPC finds the frames to come."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmssl import losses
from mmssl.distributed import all_sum, world
from mmssl.methods import METHODS
from mmssl.methods.cpc import every_frame, negative_places, rank_lengths
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.random import generator
from mmssl.types import Batch, Clock, View
from modalities.speech import mel_features  # noqa: F401  known before the package is installed anew
from modalities.speech.mel_alter import Alterations, altered
from tests.ranks import on_two_ranks

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())
CAUSAL = {"conv_channels": 8, "position_layers": 1, "position_kernel": 1, "position_groups": 4, "causal": True, "norm": "pre"}
MEL = {"bands": 8, "frames": 40, "mean": 0.5, "std": 2.0}
NAMES = ("tera", "cpc")


def encoder(modality="speech", **options):
    shape = {"hidden_size": 16, "depth": 2, "heads": 2, "extra_tokens": 0}
    return Encoder.from_config(MmsslConfig(modality=modality, **shape | (CAUSAL if modality == "speech" else MEL) | options))


def build(name):
    torch.manual_seed(0)
    if name == "tera":
        return METHODS["tera"](encoder("spectrogram")).double().train()
    return METHODS["cpc"](encoder(), steps=3, negatives=5).double().train()


def batch_of(name, rows, samples=6):
    """Some rows of a data set of six."""
    draw = torch.Generator().manual_seed(1)
    keys = tuple(100 + row for row in rows.tolist())
    if name == "cpc":
        waves = torch.randn(samples, 400 + 320 * 9, generator=draw, dtype=torch.float64)
        return Batch([View(waves[rows], "speech")], rows, keys)
    clean = torch.randn(samples, 30, 8, generator=draw, dtype=torch.float64).cumsum(1)
    pairs = [altered(row, Alterations(0.2 + 0.1 * i, 3), generator(i), 0.5, 2.0) for i, row in enumerate(clean)]
    x, label = (torch.stack(column) for column in zip(*pairs))
    return Batch([View(x[rows], "spectrogram", record={"clean": clean[rows], "altered": label[rows]})], rows, keys)


def train(rank, name, steps=2):
    """Losses, gradients of the last update, and state, of plain descent on the whole data set, weighted as the trainer does."""
    method, found, gradients = build(name), [], {}
    for step in range(steps):
        batch = batch_of(name, torch.arange(6)[rank :: world()])
        out = method(batch, Clock(step, steps))
        terms = method.terms(batch)
        weight = 1.0 if terms is None else terms * world() / all_sum(terms)
        loss = weight * torch.stack(list(out.losses.values())).sum()
        loss.backward()
        found.append(all_sum(loss.detach()) / world())
        for key, parameter in method.named_parameters():
            gradients[key] = all_sum(parameter.grad) / world()
            parameter.data -= 0.1 * gradients[key]
            parameter.grad = None
        method.after_step(Clock(step + 1, steps))
    return torch.stack(found), gradients, {key: value.clone() for key, value in method.state_dict().items()}


def train_all(rank):
    return {name: train(rank, name) for name in NAMES}


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path):
    for one in on_two_ranks(train_all, folder=tmp_path):
        for name in NAMES:
            for mine, theirs in zip(train(0, name), one[name]):
                assert_close(theirs, mine, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_all_is_finite_and_every_weight_gets_a_gradient(name):
    method = build(name)
    out = method(batch_of(name, torch.arange(6)), Clock())
    torch.stack(list(out.losses.values())).sum().backward()
    for key, parameter in method.named_parameters():
        assert bool(parameter.grad.isfinite().all()), key
        assert bool(parameter.grad.any()), key
    for value in (*out.losses.values(), *out.health.values()):
        assert value.shape == ()
        assert bool(value.isfinite())
    assert not any(value.requires_grad for value in (*out.health.values(), out.embedding))
    assert out.embedding.shape == (6, 16)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    method, batch, found = build(name).float(), batch_of(name, torch.arange(6)), []
    (view,) = batch.views
    record = {key: t.float() if t.is_floating_point() else t for key, t in view.record.items()}
    batch = batch._replace(views=[view._replace(x=view.x.float(), record=record)])
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    for step in range(20):
        loss = torch.stack(list(method(batch, Clock(step, 20)).losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.8 * found[0]


# TERA -------------------------------------------------------------------------------------------------------------------


def test_tera_is_the_absolute_error_of_altered_cells():
    told = VECTORS["tera_l1"]
    target, guess = (torch.tensor(told[key], dtype=torch.float64) for key in ("target", "pred"))
    label = torch.tensor(told["mask"]).bool()
    torch.manual_seed(0)
    method = METHODS["tera"](encoder("spectrogram", bands=4, mean=0.0, std=1.0)).double()
    method.head = torch.nn.Module()
    method.head.forward = lambda tokens: guess[None]
    view = View(
        torch.zeros(1, 3, 4, dtype=torch.float64), "spectrogram", record={"clean": target[None], "altered": label[None]}
    )
    out = method(Batch([view], torch.arange(1)), Clock())
    assert out.losses["rebuilt"].item() == pytest.approx(told["loss"], abs=1e-12)
    assert int(method.terms(Batch([view], torch.arange(1)))) == label.sum()
    assert float(out.health["altered_share"]) == pytest.approx(0.5)


def test_tera_compares_in_units_of_the_data_set():
    """Patches of several frames and bands, normalised by mean and standard deviation."""
    torch.manual_seed(0)
    method = METHODS["tera"](encoder("spectrogram", patch_frames=2, patch_bands=4)).double()
    batch = batch_of("tera", torch.arange(3))
    (view,) = batch.views
    guess = method.head(method.student.encoder(view).tokens).detach()  # (3, 15 * 2, 8)
    total, count = 0.0, 0
    for b, t, f in view.record["altered"].nonzero().tolist():
        cell = guess[b, t // 2 * 2 + f // 4, t % 2 * 4 + f % 4]
        total, count = total + float((cell - (view.record["clean"][b, t, f] - 0.5) / 2).abs()), count + 1
    assert method(batch, Clock()).losses["rebuilt"].item() == pytest.approx(total / count, abs=1e-9)


def test_tera_draws_what_it_rebuilt():
    method, batch = build("tera"), batch_of("tera", torch.arange(4))
    (view,) = batch.views
    made = method.rebuild(batch, Clock())
    assert made.truth.shape == made.guess.shape == (4, 30, 8)
    assert_close(made.truth, (view.record["clean"] - 0.5) / 2)
    assert torch.equal(made.hidden, (view.x != view.record["clean"]).any(2))


def test_an_utterance_in_which_nothing_is_altered_adds_nothing():
    method, batch = build("tera"), batch_of("tera", torch.arange(2))
    (view,) = batch.views
    none = view._replace(x=view.record["clean"], record=view.record | {"altered": torch.zeros_like(view.record["altered"])})
    loss = method(batch._replace(views=[none]), Clock()).losses["rebuilt"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(not bool(p.grad.any()) for p in method.parameters() if p.grad is not None)


def test_tera_refuses_views_that_are_not_altered():
    method, batch = build("tera"), batch_of("tera", torch.arange(2))
    with pytest.raises(ValueError, match=r"views\.alter: tera learns from altered views; give views\.alter=\{\}"):
        method(batch._replace(views=[batch.views[0]._replace(record={})]), Clock())


# CPC --------------------------------------------------------------------------------------------------------------------


def test_the_score_is_a_mean_of_products():
    told = VECTORS["cpc"]
    context, candidates = (torch.tensor(told[key], dtype=torch.float64) for key in ("pred", "candidates_pos_first"))
    assert float(losses.cpc(context, candidates[0], candidates[1:])) == pytest.approx(told["ce_mean"], abs=1e-9)
    assert float(losses.cpc(4 * context, candidates[0], candidates[1:])) == pytest.approx(
        told["score_if_summed_WRONG_ce"], abs=1e-9
    )


def test_cpc_equals_a_slow_loop():
    method, batch = build("cpc"), batch_of("cpc", torch.arange(4))
    out = method(batch, Clock())
    net = method.student.encoder
    frames = net.features(batch.views[0].x)
    context = net.contextualize(frames).tokens
    pool = frames.flatten(0, 1)
    places = negative_places(batch.keys, [10], 3, 5, pool)
    total = []
    for b in range(4):
        for t in range(7):
            for k in (1, 2, 3):
                guess = method.predictors[k - 1].weight @ context[b, t]
                others = [frames[b, t + k], *(pool[place] for place in places[b, t])]
                scores = [math.exp((guess * other).mean().item()) for other in others]
                total.append(-math.log(scores[0] / sum(scores)))
    assert out.losses["cpc"].item() == pytest.approx(sum(total) / len(total), abs=1e-9)
    assert float(out.health["information"]) == pytest.approx(math.log(6) - sum(total) / len(total), abs=1e-9)


def uneven(rank):
    """Ten frames on the first rank and eight on the second, as the rows of a stream may be cut."""
    method, batch = build("cpc"), batch_of("cpc", torch.arange(6)[rank :: world()])
    view = batch.views[0]._replace(x=batch.views[0].x[:, : 400 + 320 * (9 - 2 * rank)])
    frames = method.student.encoder.features(view.x)
    lengths = rank_lengths(frames)
    pool = every_frame(frames, lengths)
    out = method(batch._replace(views=[view]), Clock())
    out.losses["cpc"].backward()
    found = [out.losses["cpc"].detach(), all_sum(method.student.encoder.features.proj.weight.grad)]
    try:
        METHODS["cpc"](encoder(), steps=8).double()(batch._replace(views=[view]), Clock())
    except ValueError as error:
        return lengths, frames.detach(), pool.detach(), negative_places(batch.keys, lengths, 3, 5, pool), *found, str(error)


def test_ranks_may_cut_their_rows_to_different_lengths(tmp_path):
    """The pool holds the frames of all ranks, row by row, and no filling; the loss is that of the slow loop with that pool."""
    ranks = on_two_ranks(uneven, folder=tmp_path)
    frames = [found[1] for found in ranks]
    pool = torch.cat([frames[row % 2][row // 2] for row in range(6)])
    method, each = build("cpc"), []
    for rank, (lengths, own, seen, places, loss, _, error) in enumerate(ranks):
        assert lengths == [10, 8]
        assert torch.equal(seen, pool)
        assert places.shape == (3, own.shape[1] - 3, 5)
        assert error == "method.steps: 8, the views have 8 frames; lower it or raise views.shortest"
        context = method.student.encoder.contextualize(own).tokens
        for row in range(3):
            first = 18 * row + 10 * rank  # of the sample's own frames in the pool
            assert torch.equal(pool[first : first + own.shape[1]], own[row])
            for t in range(own.shape[1] - 3):
                assert not {*places[row, t].tolist()} & {first + t + k for k in (1, 2, 3)}
        terms = [
            losses.cpc(predict(context[:, : own.shape[1] - 3]), own[:, k : k + own.shape[1] - 3], places, pool)
            for k, predict in enumerate(method.predictors, 1)
        ]
        assert_close(loss, torch.stack(terms).mean().detach(), rtol=1e-9, atol=0)
        each.append(loss)
    assert torch.equal(ranks[0][5], ranks[1][5])
    assert bool(ranks[0][5].any())
    assert float(each[0]) != float(each[1])


def test_128_frames_have_116_contexts_and_twelve_steps():
    """A window of 20 480 samples at 100 frames a second."""
    told = VECTORS["cpc"]
    assert told["frames_20480"] * told["downsampling"] == 20_480
    method = METHODS["cpc"](encoder("spectrogram", frames=128, causal=True))
    assert len(method.predictors) == told["predictions"]
    seen = []
    method.predictors[11].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    method(Batch([View(torch.randn(2, 128, 8), "spectrogram")], torch.arange(2), (1, 2)), Clock())
    assert seen == [(2, told["window"], 16)]


def test_no_negative_is_a_frame_that_is_to_be_found_and_all_others_may_be():
    pool = torch.zeros(3 * 9, 1)
    seen = {(b, t): set() for b in range(3) for t in range(5)}
    for key in range(40):
        places = negative_places((3 * key, 3 * key + 1, 3 * key + 2), [9], 4, 50, pool)
        for b, t in seen:
            seen[b, t] |= {*places[b, t].tolist()}
    for (b, t), found in seen.items():
        assert found == {*range(27)} - {9 * b + t + k for k in (1, 2, 3, 4)}
    assert torch.equal(negative_places((5, 6), [9], 4, 50, pool)[0], negative_places((5, 7), [9], 4, 50, pool)[0])


@pytest.mark.parametrize("modality", ["speech", "spectrogram"])
def test_a_context_knows_nothing_of_what_comes(modality):
    net = encoder(modality, causal=True).double().eval()
    METHODS["cpc"](net)
    draw = torch.Generator().manual_seed(0)
    shape = (1, 400 + 320 * 9) if modality == "speech" else (1, 10, 8)
    x = torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
    (net(View(x, modality)).tokens[0, 4] * torch.arange(16)).sum().backward()
    reach = 400 + 320 * 4 if modality == "speech" else 5
    assert not bool(x.grad[0, reach:].any())
    assert bool(x.grad[0, :reach].any())


REFUSED = [
    ({"causal": False}, r"model\.causal: false, .*set model\.causal=true"),
    ({"position_kernel": 3}, r"model\.position_kernel: .*see those to come; set model\.position_kernel=1"),
    ({"positions": "single", "position_kernel": 128}, r"model\.position_kernel: "),
    ({"conv_norm": "group"}, r"model\.conv_norm: group normalises over time.*set model\.conv_norm=layer"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_cpc_refuses_encoders_that_see_what_is_to_come(options, text):
    with pytest.raises(ValueError, match=text):
        METHODS["cpc"](encoder(**options))


def test_cpc_refuses_clips_that_are_shorter_than_its_steps():
    method = METHODS["cpc"](encoder(), steps=10).double()
    with pytest.raises(ValueError, match=r"method\.steps: 10, the views have 10 frames; lower it or raise views\.shortest"):
        method(batch_of("cpc", torch.arange(2)), Clock())


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_is_refused(name):
    with pytest.raises(ValueError, match=r"model\.backbone: "):
        METHODS[name](torch.nn.Linear(1, 1))


def test_candidates_that_are_all_alike_cost_log_k_plus_1():
    method = build("cpc")
    for predict in method.predictors:
        torch.nn.init.zeros_(predict.weight)
    out = method(batch_of("cpc", torch.arange(6)), Clock())
    assert out.losses["cpc"].item() == pytest.approx(math.log(6), abs=1e-12)
    known = float(out.health["information"])
    assert method.judge({"health/information": known}) == [
        f"frames to come are found hardly better than by chance (information {known:.3g}, normal above 0.05)"
    ]
