import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.parts.quantizer import GumbelQuantizer, gumbel
from mmssl.schedules import Schedule
from mmssl.types import Clock
from tests.losses.cases import MASKED


def build(width=6, dim=8, groups=2, entries=5):
    torch.manual_seed(0)
    return GumbelQuantizer(width, dim, groups, entries).double()


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_in_evaluation_the_most_likely_entries_are_taken():
    made, x = build().eval(), drawn(3, 4, 6)
    found = made(x, (), 2.0)
    logits = (x @ made.logits.weight.T + made.logits.bias).unflatten(-1, (2, 5))
    for b in range(3):
        for t in range(4):
            best = [int(logits[b, t, g].argmax()) for g in range(2)]
            assert torch.equal(found.vectors[b, t], torch.cat([made.entries[g, best[g]] for g in range(2)]))
            assert int(found.ids[b, t]) == best[0] + 5 * best[1]
            assert found.chosen[b, t].nonzero().tolist() == [[0, best[0]], [1, best[1]]]
    assert_close(found.probabilities, logits.softmax(-1))


def test_in_training_the_choice_is_one_hot_and_its_gradient_that_of_the_softmax():
    made, x, keys = build(), drawn(3, 4, 6), (7, 8, 9)
    found = made(x, keys, 0.7)
    logits = (x @ made.logits.weight.T + made.logits.bias).unflatten(-1, (2, 5)).detach().requires_grad_()
    soft = ((logits + gumbel(keys, logits)) / 0.7).softmax(-1)
    assert torch.equal(found.chosen, F.one_hot(soft.argmax(-1), 5).double())
    taken = torch.stack([made.entries[g][soft[:, :, g].argmax(-1)] for g in range(2)], 2).flatten(2)
    assert torch.equal(found.vectors, taken)
    (weight,) = torch.autograd.grad(found.vectors.square().sum(), made.logits.weight)
    slope = torch.einsum("btgd,gvd->btgv", 2 * taken.unflatten(-1, (2, 4)), made.entries).detach()
    (wanted,) = torch.autograd.grad((soft * slope).sum(), logits)
    assert bool((wanted != 0).all())
    assert_close(weight, torch.einsum("btk,btw->kw", wanted.flatten(2), x), rtol=1e-9, atol=1e-12)


def test_entries_are_drawn_by_their_probability():
    like = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(1, 40_000, 1, 4)
    counts = (like + gumbel((3,), like)).argmax(-1).flatten().bincount().double() / 40_000
    assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), rtol=0, atol=0.01)
    noise = gumbel((4,), torch.empty(1, 100_000))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.015)
    assert bool(noise.isfinite().all())


def test_the_noise_of_a_sample_depends_on_its_key_alone():
    like = torch.empty(6, 4, 2, 5)  # two rows of each of three samples
    noise = gumbel((7, 8, 9), like)
    assert torch.equal(noise[2:4], gumbel((8,), like[:2]))
    assert not torch.equal(noise[0], noise[1])


def test_it_begins_as_published():
    made = GumbelQuantizer(512, 256)
    assert made.logits.weight.shape == (640, 512)
    assert made.logits.weight.std().item() == pytest.approx(1.0, abs=0.01)
    assert not bool(made.logits.bias.any())
    assert made.entries.shape == (2, 320, 128)
    assert (made.entries.min().item(), made.entries.max().item()) == pytest.approx((0.0, 1.0), abs=1e-3)


def test_the_temperature_falls_as_published():
    fall = Schedule(2.0, 0.5, "exponential", steps=277_258)
    case = MASKED["gumbel_temperature"]["tau"]
    assert {int(n): fall(Clock(int(n))) for n in case} == pytest.approx({int(n): t for n, t in case.items()}, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": 3}, "groups: 3, must be at least 1 and divide dim=8"),
        ({"groups": 0}, "groups: 0, must be at least 1"),
        ({"entries": 1}, "entries: 1 in 2 groups, must be at least 2"),
        ({"groups": 8, "entries": 320}, "entries: 320 in 8 groups, .*fewer than 2\\^63 combinations"),
    ],
)
def test_codebooks_that_cannot_be_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        build(**options)
