import itertools
import math
import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.losses import average_layers, data2vec_regression
from mmssl.masks import blocks
from mmssl.methods.data2vec2 import Data2Vec2
from mmssl.model import decoder as decoder_module
from mmssl.model.configuration import MmsslConfig
from mmssl.model.decoder import ConvDecoderOptions
from mmssl.model.encoder import Encoder
from mmssl.parts import Network, Teacher
from mmssl.random import generator
from mmssl.schedules import constant, linear
from mmssl.training.objective import Objective
from mmssl.types import Clock, Mask, View


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


def exact(one, other):
    assert_close(one, other, rtol=0, atol=0)


def randomised(method, seed=0):
    """All trained weights drawn anew: no bias is zero, no norm the identity, and student and teacher differ."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw).to(parameter.dtype) / parameter.shape[-1] ** 0.5
    return method


def targets(method, view):
    features = method.student.encoder.features(view.x)
    layers = method.teacher.encode(view, features, "ffn").layers
    return average_layers(layers, method.top_k, method.each_norm, method.final_norm, view.pad)


def wide(batch):
    """In float64; token ids stay what they are."""
    return batch._replace(views=[v._replace(x=v.x.double() if v.x.is_floating_point() else v.x) for v in batch.views])


def part(batch, rows, masks=None):
    """Some samples, or some masks of one, cut to the longest of them; without `pad` where nothing is padded."""
    (view,) = batch.views
    masks = masks or slice(rows.start * view.copies, rows.stop * view.copies)
    x, hidden, pad = view.x[rows], view.mask.hidden[masks], None
    if view.pad is not None:
        longest = int((~view.pad[rows]).sum(1).max())
        x = x[:, : longest if view.modality == "text" else 400 + 320 * (longest - 1)]
        hidden, pad = hidden[:, :longest], view.pad[rows, :longest]
    view = View(x, view.modality, pad if pad is not None and pad.any() else None, Mask.of(hidden, pad))
    return batch._replace(views=[view], index=batch.index[rows], keys=batch.keys[rows])


MODALITIES = pytest.mark.parametrize("modality", ["vision", "speech", "text"])
# modality, tokens of each sample that are not padding
PADDED = pytest.mark.parametrize(("modality", "valid"), [("vision", None), ("speech", (16, 11, 13)), ("text", (16, 7, 13))])


# Shapes and counts -----------------------------------------------------------------------------------------------------


def huge() -> Data2Vec2:
    encoder = Encoder.from_config(MmsslConfig(hidden_size=1280, depth=32, heads=16, image_size=224, patch_size=14))
    return Data2Vec2(encoder, ConvDecoderOptions(1024, 16, 5, 3), top_k=24)


@pytest.mark.parametrize(
    ("build", "trained", "encoder", "decoder", "fixed", "teacher", "block", "convs", "places"),
    [
        ("vision/data2vec2-base", 88_233_216, 85_647_360, 2_585_856, 150_528, 85_797_888, 7_087_872, 0, 0),
        ("vision/data2vec2-large", 309_067_776, 303_099_904, 5_967_872, 200_704, 303_300_608, 12_596_224, 0, 0),
        (huge, 637_075_712, 630_435_840, 6_639_872, 327_680, 630_763_520, 19_677_440, 0, 0),
        ("speech/data2vec2-base", 93_783_308, 93_163_532, 619_776, 0, 88_561_932, 7_087_872, 4_206_592, 3_505_920),
        ("speech/data2vec2-large", 315_184_144, 313_275_408, 1_908_736, 0, 308_542_480, 12_596_224, 4_206_592, 6_231_040),
        ("text/data2vec2-base", 152_961_792, 124_054_272, 28_907_520, 0, 85_054_464, 7_087_872, 0, 0),
        ("text/data2vec2-large", 385_379_584, 354_309_120, 31_070_464, 0, 302_309_376, 12_596_224, 0, 0),
    ],
)
def test_parameter_counts_are_those_of_the_paper(build, trained, encoder, decoder, fixed, teacher, block, convs, places):
    with torch.device("meta"):
        method = Recipe.load(build).build() if isinstance(build, str) else build()
    assert count(p for p in method.parameters() if p.requires_grad) == trained
    assert count(method.student.parameters()) == encoder
    assert count(method.decoder.parameters()) == decoder
    assert count(method.student.buffers()) == fixed
    assert count(method.teacher.state_dict().values()) == teacher
    net = method.student.encoder
    assert {count(b.parameters()) for b in [*net.transformer.prenet, *net.transformer.blocks]} == {block}
    if convs:
        assert count([*net.features.convs.parameters(), *net.features.norms.parameters()]) == convs
        assert count(net.positions.convs.parameters()) == places


def test_the_student_of_image_base_sees_cls_and_39_patches_of_each_masked_copy(tiny):
    method, batch = tiny(samples=2, copies=4, image_size=224, patch_size=16)
    hidden = torch.arange(196).repeat(8, 1) >= 39
    seen = []
    method.student.encoder.transformer.prenet[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    method(batch._replace(views=[batch.views[0]._replace(mask=Mask.of(hidden))]), Clock())
    assert seen == [(8, 40, 16)]


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (719, 1), (720, 2), (16_000, 49), (32_000, 99), (160_000, 499)])
def test_sound_becomes_one_frame_every_20_ms(tiny, samples, frames):
    encoder = tiny(modality="speech")[0].student.encoder
    assert encoder.features(torch.zeros(1, samples)).shape == (1, frames, 16)
    assert encoder.features.frames(samples) == frames
    assert [encoder.features.frames(n) for n in (0, 1, 399, 320_000)] == [0, 0, 0, 999]
    with pytest.raises(ValueError, match="399 samples are too few"):
        encoder.features(torch.zeros(1, 399))


@pytest.mark.parametrize(("ratio", "adjust", "kept"), [(0.5, 0.05, 500), (0.55, 0.1, 450)])
def test_the_student_of_speech_sees_only_the_frames_that_are_kept_of_20_s(tiny, ratio, adjust, kept):
    method, _ = tiny(modality="speech", depth=2)
    mask = Mask.of(blocks((999,), 2, ratio, 5, adjust, generator("20 s")))
    seen = []
    method.student.encoder.transformer.prenet[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    method.student.encoder.contextualize(torch.zeros(1, 999, 16), mask)
    assert seen == [(2, kept, 16)]


@pytest.mark.parametrize("copies", [1, 2, 5])
@MODALITIES
def test_one_step_runs_the_teacher_once_per_sample_and_the_features_once_or_also_for_their_average(tiny, copies, modality):
    method, batch = tiny(copies=copies, modality=modality)
    teacher, student, local, decoded = [], [], [], []
    for encoder, calls in ((method.teacher.encoder, teacher), (method.student.encoder, student)):
        encoder.transformer.register_forward_hook(lambda _, args, out, calls=calls: calls.append(args[0].shape[:2]))
        if not isinstance(encoder.features, nn.Identity):
            encoder.features.register_forward_hook(lambda _, args, out: local.append(len(args[0])))
    method.decoder.register_forward_hook(lambda _, args, out: decoded.append(out.shape))
    method(batch, Clock())
    assert teacher == [(3, 16)]
    assert student == [(3 * copies, 4 if modality == "vision" else 8)]
    assert local == ([3, 3] if modality == "vision" else [3])
    assert decoded == [(3 * copies, 16, 16)]


# One step by hand ------------------------------------------------------------------------------------------------------


def normed(x, how):
    """(L, D) of one sample; over tokens or over channels."""
    if how == "none":
        return x
    over = 0 if how == "instance" else 1
    return (x - x.mean(over, True)) / (x.var(over, correction=0, keepdim=True) + 1e-5).sqrt()


CLS = {"cls_weight": 0.7, "final_norm": "layer"}


@pytest.mark.parametrize(
    ("modality", "valid", "extra", "options", "each", "final", "scale"),
    [
        ("vision", None, 1, CLS, "instance", "layer", 0.25),  # 16 ** -0.5
        ("speech", None, 0, {}, "instance", "none", 0.25),
        ("speech", (16, 11), 0, {}, "instance", "none", 0.25),
        ("text", (16, 9), 0, {}, "instance", "none", 1.0),
        ("text", (9, 16), 0, {"each_norm": "layer", "final_norm": "instance"}, "layer", "instance", 1.0),
        ("text", (16, 9), 1, CLS, "instance", "layer", 1.0),
    ],
)
def test_the_losses_are_those_of_the_algorithm_done_row_by_row(tiny, modality, valid, extra, options, each, final, scale):
    method, batch = tiny(2, 3, modality=modality, valid=valid, options=options, extra_tokens=extra)
    randomised(method.double())
    method.decoder.noise = 0.0
    batch = wide(batch)
    found = {name: float(term.detach()) for name, term in method(batch, Clock()).losses.items()}
    tokens, cls = [], []
    with torch.no_grad():
        for row in range(6):  # rows 0, 1, 2 are sample 0; each by itself has no padding
            (view,) = part(batch, slice(row // 3, row // 3 + 1), slice(row, row + 1)).views
            assert view.pad is None
            features = method.student.encoder.features(view.x)
            layers = method.teacher.encode(view, features, "ffn").layers
            assert len(layers) == 3  # the trunk's, not the prenet's
            target = normed(sum(normed(layer[0], each) for layer in layers[-2:]) / 2, final)
            out = method.student.encoder.contextualize(features, view.mask)
            rebuilt = method.decoder(out.tokens, view.mask, [0])[0]
            tokens += ((rebuilt - target)[view.mask.hidden[0]].square().sum(1) * scale).tolist()
            if extra:
                cls.append(float((out.cls[0] - target.mean(0)).square().sum() * scale))
    assert len(tokens) == int(batch.views[0].mask.hidden.sum())
    assert found["tokens"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-10)
    assert found.get("cls", 0) == pytest.approx(0.7 * sum(cls) / 6, rel=1e-10)


@pytest.mark.parametrize(("samples", "weight"), [(1, 0.16), (16, 2.56)])
def test_the_cls_weight_stands_for_the_authors_sum_over_the_rows_of_a_device(tiny, samples, weight):
    method, batch = tiny(samples=samples, copies=16, cls_weight=weight)
    found = randomised(method)(batch, Clock()).losses["cls"]
    target = targets(method, batch.views[0]).mean(1).repeat_interleave(16, 0)
    prediction = method.student.encoder(batch.views[0], batch.views[0].mask).cls
    assert_close(found, 0.01 * ((prediction - target).square() / 4).sum(), rtol=1e-5, atol=0)
    assert "cls" not in tiny(cls_weight=0)[0](batch, Clock()).losses


def test_clones_share_their_sample_and_nothing_else(tiny):
    method, batch = tiny(samples=2, copies=4)
    (view,) = batch.views
    assert len({tuple(row.tolist()) for row in view.mask.hidden}) == 8
    other = view.x.clone()
    other[1] += 1
    before, after = (method.student.encoder(View(x, "vision"), view.mask).tokens for x in (view.x, other))
    exact(before[:4], after[:4])
    assert bool(((before - after)[4:].abs().amax((1, 2)) > 1e-3).all())


@pytest.mark.parametrize(
    ("modality", "valid"),
    [("vision", None), ("speech", None), ("speech", (16, 9, 12, 16, 9, 11, 16, 14)), ("text", (7, 9, 16, 12, 16, 11, 16, 14))],
)
def test_splitting_a_batch_into_micro_batches_changes_neither_loss_nor_gradients(tiny, modality, valid):
    method, batch = tiny(8, 2, modality=modality, valid=valid)
    randomised(method.double())
    batch = wide(batch)
    if valid:
        method.decoder.noise = 0.0  # a sample's noise depends on how long its batch is
    terms = float(method.terms(batch))
    assert terms == 2 * (8 * 12 if modality == "vision" else sum(n - n // 2 for n in valid or [16] * 8))

    def step(size):
        method.zero_grad()
        total, lengths = 0.0, set()
        for first in range(0, 8, size):
            micro = part(batch, slice(first, first + size))
            lengths.add(micro.views[0].mask.hidden.shape[1])
            loss = sum(method(micro, Clock()).losses.values()) * method.terms(micro) / terms
            loss.backward()
            total += float(loss.detach())
        return torch.tensor(total), [p.grad.clone() for p in method.parameters()], lengths

    *whole, _ = step(8)
    for size in (1, 2):
        *found, lengths = step(size)
        assert_close(found, whole, rtol=1e-9, atol=1e-11)
        assert (len(lengths) > 1) == bool(valid)  # some were cut, down to samples without padding


# Masks -----------------------------------------------------------------------------------------------------------------


@PADDED
def test_what_lies_under_the_mask_cannot_be_seen(tiny, modality, valid):
    method, batch = tiny(copies=1, modality=modality, valid=valid)
    encoder, (view,) = method.student.encoder, batch.views
    features = encoder.features(view.x)
    before = encoder.contextualize(features, view.mask, pad=view.pad)
    for foreign in (math.nan, 1e4):
        spoilt = torch.where(view.mask.hidden[..., None], torch.full_like(features, foreign), features)
        after = encoder.contextualize(spoilt, view.mask, pad=view.pad)
        exact(after.tokens, before.tokens)
        exact(after.cls, before.cls)


@PADDED
def test_the_order_of_visible_tokens_does_not_matter(tiny, modality, valid):
    method, batch = tiny(modality=modality, valid=valid)
    randomised(method.double())
    (view,) = wide(batch).views
    mask, features = view.mask, method.student.encoder.features(view.x)
    shuffled = mask.keep[:, torch.randperm(mask.keep.shape[1], generator=generator("order"))]
    seen = torch.zeros_like(mask.hidden).scatter_(1, mask.keep, True)
    rest = torch.stack([(~row).nonzero().flatten() for row in seen])
    other = Mask(mask.hidden, shuffled, torch.cat([shuffled, rest], 1).argsort(1))
    first, second = (
        method.decoder(method.student.encoder.contextualize(features, m, pad=view.pad).tokens, m, batch.keys, view.pad)
        for m in (mask, other)
    )
    valid = torch.ones(3, 16, dtype=torch.bool) if view.pad is None else ~view.pad
    valid = valid.repeat_interleave(4, 0)
    assert_close(first[valid], second[valid], rtol=1e-9, atol=1e-11)


def test_the_decoder_starts_from_visible_tokens_and_keyed_noise(tiny):
    method, batch = tiny(samples=3, copies=8, dim=64)
    mask, seen = batch.views[0].mask, []
    method.decoder.convs[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(2).transpose(1, 2)))
    visible = method.student.encoder(batch.views[0], mask).tokens
    method.decoder(visible, mask, batch.keys)
    method.decoder(visible[8:16], Mask.of(mask.hidden[8:16]), batch.keys[1:2])  # the second sample alone
    x, alone = seen
    for row in range(24):
        exact(x[row][~mask.hidden[row]], visible[row])
    fillers = x[mask.hidden].view(24, 12, 64)
    fillers = fillers.detach()
    assert abs(float(fillers.std()) / 0.01 - 1) < 0.03
    assert abs(float(fillers.mean())) < 3e-4
    assert len(fillers.flatten(0, 1).unique(dim=0)) == 24 * 12  # fresh for each place of each clone
    exact(alone, x[8:16])


# Teacher ---------------------------------------------------------------------------------------------------------------


@PADDED
def test_the_teacher_starts_as_an_exact_copy_with_memory_of_its_own(tiny, modality, valid):
    method, batch = tiny(modality=modality, valid=valid)
    view = batch.views[0]._replace(mask=None)
    with torch.no_grad():  # attention has another kernel for biases that need a gradient
        features = method.student.encoder.features(view.x)
        exact(method.teacher.encode(view, features, "ffn").layers, method.student.encoder(view, collect="ffn").layers)
    teacher, student = method.teacher.network.state_dict(), method.student.state_dict()
    exact(dict(teacher), {name: student[name] for name in teacher})
    missing = {name for name in student if name not in teacher}
    assert missing == (set() if modality == "vision" else {n for n in student if n.startswith("encoder.features.")})
    assert not {t.data_ptr() for t in teacher.values()} & {t.data_ptr() for t in student.values()}


@MODALITIES
def test_no_gradient_reaches_the_teacher_or_flows_through_the_targets(tiny, modality):
    method, batch = tiny(modality=modality)
    randomised(method.double())
    batch = wide(batch)
    (view,) = batch.views
    teacher = list(method.teacher.network.parameters())
    assert not any(p.requires_grad for p in teacher)
    assert not {id(p) for p in teacher} & {id(p) for p in method.parameters()}
    sum(method(batch, Clock()).losses.values()).backward()
    assert all(p.grad is None for p in teacher)
    with torch.no_grad():
        target = targets(method, view)
    out = method.student.encoder(view, view.mask)
    loss = data2vec_regression(method.decoder(out.tokens, view.mask, batch.keys), target, view.mask, method.loss_scale)
    if modality == "vision":
        loss = loss + 2.56 * data2vec_regression(out.cls, target.mean(1))
    wanted = torch.autograd.grad(loss, list(method.parameters()))
    assert_close([p.grad for p in method.parameters()], list(wanted), rtol=1e-9, atol=1e-11)


@MODALITIES
def test_the_teacher_is_deterministic_in_training(tiny, modality):
    torch.manual_seed(0)
    shares = {"dropout": 0.1, "attention_dropout": 0.1, "input_dropout": 0.1, "layer_drop": 0.05, "drop_path": 0.3}
    method, batch = tiny(modality=modality, **shares)
    method.train()
    assert method.student.training
    assert not any(module.training for module in method.teacher.network.modules())
    view = batch.views[0]
    features = method.student.encoder.features(view.x)
    layers = [method.teacher.encode(view, features, "ffn").layers for _ in range(2)]
    exact(*layers)
    student = [method.student.encoder.contextualize(features).tokens for _ in range(2)]
    assert not torch.equal(*student)
    again = method.student.encoder.features(view.x)
    assert torch.equal(again, features) == (modality != "text")  # whose shared features come with dropout


@MODALITIES
def test_the_student_moves_targets_within_a_step_only_through_features_that_it_shares(tiny, modality):
    method, batch = tiny(modality=modality)
    before = targets(method, batch.views[0])
    local = set(method.student.encoder.features.parameters())
    for parameter in set(method.parameters()) - local:
        parameter.data += 1.0
    exact(targets(method, batch.views[0]), before)
    draw = torch.Generator().manual_seed(0)
    for parameter in method.student.encoder.features.parameters():
        parameter.data += torch.randn(parameter.shape, generator=draw)
    assert torch.equal(targets(method, batch.views[0]), before) == (modality == "vision")
    method.teacher.momentum = constant(0.5)
    moved = targets(method, batch.views[0])
    method.after_step(Clock(1))
    assert not torch.equal(targets(method, batch.views[0]), moved)


def test_after_a_step_the_teacher_is_the_formula(tiny):
    method, _ = tiny()
    method.teacher.momentum = linear(0.9, 1.0, steps=10)
    old = {name: t.double().clone() for name, t in method.teacher.network.state_dict().items()}
    randomised(method)
    new = {name: t.double().clone() for name, t in method.student.state_dict().items()}
    method.after_step(Clock(1, 100))
    for name, tensor in method.teacher.network.state_dict().items():
        tau = 0.91  # at one update done, not none
        wanted = old[name] if name.endswith("table") else tau * old[name] + (1 - tau) * new[name]
        assert_close(tensor.double(), wanted, rtol=0, atol=1e-7)
    assert {name: t.double() for name, t in method.student.state_dict().items()}.keys() == new.keys()
    exact({name: t.double() for name, t in method.student.state_dict().items()}, new)


def test_fixed_tensors_are_copied_and_not_averaged():
    student = Network(encoder=nn.Linear(2, 2))
    student.encoder.register_buffer("b", torch.zeros(1))
    teacher = Teacher(student, constant(0.9))
    student.encoder.bias.requires_grad_(False)
    for tensor in (student.encoder.bias, student.encoder.weight, student.encoder.b):
        tensor.data.fill_(3.0)
    before = teacher.network.encoder.weight.clone()
    teacher.after_step(Clock(1))
    assert teacher.network.encoder.bias.tolist() == [3, 3]
    assert teacher.network.encoder.b.tolist() == [3]
    assert_close(teacher.network.encoder.weight, 0.9 * before + 0.3)


def test_the_teacher_of_speech_large_stands_still_for_the_second_half(tiny):
    method, _ = tiny(modality="speech")
    method.teacher.momentum = Recipe.load("speech/data2vec2-large").method.momentum
    randomised(method)
    before = [t.clone() for t in method.teacher.network.state_dict().values()]
    for step in (300_000, 300_001, 600_000):
        method.after_step(Clock(step, 600_000))
        exact(list(method.teacher.network.state_dict().values()), before)
    method.after_step(Clock(1, 600_000))
    assert not torch.equal(next(iter(method.teacher.network.state_dict().values())), before[0])


def test_the_average_is_kept_in_fp32():
    student = Network(encoder=nn.Linear(3, 3))
    nn.init.ones_(student.encoder.weight)
    teacher = Teacher(student, constant(0.9998))
    nn.init.constant_(student.encoder.weight, 2.0)
    low = torch.ones(3, 3, dtype=torch.bfloat16)
    for step in range(1, 1001):
        teacher.after_step(Clock(step))
        low.lerp_(student.encoder.weight.detach().bfloat16(), 1 - 0.9998)
    assert float((teacher.network.encoder.weight - 1.1813).abs().max()) < 1e-4  # 2 - 0.9998^1000
    assert bool((low == 1).all())  # where it would stand in bf16


def test_casting_the_model_to_bf16_does_not_cast_the_average_and_hides_no_master_weights(tiny):
    method, _ = tiny()
    method.to(torch.bfloat16)
    assert {p.dtype for p in method.student.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in method.teacher.network.state_dict().values()} == {torch.float32}
    with pytest.raises(RecipeError, match="autocast"):
        method.after_step(Clock(1))


def test_t07_the_teacher_travels_in_the_state_dict(tiny):
    method, _ = tiny()
    randomised(method).after_step(Clock(1))
    other, _ = tiny()
    assert any(name.startswith("teacher.network.encoder.") for name in method.state_dict())
    other.load_state_dict(method.state_dict())
    exact(dict(other.teacher.network.state_dict()), dict(method.teacher.network.state_dict()))
    broken = {name: t for name, t in method.state_dict().items() if name != "teacher.network.encoder.features.proj.bias"}
    with pytest.raises(RuntimeError, match=r"teacher\.network\.encoder\.features\.proj\.bias"):
        other.load_state_dict(broken)


def test_restarting_makes_the_teacher_the_student_again(tiny):
    method, _ = tiny()
    randomised(method)
    for part in method.parts():
        part.restart()
    exact(dict(method.teacher.network.state_dict()), dict(method.student.state_dict()))


# Gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "options"), [("vision", {}), ("vision", {"cls_weight": 0.0}), ("speech", {}), ("text", {})]
)
def test_every_trained_weight_gets_a_gradient_and_visible_places_get_none(tiny, monkeypatch, modality, options):
    method, batch = tiny(modality=modality, options=options)
    rebuilt, noise = [], []
    method.decoder.register_forward_hook(lambda _, args, out: (out.retain_grad(), rebuilt.append(out))[0])
    draw = decoder_module.random.normal
    monkeypatch.setattr(decoder_module.random, "normal", lambda *a, **k: noise.append(draw(*a, **k)) or noise[-1])
    sum(method(batch, Clock()).losses.values()).backward()
    for name, parameter in method.named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name
    if modality == "speech":
        assert bool((method.student.encoder.positions.bias.scale.grad != 0).all())
    hidden, gradient = batch.views[0].mask.hidden, rebuilt[0].grad
    assert float(gradient[~hidden].abs().max()) == 0
    assert float(gradient[hidden].abs().amin(0).sum()) > 0
    assert [n.requires_grad for n in noise] == [False]


def spread(rows):
    return (rows.var(0) + 1e-6).sqrt().mean()


@PADDED
def test_health_is_measured_and_detached(tiny, modality, valid):
    method, batch = tiny(modality=modality, valid=valid)
    rebuilt = []
    method.decoder.register_forward_hook(lambda _, args, out: rebuilt.append(out))
    out = method(batch, Clock())
    (view,), encoder = batch.views, method.student.encoder
    hidden = view.mask.hidden
    pad = torch.zeros(3, 16, dtype=torch.bool) if view.pad is None else view.pad
    kept = ~hidden & ~pad.repeat_interleave(4, 0)
    visible = encoder(view, view.mask)
    tokens = [row[torch.isin(keep, own.nonzero())] for row, keep, own in zip(visible.tokens, view.mask.keep, kept)]
    wanted = {
        "target_std": spread(targets(method, view).repeat_interleave(4, 0)[hidden]),
        "prediction_std": spread(rebuilt[0][hidden]),
        "feature_std": spread(encoder.features(view.x)[~pad]),
        "encoder_std": spread(torch.cat(tokens)),
        "masked_share": hidden.sum() / (4 * (~pad).sum()),
    }
    assert_close(out.health, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert not any(value.requires_grad for value in [*out.health.values(), out.embedding])
    means = torch.stack([row.mean(0) for row in tokens])
    assert_close(out.embedding, means.view(3, 4, 16).mean(1).detach())


def test_impossible_options_are_refused_by_name(tiny):
    with pytest.raises(ValueError, match=r"^top_k: 4 layers"):
        tiny(top_k=4)
    with pytest.raises(ValueError, match=r"^cls_weight: needs model\.extra_tokens"):
        tiny(extra_tokens=0)
    with pytest.raises(ValueError, match=r"^cls_weight: needs final_norm=layer"):
        tiny(options={"final_norm": "none"})
    with pytest.raises(ValueError, match=r"^cls_weight: -1"):
        tiny(cls_weight=-1)
    method, batch = tiny()
    with pytest.raises(ValueError, match=r"^views\.mask: "):
        method(batch._replace(views=[batch.views[0]._replace(mask=None)]), Clock())


# In the trainer --------------------------------------------------------------------------------------------------------


def weights(recipe):
    method = Objective(recipe.build()).method
    return {name: t.clone() for name, t in method.student.state_dict().items()}


def test_t36_compiled_blocks_learn_what_eager_ones_do(tiny):
    """T36: of student and teacher, on CPU by inductor."""
    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("torch.compile on CPU needs a C++ compiler, and there is none here")
    (eager, batch), (compiled, _) = (tiny(copies=2, depth=1, top_k=1) for _ in range(2))
    for encoder in (compiled.student.encoder, compiled.teacher.encoder):
        for block in encoder.compilable():
            block.compile()
    one, other = (method(batch, Clock()).losses for method in (eager, compiled))
    assert one.keys() == other.keys()
    for name in one:
        assert_close(other[name], one[name], rtol=1e-5, atol=0)
    for losses in (one, other):
        sum(losses.values()).backward()
    for (name, mine), (_, theirs) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_t06_four_micro_batches_make_one_teacher_update(tiny_recipe, trained):
    recipe = tiny_recipe("train.micro_batch=2", "train.steps=1", "optim.lr=0.01", "method.momentum=0.9")
    passes = []

    def watch(run):
        run.objective.method.register_forward_hook(lambda *_: passes.append(1))

    method = trained(recipe, watch).objective.method
    assert len(passes) == 4
    old, new = weights(recipe), method.student.state_dict()
    for name, tensor in method.teacher.network.state_dict().items():
        assert_close(tensor.double(), 0.9 * old[name].double() + 0.1 * new[name].double(), rtol=1e-7, atol=1e-7)
    assert float((new["encoder.features.proj.weight"] - old["encoder.features.proj.weight"]).abs().max()) > 1e-3


def test_micro_batches_leave_loss_and_gradients_of_a_run_as_they_are(tiny_recipe, trained):
    runs = [trained(tiny_recipe("train.steps=1", "optim.clip=4.0", f"train.micro_batch={size}")) for size in (8, 2, 1)]
    for run in runs[1:]:
        assert run.lines[0]["loss"] == pytest.approx(runs[0].lines[0]["loss"], rel=1e-5)
        assert run.lines[0]["grad_norm"] == pytest.approx(runs[0].lines[0]["grad_norm"], rel=1e-4)
        for one, other in zip(runs[0].objective.method.parameters(), run.objective.method.parameters()):
            moments = [r.trainer.optimizer.state[p]["exp_avg"] for r, p in ((runs[0], one), (run, other))]
            assert_close(*moments, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_skipped_moves_neither_student_nor_teacher(tiny_recipe, trained, what):
    calls, seen = [], []

    def spoil(run):
        method = run.objective.method
        forward, after_step, end = method.forward, method.after_step, run.trainer.end_update

        def spoilt(batch, clock):
            out = forward(batch, clock)
            calls.append(1)
            if len(calls) != 7:  # the third micro-batch of the second of three updates
                return out
            if what == "loss":
                return out._replace(losses={"tokens": out.losses["tokens"] * math.inf})
            weight = method.decoder.proj.bias
            return out._replace(losses=out.losses | {"root": (weight - weight.detach()).abs().sqrt().sum()})  # 0, slope inf

        def state():
            return [t.clone() for t in method.state_dict().values()]

        def ended(control):
            end(control)
            seen.append((state(), updates[:]))

        updates = []
        seen.append((state(), []))
        method.forward, run.trainer.end_update = spoilt, ended
        method.after_step = lambda clock: (updates.append(clock.step), after_step(clock))

    run = trained(tiny_recipe("train.micro_batch=2", "train.steps=3", "optim.clip=1.0"), spoil)
    moved = [any(not torch.equal(a, b) for a, b in zip(x, y)) for (x, _), (y, _) in itertools.pairwise(seen)]
    assert moved == [True, False, True]
    assert [updates for _, updates in seen] == [[], [1], [1], [1, 2]]
    assert [line["skipped"] for line in run.lines[:3] if "skipped" in line] == [0, 1, 0]
    assert run.trainer.applied == 2
