import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmssl.lars import Lars

CASE = json.loads((Path(__file__).parent / "vectors" / "joint-embedding.json").read_text())["cases"]["lars"]
GIVEN, WANTED = CASE["inputs"], CASE["expected"]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def run(start, gradients, rates, decay=GIVEN["weight_decay"], adapt=True, trust=GIVEN["eta"], variant="outside"):
    """The parameter after each update."""
    p = tensor(start).requires_grad_()
    optimizer = Lars([{"params": [p], "adapt": adapt}], 1.0, GIVEN["momentum"], decay, trust, variant)
    seen = []
    for gradient, rate in zip(gradients, rates):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = tensor(gradient)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch_ports_and_byol__lr_outside_buffer__norm_of_sum", {"variant": "outside"}),
        ("tf_simclr_classic__lr_inside_buffer__norm_of_sum", {"variant": "classic"}),
        ("paper__lr_inside_buffer__sum_of_norms", {"variant": "paper"}),
        ("tf_popular__trust_on_momentum", {"variant": "popular"}),
        ("apex_larc_noclip__lr_outside__sum_of_norms_plus_1e-8", {"variant": "larc"}),
        ("apex_larc_clip_eta_0.02", {"variant": "larc_clip", "trust": 0.02}),
        ("excluded_1d_torch_ports", {"variant": "outside", "adapt": False}),
        ("excluded_1d_tf_classic", {"variant": "classic", "adapt": False}),
        ("bias_under_apex_larc_is_not_excluded", {"variant": "larc"}),
    ],
)
def test_two_updates_are_those_of_the_authors(name, options):
    one_d = "1d" in name or "bias" in name
    start, gradients = (GIVEN["b"], GIVEN["b_grads"]) if one_d else (GIVEN["w"], GIVEN["grads"])
    for number, found in enumerate(run(start, gradients, GIVEN["lrs"], **options), 1):
        assert_close(found, tensor(WANTED[name][f"w_after_step{number}"]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["outside", "classic", "paper", "popular", "larc"])
def test_the_first_step_has_a_length_that_the_scale_of_the_loss_does_not_change(variant):
    start, gradient = GIVEN["w"], GIVEN["grads"][0]
    (once,) = run(start, [gradient], [4.8], variant=variant)
    (often,) = run(start, [[[1000 * x for x in row] for row in gradient]], [4.8], decay=100.0, variant=variant)
    assert_close(often, once, rtol=0, atol=1e-9)
    if variant in ("outside", "classic", "popular"):
        assert_close((once - tensor(start)).norm(), tensor(WANTED["first_step_displacement_norm_ports"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", ["outside", "classic", "paper", "popular", "larc", "larc_clip"])
def test_weights_that_are_zero_take_a_plain_step(variant):
    (found,) = run([[0.0, 0], [0, 0]], [GIVEN["grads"][0]], [4.8], variant=variant)
    assert_close(found, tensor(WANTED["all_zero_weight_torch_ports_step1_moves_by_lr_times_raw_grad"]), rtol=0, atol=1e-12)


def test_weights_without_gradient_decay_under_lars_and_rest_under_larc():
    start, nothing = GIVEN["w"], [[[0.0, 0], [0, 0]]]
    for variant in ("outside", "classic", "paper", "popular"):
        (found,) = run(start, nothing, [4.8], variant=variant)
        assert_close(found, tensor(start) * (1 - 4.8 * GIVEN["eta"]), rtol=1e-12, atol=0)  # q = eta / decay
        (still,) = run(start, nothing, [4.8], decay=0.0, variant=variant)
        assert torch.equal(still, tensor(start))
    for variant in ("larc", "larc_clip"):
        (found,) = run(start, nothing, [4.8], variant=variant)
        assert torch.equal(found, tensor(start))


def test_larc_with_clip_is_sgd_once_the_trust_ratio_exceeds_the_rate():
    p = tensor(GIVEN["w"]).requires_grad_()
    sgd = torch.optim.SGD([p], 1.0, GIVEN["momentum"], weight_decay=GIVEN["weight_decay"])
    for gradient, rate, found in zip(
        GIVEN["grads"], GIVEN["lrs"], run(GIVEN["w"], GIVEN["grads"], GIVEN["lrs"], trust=100.0, variant="larc_clip")
    ):
        sgd.param_groups[0]["lr"] = rate
        p.grad = tensor(gradient)
        sgd.step()
        assert_close(found, p.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["outside", "classic", "paper", "popular", "larc", "larc_clip"])
def test_a_rate_of_zero_moves_nothing_not_even_zeros(variant):
    for start in (GIVEN["w"], [[0.0, 0], [0, 0]]):
        (found,) = run(start, [GIVEN["grads"][0]], [0.0], variant=variant)
        assert torch.equal(found, tensor(start))


@pytest.mark.parametrize("variant", ["outside", "popular", "larc"])
def test_parameters_of_a_group_do_not_weigh_on_each_other(variant):
    def at_once(rows):
        params = [tensor(row).requires_grad_() for row in rows]
        optimizer = Lars(params, 2.0, 0.9, 0.1, 0.01, variant)
        for _ in range(3):
            for p in params:
                p.grad = p.detach().cos()
            optimizer.step()
        return [p.detach() for p in params]

    rows = [[[1.0, 2.0]], [0.5, -0.1, 0.2], [[0.0]]]
    assert_close(at_once(rows), [at_once([row])[0] for row in rows], rtol=1e-12, atol=0)


def test_norms_of_half_precision_weights_do_not_overflow():
    p = torch.full((1000,), 300.0, dtype=torch.float16, requires_grad=True)
    p.grad = torch.full((1000,), 250.0, dtype=torch.float16)  # squares and sums exceed 65504
    Lars([p], 10.0, trust=0.1).step()
    assert_close(p.detach(), torch.zeros(1000, dtype=torch.float16), rtol=0, atol=0.5)  # 10 * 0.1 * its whole length


def test_parameters_without_gradient_are_left_alone():
    p, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = Lars([p, other], 1.0, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(other, torch.ones(2))
    assert other not in optimizer.state
    assert not torch.equal(p, torch.ones(2))


def test_a_parameter_without_dimensions_is_refused_where_lengths_are_compared():
    scale = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match="0-dimensional"):
        Lars([scale], 1.0)
    optimizer = Lars([{"params": [scale], "adapt": False}], 0.5, weight_decay=0.1)
    scale.grad = torch.tensor(3.0)
    optimizer.step()
    assert float(scale.detach()) == 0.5  # 2 - 0.5 * 3, without decay


def test_it_continues_from_its_state():
    (_, wanted) = run(GIVEN["w"], GIVEN["grads"], GIVEN["lrs"])
    first = tensor(GIVEN["w"]).requires_grad_()
    optimizer = Lars([first], 4.8, 0.9, GIVEN["weight_decay"], GIVEN["eta"])
    first.grad = tensor(GIVEN["grads"][0])
    optimizer.step()
    second = first.detach().clone().requires_grad_()
    resumed = Lars([second], 1.0)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["lr"] = 2.4
    second.grad = tensor(GIVEN["grads"][1])
    resumed.step()
    assert torch.equal(second.detach(), wanted)
