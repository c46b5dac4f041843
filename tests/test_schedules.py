import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mmssl.config import OptimOptions, Recipe
from mmssl.errors import RecipeError
from mmssl.parts import Network, Teacher
from mmssl.schedules import Schedule, constant, cosine, linear
from mmssl.training.optim import schedule
from mmssl.types import Clock
from tests.losses.cases import MASKED

CASES = json.loads((Path(__file__).parent / "vectors" / "joint-embedding.json").read_text())["cases"]


def at(schedule, step, steps=375_300):
    return schedule(Clock(step, steps))


def close(value, wanted, within):
    return abs(value - wanted) <= within


@pytest.mark.parametrize(
    ("step", "tau"), [(0, 0.9998), (1, 0.9998000019), (50_000, 0.999895), (100_000, 0.99999), (375_300, 0.99999)]
)
def test_momentum_of_image_base(step, tau):
    momentum = Recipe.load("vision/data2vec2-base").method.momentum
    assert close(at(momentum, step), tau, 1e-13)
    assert close(at(linear(0.9998, 0.99999, steps=100_000), step), tau, 1e-13)


@pytest.mark.parametrize(
    ("name", "taus"),
    [
        ("vision/data2vec2-large", {0: 0.9998, 75_000: 0.999895, 150_000: 0.99999}),
        ("speech/data2vec2-base", {0: 0.999, 1: 0.9990000132, 37_500: 0.999495, 75_000: 0.99999, 400_000: 0.99999}),
        ("speech/data2vec2-large", {0: 0.9997, 150_000: 0.99985, 300_000: 1.0, 600_000: 1.0}),
        ("text/data2vec2-base", {0: 0.9999, 50_000: 0.999945, 100_000: 0.99999, 1_000_000: 0.99999}),
        ("text/data2vec2-large", {0: 0.9999, 100_000: 0.99999}),
        ("speech/data2vec1-base", {0: 0.999, 15_000: 0.99945, 30_000: 0.9999, 400_000: 0.9999}),
        ("text/data2vec1-base", {0: 0.999, 150_000: 0.99945, 300_000: 0.9999}),
    ],
)
def test_momenta_are_the_authors(name, taus):
    recipe = Recipe.load(name)
    for step, tau in taus.items():
        assert close(at(recipe.method.momentum, step, recipe.train.steps), tau, 1e-13), step
    if name == "speech/data2vec2-large":
        assert recipe.method.momentum(Clock(300_000, 600_000)) == 1  # exactly: the teacher stands still


@pytest.mark.parametrize(
    ("name", "steps", "rates"),
    [
        ("speech/data2vec2-base", 400_000, {0: 0, 4_000: 0.000375, 8_000: 0.00075, 204_000: 0.000375}),
        ("speech/data2vec2-large", 600_000, {5_000: 2e-4, 10_000: 4e-4, 305_000: 2e-4}),
        ("text/data2vec2-base", 1_000_000, {2_000: 1e-4, 4_000: 2e-4, 502_000: 1e-4}),
        ("text/data2vec2-large", 600_000, {4_000: 1e-4, 302_000: 5e-5}),
        ("vision/data2vec2-large", 375_300, {50_040: 4e-4, 212_670: 2e-4}),
        # three stages of 3, 90 and 7 %, then a hundredth
        ("speech/data2vec1-base", 400_000, {6_000: 2.5e-4, 12_000: 5e-4, 372_000: 5e-4, 386_000: 5e-5}),
    ],
)
def test_learning_rates_are_the_authors(name, steps, rates):
    recipe = Recipe.load(name)
    assert recipe.train.steps == steps
    for step, rate in rates.items():
        assert close(at(schedule(recipe.optim), step, steps), rate, 1e-12), step


def test_learning_rate_of_image_base():
    recipe = Recipe.load("vision/data2vec2-base")
    assert recipe.train.steps == 375_300
    rate = schedule(recipe.optim)
    assert at(rate, 0) == 0
    assert close(at(rate, 25_020), 0.0005, 1e-15)
    assert close(at(rate, 50_040), 0.001, 1e-15)
    assert close(at(rate, 212_670), 0.0005, 1e-12)
    assert 0 < at(rate, 375_299) < 1e-13
    assert at(rate, 375_300) == at(rate, 999_999) == 0  # clamped: the authors' cosine would rise again


def test_learning_rate_is_a_half_cosine_over_what_warmup_leaves():
    rate = schedule(OptimOptions(lr=2.0, warmup=4))
    for step in range(4, 20):
        assert close(at(rate, step, 20), 1 + math.cos(math.pi * (step - 4) / 16), 1e-12)
    assert [at(rate, step, 20) for step in range(4)] == [0, 0.5, 1, 1.5]


def test_without_steps_of_its_own_a_schedule_ends_with_the_run():
    assert [at(linear(1, 0), step, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [at(linear(1, 0, steps=2), step, 4) for step in range(5)] == [1, 0.5, 0, 0, 0]
    assert close(at(cosine(3, 1), 1, 4), 2 + math.cos(math.pi / 4), 1e-12)


def test_a_constant_is_constant_and_a_warmup_longer_than_the_run_does_not_divide_by_zero():
    assert {at(constant(0.3), step, 10) for step in (0, 5, 10, 11)} == {0.3}
    assert [at(linear(1, 0, warmup=10), step, 4) for step in (0, 2, 4)] == [0, 0.2, 0.4]


def test_three_stages_rise_stay_and_fall_by_equal_factors():
    rate = schedule(OptimOptions(lr=2.0, warmup=10, hold=20, fall="exponential"))
    assert [at(rate, step, 50) for step in (0, 5, 10, 17, 30)] == [0, 1, 2, 2, 2]
    found = [at(rate, step, 50) for step in range(30, 51)]
    assert all(close(b / a, 0.01 ** (1 / 20), 1e-12) for a, b in itertools.pairwise(found))
    assert close(found[-1], 0.02, 1e-15)


def test_a_cosine_waits_for_its_plateau_to_end():
    rate = schedule(OptimOptions(lr=2.0, warmup=2, hold=3))
    assert [at(rate, step, 9) for step in range(6)] == [0, 1, 2, 2, 2, 2]
    assert close(at(rate, 7, 9), 1, 1e-12)


def test_an_exponential_to_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        Schedule(1.0, 0.0, "exponential")


# The joint-embedding family --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0.99, 0.996, 0.9995])
def test_momenta_of_teachers_rise_by_half_a_cosine_to_exactly_1(base):
    wanted = CASES["ema_schedules"]["expected"][f"base={base}"]
    momentum = cosine(base, 1.0)
    for step, value in wanted.items():
        assert close(at(momentum, int(step), 1000), value, 1e-12), step
    assert at(momentum, 1000, 1000) == at(momentum, 1001, 1000) == 1


RATES = {
    "simclr_byol_step_over_warmup": {},
    "barlow_vicreg_end_factor_0.001": {"lr_end": 0.0048},
    "swav_dino_linspace_start0_final0": {"warmup_from": 0.0},
    "swav_recipe_start0.3_final0.0048": {"warmup_from": 0.3, "lr_end": 0.0048},
}


@pytest.mark.parametrize("name", RATES)
def test_learning_rates_of_the_family_are_the_authors(name):
    case = CASES["lr_schedules"]
    rate = schedule(OptimOptions(lr=4.8, warmup=100, **RATES[name]))
    for step, value in zip(case["inputs"]["steps"], case["expected"][name]):
        assert close(at(rate, step, 1000), value, 1e-9 * value + 1e-15), step


def test_weight_decay_and_temperature_of_dino_are_the_authors():
    wanted = CASES["dino_schedules"]["expected"]
    for step, value in wanted["weight_decay"].items():
        assert close(at(cosine(0.04, 0.4), int(step), 1000), value, 1e-12), step
    forms = (
        linear(0.04, 0.07, steps=29, by="epoch"),
        Schedule(0.07, 0.07, warmup=30, warmup_from=0.04, linspace=True, by="epoch"),
    )
    for temperature in forms:
        for epoch, value in wanted["teacher_temp_by_epoch"].items():
            assert close(temperature(Clock(123_456, 200_000, int(epoch))), value, 1e-12), epoch


@pytest.mark.parametrize(
    ("name", "scale", "lr", "batch"),
    [
        ("simclr_linear_0.3_B4096", "linear", 0.3, 4096),
        ("simclr_sqrt_0.075_B4096", "sqrt", 0.075 * 16, 4096),
        ("simclr_linear_0.3_B256", "linear", 0.3, 256),
        ("simclr_sqrt_0.075_B256", "sqrt", 0.075 * 16, 256),
        ("byol_0.2_B4096", "linear", 0.2, 4096),
        ("barlow_weights_0.2_B2048", "linear", 0.2, 2048),
        ("barlow_biases_0.0048_B2048", "linear", 0.0048, 2048),
        ("dino_5e-4_B1024", "linear", 5e-4, 1024),
        ("simsiam_0.05_B512", "linear", 0.05, 512),
        ("mocov3_r50_0.3_B4096", "linear", 0.3, 4096),
        ("mocov3_vit_1.5e-4_B4096", "linear", 1.5e-4, 4096),
    ],
)
def test_rates_scale_with_the_global_batch(name, scale, lr, batch):
    assert close(at(schedule(OptimOptions(lr=lr, scale=scale), batch), 0), CASES["lr_scaling"]["expected"][name], 1e-12)
    assert at(schedule(OptimOptions(lr=lr), batch), 0) == lr


def test_what_a_rate_needs_to_know_must_be_given():
    with pytest.raises(ValueError, match=r"^optim\.scale: linear needs the global batch"):
        schedule(OptimOptions(scale="linear"))
    with pytest.raises(ValueError, match=r"^steps: missing"):
        schedule(OptimOptions(by="epoch"))
    with pytest.raises(RecipeError, match=r"^optim\.lr_end: 0\.2 lies above the peak of 0\.1"):
        schedule(OptimOptions(lr=0.4, scale="linear", lr_end=0.2), 64)


def test_by_the_epoch_a_rate_is_constant_in_each():
    rate = schedule(OptimOptions(lr=0.03, by="epoch"), epochs=200)
    for step in range(0, 2000, 7):  # ten updates an epoch, as MoCo v2 and SimSiam
        wanted = 0.03 * 0.5 * (1 + math.cos(math.pi * (step // 10) / 200))
        assert close(rate(Clock(step, 2000, step // 10)), wanted, 1e-15), step
    warm = schedule(OptimOptions(lr=1.0, by="epoch", warmup=2, hold=1), epochs=4.5)  # the last epoch is cut short
    assert [warm(Clock(10 * e + 3, 45, e)) for e in range(5)] == pytest.approx([0, 0.5, 1, 1, 0.5])


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_steps_fall_to_a_tenth_at_shares_of_the_run(by):
    options = OptimOptions(lr=0.03, fall="steps", fall_at=[0.6, 0.8], by=by)
    rate = schedule(options, epochs=200)  # MoCo v1: at epochs 120 and 160
    for epoch, value in {0: 0.03, 119: 0.03, 120: 0.003, 159: 0.003, 160: 0.0003, 199: 0.0003}.items():
        for step in (7 * epoch, 7 * epoch + 6):
            assert close(rate(Clock(step, 1400, epoch)), value, 1e-15), (epoch, step)


def test_a_rate_that_does_not_fall_stays():
    rate = schedule(OptimOptions(lr=0.5, fall="none", warmup=5))
    assert [at(rate, step, 20) for step in (0, 4, 5, 19, 20)] == pytest.approx([0, 0.4, 0.5, 0.5, 0.5])


def test_an_exponential_ends_where_it_is_told():
    rate = schedule(OptimOptions(lr=1.0, fall="exponential", lr_end=1e-4))
    assert [at(rate, step, 4) for step in (0, 1, 2, 4)] == pytest.approx([1, 0.1, 0.01, 1e-4])


def test_a_linspace_of_one_value_is_its_first():
    assert [at(Schedule(1.0, 1.0, warmup=1, warmup_from=0.2, linspace=True), step) for step in (0, 1)] == [0.2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "steps"}, "^at: "),
        ({"shape": "steps", "at": (0.5, 1.0)}, "^at: "),
        ({"shape": "cosine", "at": (0.5,)}, "^at: "),
        ({"shape": "steps", "at": (0.5,), "end": 0.0}, "above 0"),
        ({"by": "epoch"}, "^steps: missing"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**({"start": 1.0, "end": 0.5} | options))


def test_a_teacher_moves_in_the_order_of_its_paper():
    case = CASES["ema_order"]
    network = Network(encoder=nn.Linear(1, 1, bias=False).double())
    weight, values = network.encoder.weight, case["inputs"]["student_before_each_step_and_final"]
    torch.nn.init.constant_(weight, values[0])
    teacher = Teacher(network, constant(case["inputs"]["m"]))
    before, after = [], []
    for step, value in enumerate(values[1:]):
        before.append(float(teacher.encoder.weight))  # MoCo's update before forward k is the one after step k - 1
        torch.nn.init.constant_(weight, value)
        teacher.after_step(Clock(step + 1, 3))
        after.append(float(teacher.encoder.weight))
    assert before == pytest.approx(case["expected"]["teacher_after_forward_of_steps_0_1_2_moco_order"], abs=1e-12)
    assert after == pytest.approx(case["expected"]["teacher_after_steps_0_1_2_byol_dino_order"], abs=1e-12)


def test_rates_of_mae_and_wav2vec2_and_the_weight_decay_of_dino_are_the_authors():
    case, recipe = MASKED["mae_lr_schedule"], Recipe.load("vision/mae-base")
    rate = schedule(recipe.optim, recipe.train.global_batch)
    assert (recipe.optim.lr, recipe.train.global_batch, recipe.train.epochs) == (case["blr"], case["batch"], case["epochs"])
    updates = recipe.optim.warmup // case["warmup_epochs"]  # of an epoch
    for epoch, wanted in case["values"].items():
        assert rate(Clock(int(epoch) * updates, case["epochs"] * updates)) == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    case, recipe = MASKED["wav2vec2_lr_schedule"], Recipe.load("speech/wav2vec2-base")
    assert (recipe.optim.lr, recipe.optim.warmup, recipe.train.steps) == (case["peak"], case["warmup"], case["total"])
    for step, wanted in case["values"].items():
        found = schedule(recipe.optim)(Clock(int(step), recipe.train.steps))
        assert found == pytest.approx(wanted, rel=1e-9, abs=case["end"])
    case = MASKED["weight_decay_cosine"]
    for step, wanted in case["values"].items():
        assert cosine(case["start"], case["end"])(Clock(int(step), case["N"])) == pytest.approx(wanted, rel=1e-12)


LINEAR = ["text/mlm-base", "text/mlm-large", "text/mlm-bert-base", "text/mlm-bert-large"]
LINEAR += [f"text/electra-{size}" for size in ("small", "base", "large")]
LINEAR += [f"speech/{name}-{size}" for name in ("wav2vec2", "hubert") for size in ("base", "large")]
LINEAR += ["spectrogram/tera-base", "spectrogram/tera-large"]


@pytest.mark.parametrize("name", LINEAR)
def test_a_rate_that_falls_linearly_in_the_paper_does_so_here(name):
    recipe = Recipe.load(name)
    optim, steps = recipe.optim, 1_000_000
    rate = schedule(optim, recipe.train.global_batch)
    half, quarter = ((optim.warmup + share * (steps - optim.warmup)) for share in (0.5, 0.75))
    assert [rate(Clock(round(at), steps)) for at in (optim.warmup, half, quarter, steps)] == pytest.approx(
        [optim.lr, optim.lr / 2, optim.lr / 4, 0], rel=1e-5
    )


def test_a_linear_fall_ends_where_it_is_told():
    rate = schedule(OptimOptions(lr=1.0, warmup=10, hold=10, fall="linear", lr_end=0.2))
    assert [rate(Clock(step, 120)) for step in (5, 10, 20, 70, 120)] == pytest.approx([0.5, 1, 1, 0.6, 0.2])
