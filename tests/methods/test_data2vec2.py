import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.losses import average_layers, data2vec_regression
from mmssl.methods.data2vec2 import Data2Vec2
from mmssl.model import decoder as decoder_module
from mmssl.model.configuration import MmsslConfig
from mmssl.model.decoder import ConvDecoderOptions
from mmssl.model.encoder import Encoder
from mmssl.parts import Network, Teacher
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
    return average_layers(method.teacher.encoder(view, collect="ffn").layers, method.top_k)


# Shapes and counts -----------------------------------------------------------------------------------------------------


def huge() -> Data2Vec2:
    encoder = Encoder.from_config(MmsslConfig(hidden_size=1280, depth=32, heads=16, image_size=224, patch_size=14))
    return Data2Vec2(encoder, ConvDecoderOptions(1024, 16, 5, 3), top_k=24)


@pytest.mark.parametrize(
    ("build", "trained", "encoder", "decoder", "fixed", "teacher", "block"),
    [
        ("vision/data2vec2-base", 88_233_216, 85_647_360, 2_585_856, 150_528, 85_797_888, 7_087_872),
        ("vision/data2vec2-large", 309_067_776, 303_099_904, 5_967_872, 200_704, 303_300_608, 12_596_224),
        (huge, 637_075_712, 630_435_840, 6_639_872, 327_680, 630_763_520, 19_677_440),
    ],
)
def test_parameter_counts_are_those_of_the_paper(build, trained, encoder, decoder, fixed, teacher, block):
    with torch.device("meta"):
        method = Recipe.load(build).build() if isinstance(build, str) else build()
    assert count(p for p in method.parameters() if p.requires_grad) == trained
    assert count(method.student.parameters()) == encoder
    assert count(method.decoder.parameters()) == decoder
    assert count(method.student.buffers()) == fixed
    assert count(method.teacher.state_dict().values()) == teacher
    assert {count(b.parameters()) for b in [*method.student.encoder.transformer.blocks]} == {block}


def test_the_student_of_image_base_sees_cls_and_39_patches_of_each_masked_copy(tiny):
    method, batch = tiny(samples=2, copies=4, image_size=224, patch_size=16)
    hidden = torch.arange(196).repeat(8, 1) >= 39
    seen = []
    method.student.encoder.transformer.prenet[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    method(batch._replace(views=[batch.views[0]._replace(mask=Mask.of(hidden))]), Clock())
    assert seen == [(8, 40, 16)]


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_one_step_runs_the_teacher_once_per_sample_and_the_patch_convolution_twice(tiny, copies):
    method, batch = tiny(copies=copies)
    teacher, student, patches, decoded = [], [], [], []
    for encoder, calls in ((method.teacher.encoder, teacher), (method.student.encoder, student)):
        encoder.transformer.register_forward_hook(lambda _, args, out, calls=calls: calls.append(args[0].shape[:2]))
        encoder.features.proj.register_forward_hook(lambda _, args, out: patches.append(len(args[0])))
    method.decoder.register_forward_hook(lambda _, args, out: decoded.append(out.shape))
    method(batch, Clock())
    assert teacher == [(3, 16)]
    assert student == [(3 * copies, 4)]
    assert patches == [3, 3]
    assert decoded == [(3 * copies, 16, 16)]


# One step by hand ------------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_algorithm_done_row_by_row(tiny):
    method, batch = tiny(samples=2, copies=3, cls_weight=0.7)
    randomised(method.double())
    method.decoder.noise = 0.0
    (view,) = batch.views
    view = view._replace(x=view.x.double())
    found = {name: float(term.detach()) for name, term in method(batch._replace(views=[view]), Clock()).losses.items()}
    tokens, cls = [], []
    with torch.no_grad():
        for row in range(6):
            x = view.x[row // 3 : row // 3 + 1]  # rows 0, 1, 2 are sample 0
            mask = Mask.of(view.mask.hidden[row : row + 1])
            layers = method.teacher.encoder(View(x, "vision"), collect="ffn").layers
            assert len(layers) == 3  # the trunk's, not the prenet's
            target = torch.zeros(16, 16, dtype=torch.float64)
            for layer in layers[-2:]:
                target += (layer[0] - layer[0].mean(0)) / (layer[0].var(0, correction=0) + 1e-5).sqrt() / 2
            target = (target - target.mean(1, True)) / (target.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            out = method.student.encoder(View(x, "vision"), mask)
            rebuilt = method.decoder(out.tokens, mask, [0])[0]
            hidden = mask.hidden[0]
            tokens += ((rebuilt - target)[hidden].square().sum(1) / 4).tolist()  # 16 ** -0.5
            cls.append(float((out.cls[0] - target.mean(0)).square().sum() / 4))
    assert len(tokens) == 6 * 12
    assert found["tokens"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-10)
    assert found["cls"] == pytest.approx(0.7 * sum(cls) / 6, rel=1e-10)


def test_the_cls_weight_stands_for_the_authors_sum_over_the_rows_of_a_device(tiny):
    method, batch = tiny(samples=1, copies=16, cls_weight=0.16)
    found = randomised(method)(batch, Clock()).losses["cls"]
    target = targets(method, batch.views[0]).mean(1)
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


def test_splitting_a_batch_into_micro_batches_changes_neither_loss_nor_gradients(tiny):
    method, batch = tiny(samples=8, copies=2)
    randomised(method.double())
    view = batch.views[0]._replace(x=batch.views[0].x.double())

    def step(size):
        method.zero_grad()
        total = 0.0
        for first in range(0, 8, size):
            rows = slice(first, first + size)
            part = View(view.x[rows], "vision", mask=Mask.of(view.mask.hidden[2 * first : 2 * (first + size)]))
            losses = method(batch._replace(views=[part], index=batch.index[rows], keys=batch.keys[rows]), Clock()).losses
            loss = sum(losses.values()) * size / 8
            loss.backward()
            total += float(loss.detach())
        return torch.tensor(total), [p.grad.clone() for p in method.parameters()]

    whole = step(8)
    for size in (1, 2):
        assert_close(step(size), whole, rtol=1e-9, atol=1e-11)


# Masks -----------------------------------------------------------------------------------------------------------------


def test_what_lies_under_the_mask_cannot_be_seen(tiny):
    method, batch = tiny(samples=3, copies=1)
    encoder, mask = method.student.encoder, batch.views[0].mask
    features = encoder.features(batch.views[0].x)
    before = encoder.contextualize(features, mask)
    after = encoder.contextualize(torch.where(mask.hidden[..., None], torch.full_like(features, math.nan), features), mask)
    exact(after.tokens, before.tokens)
    exact(after.cls, before.cls)


def test_the_order_of_visible_tokens_does_not_matter(tiny):
    method, batch = tiny()
    randomised(method.double())
    mask, features = batch.views[0].mask, method.student.encoder.features(batch.views[0].x.double())
    shuffled = mask.keep[:, [2, 0, 3, 1]]
    hidden = torch.stack([row.nonzero().flatten() for row in mask.hidden])
    other = Mask(mask.hidden, shuffled, torch.cat([shuffled, hidden], 1).argsort(1))
    first, second = (
        method.decoder(method.student.encoder.contextualize(features, m).tokens, m, batch.keys) for m in (mask, other)
    )
    assert_close(first, second, rtol=1e-9, atol=1e-11)


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


def test_the_teacher_starts_as_an_exact_copy_with_memory_of_its_own(tiny):
    method, batch = tiny()
    view = View(batch.views[0].x, "vision")
    student, teacher = (net.encoder(view, collect="ffn") for net in (method.student, method.teacher))
    exact(student.layers, teacher.layers)
    exact(dict(method.teacher.network.state_dict()), dict(method.student.state_dict()))
    own = {t.data_ptr() for t in method.teacher.network.state_dict().values()}
    assert not own & {t.data_ptr() for t in method.student.state_dict().values()}


def test_no_gradient_reaches_the_teacher_or_flows_through_the_targets(tiny):
    method, batch = tiny()
    view = batch.views[0]._replace(x=batch.views[0].x.clone().requires_grad_())
    teacher = list(method.teacher.network.parameters())
    assert not any(p.requires_grad for p in teacher)
    assert not {id(p) for p in teacher} & {id(p) for p in method.parameters()}
    sum(method(batch._replace(views=[view]), Clock()).losses.values()).backward()
    assert all(p.grad is None for p in teacher)
    target = targets(method, View(view.x.detach(), "vision"))
    out = method.student.encoder(view, view.mask)
    loss = data2vec_regression(method.decoder(out.tokens, view.mask, batch.keys), target, view.mask)
    loss = loss + 2.56 * data2vec_regression(out.cls, target.mean(1))
    (wanted,) = torch.autograd.grad(loss, view.x)
    assert_close(view.x.grad, wanted, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_deterministic_in_training(tiny):
    method, batch = tiny(dropout=0.1, attention_dropout=0.1, drop_path=0.3)
    method.train()
    view = View(batch.views[0].x, "vision")
    assert method.student.training
    exact(targets(method, view), targets(method, view))
    student = [method.student.encoder(view).tokens for _ in range(2)]
    assert not torch.equal(*student)


def test_the_student_does_not_move_targets_within_a_step(tiny):
    method, batch = tiny()
    before = targets(method, batch.views[0])
    for parameter in method.parameters():
        parameter.data += 1.0
    exact(targets(method, batch.views[0]), before)
    method.after_step(Clock(1))
    assert not torch.equal(targets(method, batch.views[0]), before)


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


def test_a_momentum_of_one_freezes_the_teacher(tiny):
    method, _ = tiny()
    method.teacher.momentum = constant(1.0)
    before = [t.clone() for t in method.teacher.network.state_dict().values()]
    randomised(method).after_step(Clock(1))
    exact(list(method.teacher.network.state_dict().values()), before)


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


def test_the_teacher_travels_in_the_state_dict(tiny):
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


@pytest.mark.parametrize("cls_weight", [0.0, 2.56])
def test_every_trained_weight_gets_a_gradient_and_visible_places_get_none(tiny, monkeypatch, cls_weight):
    method, batch = tiny(cls_weight=cls_weight)
    rebuilt, noise = [], []
    method.decoder.register_forward_hook(lambda _, args, out: (out.retain_grad(), rebuilt.append(out))[0])
    draw = decoder_module.random.normal
    monkeypatch.setattr(decoder_module.random, "normal", lambda *a, **k: noise.append(draw(*a, **k)) or noise[-1])
    sum(method(batch, Clock()).losses.values()).backward()
    for name, parameter in method.named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name
    hidden, gradient = batch.views[0].mask.hidden, rebuilt[0].grad
    assert float(gradient[~hidden].abs().max()) == 0
    assert float(gradient[hidden].abs().amin(0).sum()) > 0
    assert [n.requires_grad for n in noise] == [False]


def test_health_is_measured_and_detached(tiny):
    method, batch = tiny()
    out = method(batch, Clock())
    target, hidden = targets(method, batch.views[0]), batch.views[0].mask.hidden
    chosen = target.repeat_interleave(4, 0)[hidden]
    assert_close(out.health["target_std"], (chosen.var(0) + 1e-6).sqrt().mean(), rtol=1e-5, atol=1e-6)
    assert set(out.health) == {"target_std", "prediction_std", "feature_std"}
    assert not any(value.requires_grad for value in [*out.health.values(), out.embedding])
    assert out.embedding.shape == (3, 16)


def test_impossible_options_are_refused_by_name(tiny):
    with pytest.raises(ValueError, match=r"^top_k: 4 layers"):
        tiny(top_k=4)
    with pytest.raises(ValueError, match=r"^cls_weight: "):
        tiny(extra_tokens=0)
    method, batch = tiny()
    with pytest.raises(ValueError, match=r"^views\.mask: "):
        method(batch._replace(views=[batch.views[0]._replace(mask=None)]), Clock())


# In the trainer --------------------------------------------------------------------------------------------------------


def weights(recipe):
    method = Objective(recipe.build()).method
    return {name: t.clone() for name, t in method.student.state_dict().items()}


def test_four_micro_batches_make_one_teacher_update(tiny_recipe, trained):
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
