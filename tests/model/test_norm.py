import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmssl.distributed import world
from mmssl.model.norm import BatchNorm, Groups, by_batch, grouped, split_groups, synchronised
from tests.ranks import on_two_ranks

SHAPES = [(6, 5), (6, 5, 7), (6, 5, 3, 4)]
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3


def filled(affine=True, seed=1):
    """Weights, offsets and running statistics that are no defaults, in float64."""
    norm = BatchNorm(5, affine, eps=1e-3, momentum=0.3).double()
    with torch.no_grad():
        for i, tensor in enumerate(t for t in norm.state_dict().values() if t.is_floating_point()):
            tensor.copy_(draw(5, seed=seed + i).abs())
    return norm


def results(norm, x, slope):
    """Output, gradient of the input and of each parameter, buffers, of two forwards in training."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * slope + y.square() * slope.sin()).sum().backward()
    norm(x.detach() ** 2)
    state = {name: t.detach().clone() for name, t in norm.named_buffers()}
    return y.detach(), x.grad, [p.grad for p in norm.parameters()], state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, "scale", False])
def test_it_is_torchs_batch_norm_on_one_process(shape, affine):
    x, slope, ours = draw(*shape), draw(*shape, seed=9), filled(affine)
    theirs = TORCH[len(shape)](5, eps=1e-3, momentum=0.3, affine=bool(affine)).double()
    theirs.load_state_dict(ours.state_dict(), strict=affine != "scale")
    if affine == "scale":
        theirs.bias.requires_grad_(False).zero_()
    found, wanted = results(ours, x, slope), results(theirs, x, slope)
    wanted = (*wanted[:2], [p.grad for p in theirs.parameters() if p.grad is not None], wanted[3])
    assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_path_over_ranks_with_one_group_is_torchs_too(shape):
    x, slope, ours, theirs = draw(*shape), draw(*shape, seed=9), filled(), filled()
    with grouped(ours, Groups(torch.zeros(6, dtype=torch.int64), 1)):
        found = results(ours, x, slope)
    assert_close(found, results(theirs, x, slope), rtol=1e-8, atol=1e-10)


def test_each_group_is_normalised_by_itself():
    x, norm, groups = draw(6, 5, 7), filled(), Groups(torch.tensor([1, 0, 0, 1, 1, 0]), 2)
    before = norm.running_var.clone()
    with grouped(nn.Sequential(norm), groups):
        found = norm(x)
    for number in range(2):
        rows = x[groups.index == number]
        centred = rows - rows.mean((0, 2), keepdim=True)
        wanted = centred / (centred.square().mean((0, 2), keepdim=True) + 1e-3).sqrt()
        wanted = wanted * norm.weight[:, None] + norm.bias[:, None]
        assert_close(found[groups.index == number], wanted)
    variances = torch.stack([x[groups.index == n].transpose(0, 1).flatten(1).var(1) for n in range(2)])
    assert_close(norm.running_var, 0.7 * before + 0.3 * variances.mean(0))
    assert norm.groups is None


def test_groups_of_another_batch_are_refused():
    with grouped(norm := filled(), Groups(torch.tensor([0, 0, 1, 1]), 2)), pytest.raises(ValueError, match=r"^groups: of 4"):
        norm(draw(6, 5))


def test_neighbours_share_a_group_and_with_a_key_others_do():
    assert split_groups(6, 3).index.tolist() == [0, 0, 1, 1, 2, 2]
    shuffled = [split_groups(12, 3, "shuffle", step).index for step in range(3)]
    for index in shuffled:
        assert index.bincount().tolist() == [4, 4, 4]
        assert index.tolist() != sorted(index.tolist())
    assert not torch.equal(shuffled[0], shuffled[1])
    assert torch.equal(shuffled[0], split_groups(12, 3, "shuffle", 0).index)


@pytest.mark.parametrize("count", [0, 4, 6])
def test_groups_that_are_unequal_or_of_one_sample_are_refused(count):
    with pytest.raises(ValueError, match=rf"^groups: {count}, must divide the 6 samples"):
        split_groups(6, count)


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1), (1, 5, 1, 1)])
def test_one_value_per_channel_is_refused(shape):
    with pytest.raises(ValueError, match=r"^train\.global_batch: "):
        BatchNorm(5)(torch.zeros(shape))
    assert BatchNorm(5).eval()(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("groups", [None, Groups(torch.tensor([0, 0, 0, 1, 1, 1]), 2)])
def test_a_batch_that_is_not_finite_leaves_running_statistics_alone(groups):
    norm, x = filled(), draw(6, 5)
    x[2, 1], x[3, 4] = torch.nan, torch.inf
    before = norm.running_mean.clone(), norm.running_var.clone()
    with grouped(norm, groups):
        norm(x)
    for old, new in zip(before, (norm.running_mean, norm.running_var)):
        assert torch.equal(old[[1, 4]], new[[1, 4]])
        assert (old[[0, 2, 3]] != new[[0, 2, 3]]).all()


@pytest.mark.parametrize("groups", [None, Groups(torch.zeros(64, dtype=torch.int64), 1)])
def test_statistics_of_bfloat16_are_fp32(groups):
    x = (draw(64, 5) + 200).bfloat16()
    norm = BatchNorm(5)
    with grouped(norm, groups), torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    wanted = (x.double() - x.double().mean(0)) / (x.double().var(0, correction=0) + 1e-5).sqrt()
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)
    assert_close(norm.running_mean, (0.1 * x.double().mean(0)).float(), rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_0_costs_no_precision():
    x = (draw(64, 5) + 3000).float()
    with grouped(norm := BatchNorm(5), Groups(torch.zeros(64, dtype=torch.int64), 1)):
        y = norm(x)
    assert_close(y.double(), (x.double() - x.double().mean(0)) / x.double().std(0, correction=0), rtol=1e-3, atol=1e-3)


def test_a_backbone_keeps_its_weights_names_and_results():
    from transformers import ResNetConfig, ResNetModel  # here: the other processes of the last test need not load it

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ResNetModel(config)
    x, before = draw(3, 3, 16, 16).float(), {name: t.clone() for name, t in net.state_dict().items()}
    owned, wanted = dict(net.named_parameters()), net.train()(x).last_hidden_state
    state = {name: t.clone() for name, t in net.state_dict().items()}
    net.load_state_dict(before)
    net = synchronised(net)
    assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert all(owned[name] is parameter for name, parameter in net.named_parameters())
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert_close(net(x).last_hidden_state, wanted)
    assert_close(dict(net.state_dict()), state)
    assert isinstance(synchronised(nn.BatchNorm1d(3).eval()), BatchNorm)
    assert not synchronised(nn.BatchNorm1d(3).eval()).training


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_what_cannot_be_synchronised_is_refused(options):
    with pytest.raises(ValueError, match=r"^model: BatchNorm1d"):
        synchronised(nn.Sequential(nn.BatchNorm1d(3, **options)))


def shards(rank):
    """For each shape, on this rank: what the mean over ranks of a loss over own rows gives, with and without groups."""
    found = []
    for shape in [(8, 5), (8, 5, 3), (8, 5, 2, 2)]:
        for key in (None, (), ("shuffle", 1)):
            x, slope, norm = draw(*shape)[rank :: world()], draw(*shape, seed=9)[rank :: world()], filled()
            groups = None if key is None else split_groups(len(x), 2, *key)
            with grouped(norm, groups):
                found.append((*results(norm, x, slope), groups and groups.index))
    return found


@pytest.mark.distributed
def test_two_ranks_are_one_process(tmp_path):
    ranks = on_two_ranks(shards, folder=tmp_path)
    for one, first, second in zip(shards(0), *ranks):
        for number in (0, 1):
            together = torch.stack([first[number], second[number]], 1).flatten(0, 1)
            assert_close(together, one[number], rtol=1e-8, atol=1e-10)
        assert_close([a + b for a, b in zip(first[2], second[2])], one[2], rtol=1e-8, atol=1e-10)
        assert_close(first[3], second[3], rtol=0, atol=0)
        assert_close(first[3], one[3], rtol=1e-9, atol=1e-12)
        if one[4] is not None:
            assert torch.equal(torch.stack([first[4], second[4]], 1).flatten(), one[4])


def test_by_batch_uses_the_statistics_of_the_batch_and_leaves_the_running_ones():
    norm, x = BatchNorm(3).double().eval(), torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with by_batch(norm):
        found = norm(x + 5)
    assert_close(found, (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt(), rtol=1e-9, atol=1e-9)
    assert_close(dict(norm.state_dict()), before, rtol=0, atol=0)
    assert not norm.training
    assert norm.momentum == 0.1
