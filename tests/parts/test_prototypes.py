import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.parts import DinoHead, Prototypes
from mmssl.types import Clock


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scores_are_those_of_a_weight_normalised_layer(vector):
    case = vector("weight_norm_head")
    prototypes = Prototypes(2, 3).double()
    prototypes.weight.data.copy_(torch.tensor(case["inputs"]["v"]))
    scores = prototypes(F.normalize(torch.tensor(case["inputs"]["x"], dtype=torch.float64), dim=1))
    assert_close(scores, torch.tensor(case["expected"]["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_gradients_and_gain_are_those_of_torchs_weight_norm():
    prototypes, layer = Prototypes(4, 5, learned_gain=True).double(), torch.nn.Linear(4, 5, bias=False).double()
    torch.nn.utils.parametrizations.weight_norm(layer, dim=0)
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        v.copy_(3 * draw(5, 4))
        g.copy_(draw(5, 1, seed=1))
        prototypes.weight.copy_(v)
        prototypes.gain.copy_(g)
    z, slope = F.normalize(draw(6, 4, seed=2), dim=1), draw(6, 5, seed=3)
    for net in (prototypes, layer):
        (net(z) * slope).sum().backward()
    assert_close(prototypes(z), layer(z))
    assert_close(prototypes.weight.grad, v.grad)
    assert_close(prototypes.gain.grad, g.grad)


@pytest.mark.parametrize("learned_gain", [False, True])
def test_frozen_prototypes_have_gradients_of_zero_and_pass_on_those_of_their_input(learned_gain):
    prototypes = Prototypes(4, 5, freeze_epochs=2, learned_gain=learned_gain).double()
    z, grads = draw(6, 4).requires_grad_(), []
    assert [prototypes.is_frozen(Clock(epoch=epoch)) for epoch in range(4)] == [True, True, False, False]
    for epoch in (1, 2):
        prototypes.before_step(Clock(epoch=epoch))
        grads.append(torch.autograd.grad(prototypes(z).square().sum(), [z, *prototypes.parameters()]))
    assert torch.equal(grads[0][0], grads[1][0])
    for frozen, free in zip(grads[0][1:], grads[1][1:]):
        assert not frozen.any()
        assert free.any()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_frozen_prototypes_stay_as_they_are_under_momentum_and_decay(make):
    prototypes = Prototypes(4, 5, freeze_epochs=1)
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(prototypes.parameters(), lr=0.1, weight_decay=0.1, **options)
    before = prototypes.weight.detach().clone()
    for epoch in (0, 0, 0, 1):
        clock = Clock(epoch=epoch)
        prototypes.before_step(clock)
        frozen = prototypes.is_frozen(clock)
        optimizer.param_groups[0].update({"lr": 0.0, "weight_decay": 0.0} if frozen else {"lr": 0.1, "weight_decay": 0.1})
        optimizer.zero_grad()
        prototypes(draw(6, 4).float()).square().sum().backward()
        optimizer.step()
        assert torch.equal(prototypes.weight, before) == frozen


def test_directions_set_by_clustering_are_no_parameters_and_travel():
    prototypes, directions = Prototypes(3, 4, trained=False), 5 * draw(4, 3).float()
    assert not [*prototypes.parameters()]
    assert_close(prototypes.weight.norm(dim=1), torch.ones(4))
    prototypes.set(directions)
    z = draw(2, 3, seed=1).float()
    assert_close(prototypes(z), z @ (directions / directions.norm(dim=1, keepdim=True)).T)
    other = Prototypes(3, 4, trained=False)
    other.load_state_dict(prototypes.state_dict())
    assert torch.equal(other.weight, prototypes.weight)


def test_scores_are_fp32_under_autocast():
    prototypes, z = Prototypes(16, 8), F.normalize(draw(4, 16).float(), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = prototypes(z)
    assert found.dtype == torch.float32
    assert torch.equal(found, prototypes(z))


def test_one_prototype_is_refused():
    with pytest.raises(ValueError, match=r"^prototypes: 1"):
        Prototypes(3, 1)


def test_counts_are_those_of_the_papers(vector):
    counts = vector("head_parameter_counts")["expected"]
    with torch.device("meta"):
        swav, head = Prototypes(128, 3000), DinoHead(384, 65536)
        learned = DinoHead(384, 65536, normed_gain=False)

    def count(net):
        return sum(p.numel() for p in net.parameters())

    assert count(swav) == counts["swav_prototypes_3000"]
    assert count(head.mlp) == counts["dino_vit_s_mlp"]
    assert count(head.prototypes) == counts["dino_last_layer_v_65536"]
    assert count(learned) == count(head) + 65536


def test_a_dino_head_is_cosines_of_a_bottleneck():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DinoHead(30, 7, hidden=40, bottleneck=5)
    first, _, second, _, third = head.mlp
    for layer in (first, second, third):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()
    x = draw(4, 30).float()
    hidden = F.gelu(F.gelu(x @ first.weight.T) @ second.weight.T) @ third.weight.T
    wanted = F.cosine_similarity(hidden[:, None], head.prototypes.weight[None], dim=2)
    assert_close(head(x), wanted)
    assert head.prototypes.is_frozen(Clock(epoch=0))
    assert not head.prototypes.is_frozen(Clock(epoch=1))
