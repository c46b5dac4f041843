import math

import pytest

from mmssl.config import OptimOptions, Recipe
from mmssl.schedules import constant, cosine, linear
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
