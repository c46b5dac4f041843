import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.model.norm import Groups, grouped
from mmssl.parts import Network, Teacher
from mmssl.schedules import constant, linear
from mmssl.types import Clock, View

VIEW = View(torch.randn(2, 2000, generator=torch.Generator().manual_seed(1)), "speech")


def student(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(encoder=Encoder.from_config(shape()))


def shape():
    return MmsslConfig("speech", 8, depth=2, heads=2, extra_tokens=0, conv_channels=4, position_groups=2)


def moved(network, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += torch.randn(parameter.shape, generator=draw)


def snapshot(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("features", ["average", "copy", "share"])
@pytest.mark.parametrize("positions", ["average", "copy"])
def test_each_part_is_averaged_copied_or_shared(features, positions):
    net = student()
    teacher = Teacher(net, constant(0.75), features, positions)
    old = snapshot(teacher.network)
    moved(net)
    new = snapshot(net)
    teacher.after_step(Clock(1))
    found = snapshot(teacher.network)
    assert any(name.startswith("encoder.features.") for name in found) == (features != "share")
    for name, tensor in found.items():
        copied = (name.startswith("encoder.features.") and features == "copy") or (
            name.startswith("encoder.positions.") and positions == "copy"
        )
        wanted = new[name] if copied else 0.75 * old[name] + 0.25 * new[name]
        assert_close(tensor, wanted, rtol=0, atol=0 if copied else 1e-6)
        assert not torch.equal(tensor, old[name])
    assert_close(snapshot(net), new, rtol=0, atol=0)


@pytest.mark.parametrize("features", ["average", "copy", "share"])
def test_the_teacher_reads_the_features_of_the_student_only_if_it_shares_them(features):
    net = student()
    teacher = Teacher(net, constant(0.5), features)
    own, other = net.encoder.features(VIEW.x), torch.full((2, 5, 8), 0.3, requires_grad=True)
    with torch.no_grad():
        wanted = net.encoder.contextualize(other if features == "share" else own).tokens
    found = teacher.encode(VIEW, other).tokens
    assert not found.requires_grad
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", ["average", "share"])
def test_its_state_travels_and_what_is_foreign_or_missing_is_named(features):
    net, other = student(), student(5)
    first, second = (Teacher(n, constant(0.5), features) for n in (net, other))
    moved(net)
    first.after_step(Clock(1))
    saved = snapshot(first)
    assert all(name.startswith("network.encoder.") for name in saved)
    second.load_state_dict(saved)
    assert_close(snapshot(second.network), snapshot(first.network), rtol=0, atol=0)
    weight = "network.encoder.transformer.blocks.0.mlp.fc1.weight"
    with pytest.raises(RuntimeError, match=f'(?s)Missing.*"{weight}".*Unexpected.*"network.foreign"'):
        second.load_state_dict({n: t for n, t in saved.items() if n != weight} | {"network.foreign": torch.zeros(1)})


def test_a_tensor_of_another_shape_is_refused_and_not_spread():
    teacher = Teacher(student(), constant(0.5))
    saved = snapshot(teacher) | {"network.encoder.features.proj.bias": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"network\.encoder\.features\.proj\.bias is \(1,\), expected \(8,\)"):
        teacher.load_state_dict(saved)


@pytest.mark.parametrize("features", ["average", "copy", "share"])
def test_restarting_makes_it_the_student_again(features):
    net = student()
    teacher = Teacher(net, constant(0.9), features)
    moved(net)
    teacher.restart()
    new = snapshot(net)
    assert_close(snapshot(teacher.network), {n: new[n] for n in teacher.network.state_dict()}, rtol=0, atol=0)


def test_a_deep_copy_follows_its_own_student():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student()
            self.teacher = Teacher(self.student, constant(0.5), "share", "copy")

    pair = Pair()
    twin = copy.deepcopy(pair)
    assert twin.teacher.student is twin.student
    before = snapshot(pair.teacher)
    moved(twin.student)
    old, new = snapshot(twin.teacher.network), snapshot(twin.student)
    twin.teacher.after_step(Clock(1))
    assert_close(snapshot(pair.teacher), before, rtol=0, atol=0)
    for name, tensor in twin.teacher.network.state_dict().items():
        copied = name.startswith("encoder.positions.")
        assert_close(tensor, new[name] if copied else (old[name] + new[name]) / 2, rtol=0, atol=1e-6)
    assert twin.teacher.encode(VIEW, torch.zeros(2, 5, 8)).tokens.shape == (2, 5, 8)


@pytest.mark.parametrize("features", ["average", "share"])
def test_health_is_tau_and_the_lengths_of_both_weight_vectors(features):
    net = student()
    teacher = Teacher(net, linear(0.8, 1.0, steps=10), features)
    moved(net)
    names = {name for name, _ in teacher.network.named_parameters()}

    def length(network):
        return math.sqrt(
            sum(float(v) ** 2 for n, p in network.named_parameters() if n in names for v in p.detach().flatten().double())
        )

    found = teacher.health(Clock(5, 100))
    wanted = {"momentum": 0.9, "teacher_norm": length(teacher.network), "student_norm": length(net)}
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found["student_norm"] > found["teacher_norm"] + 1
    assert (len(names) < len([*net.parameters()])) == (features == "share")


def normed_student():
    """A student whose encoder drops out and whose projector has batch normalisation and another buffer."""
    config = MmsslConfig("vision", 8, image_size=8, patch_size=4, depth=2, heads=2, prenet_depth=1, dropout=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Network(encoder=Encoder.from_config(config), projector=mlp(8, 6, 4))
    net.register_buffer("foreign", torch.zeros(2))
    return net


def images(seed):
    return View(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), "vision")


def statistics(h, norm):
    """Batch normalisation of (B, D) by the batch, in float64."""
    h = h.double()
    return (h - h.mean(0)) / (h.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias


def test_a_teacher_with_batch_statistics_normalises_by_the_batch_and_drops_nothing():
    net = normed_student()
    with torch.no_grad():
        net.projector[1].running_mean.fill_(3.0)
    teacher = Teacher(net, constant(0.5), batch_stats=True)
    net.train()
    first, second = teacher.embed(images(1)), teacher.embed(images(1))
    assert torch.equal(first, second)  # no dropout
    z = teacher.project(first)
    linear, norm, _, last = teacher.network.projector
    hidden = statistics(first @ linear.weight.T + linear.bias, norm).clamp(min=0)
    assert_close(z.double(), hidden @ last.weight.double().T + last.bias, rtol=1e-4, atol=1e-5)
    assert not z.requires_grad
    plain = Teacher(net, constant(0.5))
    assert not torch.allclose(plain.project(first), z, atol=0.1)


def test_its_running_statistics_follow_its_own_passes_and_other_buffers_the_student():
    net = normed_student()
    teacher, plain = Teacher(net, constant(0.5), batch_stats=True), Teacher(net, constant(0.5))
    h = teacher.embed(images(1))
    teacher.project(h)
    net.projector(h + 7)
    net.foreign.fill_(2.0)
    linear, norm = teacher.network.projector[:2]
    own = 0.1 * (h @ linear.weight.T + linear.bias).mean(0)
    for one in (teacher, plain):
        one.after_step(Clock(1))
        assert torch.equal(one.network.foreign, net.foreign)
    assert_close(norm.running_mean, own)
    assert int(norm.num_batches_tracked) == 1
    assert torch.equal(plain.network.projector[1].running_mean, net.projector[1].running_mean)
    assert not torch.allclose(norm.running_mean, net.projector[1].running_mean, atol=0.01)
    twin = copy.deepcopy(teacher)
    twin.after_step(Clock(2))
    assert_close(twin.network.projector[1].running_mean, own)
    other = Teacher(normed_student(), constant(0.5), batch_stats=True)
    other.load_state_dict(snapshot(teacher))
    assert_close(snapshot(other), snapshot(teacher), rtol=0, atol=0)
    other.restart()
    assert not other.network.projector[1].running_mean.any()


def test_groups_reach_a_teacher_through_its_network():
    teacher = Teacher(normed_student(), constant(0.5), batch_stats=True)
    h = teacher.embed(images(1))
    with grouped(teacher.network, Groups(torch.tensor([0, 1, 1, 0]), 2)):
        z = teacher.project(h)
    for rows in ([0, 3], [1, 2]):
        assert_close(z[rows], teacher.project(h[rows]), rtol=1e-4, atol=1e-5)


def test_what_a_teacher_embeds_and_projects_is_its_networks():
    net = normed_student()
    teacher, views = Teacher(net, constant(0.5)), [images(1), images(2)]
    moved(net)
    with torch.no_grad():
        wanted = teacher.network.embed_all(views)
        heads = teacher.network.project_all(wanted)
    h = teacher.embed_all(views)
    assert_close(h, wanted, rtol=0, atol=0)
    assert_close(teacher.project_all(h), heads, rtol=0, atol=0)
    assert_close(teacher.embed(views[1]), wanted[1])
    assert_close(teacher.project(h[0]), heads[0])
    assert not torch.allclose(net.eval().embed(views[0]), h[0], atol=0.1)


def test_the_average_comes_in_the_order_of_byol_which_is_what_moco_sees_before_the_next_forward(vector):
    case = vector("ema_order")
    net = student()
    teacher = Teacher(net, constant(case["inputs"]["m"]))
    found = []
    with torch.no_grad():
        for p in (*net.parameters(), *teacher.network.parameters()):
            p.fill_(1.0)
        for step, value in enumerate(case["inputs"]["student_before_each_step_and_final"][1:]):
            found.append(float(next(teacher.network.parameters()).flatten()[0]))
            for p in net.parameters():
                p.fill_(value)
            teacher.after_step(Clock(step + 1))
    final = float(next(teacher.network.parameters()).flatten()[0])
    assert found == pytest.approx(case["expected"]["teacher_after_forward_of_steps_0_1_2_moco_order"], rel=1e-6)
    assert [*found[1:], final] == pytest.approx(case["expected"]["teacher_after_steps_0_1_2_byol_dino_order"], rel=1e-6)


@pytest.mark.parametrize("momentum", [linear(0.9, 1.1), linear(-0.1, 1.0)])
def test_a_momentum_outside_0_and_1_is_refused(momentum):
    with pytest.raises(ValueError, match=r"^momentum: from "):
        Teacher(student(), momentum)
