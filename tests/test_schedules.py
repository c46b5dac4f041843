import itertools
import math

import pytest

from mmssl.config import OptimOptions, Recipe
from mmssl.schedules import Schedule, constant, cosine, linear
from mmssl.training.optim import schedule
from mmssl.types import Clock


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
