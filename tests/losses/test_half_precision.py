"""Where half precision breaks, and that nothing of ours breaks there."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmssl.losses import barlow_twins, nt_xent, sinkhorn
from mmssl.losses.numerics import unit_rows
from mmssl.parts import Network, Teacher
from mmssl.schedules import constant
from mmssl.types import Clock
from tests.losses.cases import drawn, expected

LIMITS = expected("half_precision_limits")


class Scalar(nn.Module):
    """An encoder of a single weight."""

    def __init__(self, value):
        super().__init__()
        self.features, self.positions = nn.Identity(), nn.Identity()
        self.weight = nn.Parameter(torch.tensor([value]))


@pytest.mark.parametrize(("short", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_teacher_moves_where_its_average_in_half_precision_stands_still(short, dtype):
    case = LIMITS[f"ema_step_lost_in_{short}"]
    start, end = (torch.tensor(case[name], dtype=dtype) for name in ("teacher", "student"))
    assert float(torch.lerp(start, end, 1 - case["m"])) == case[f"{short}_result"]
    student = Network(Scalar(case["teacher"]))
    teacher = Teacher(student, constant(case["m"]))
    student.encoder.weight.data.fill_(case["student"])
    teacher.to(dtype)
    teacher.after_step(Clock(1))
    assert float(teacher.network.encoder.weight) == pytest.approx(case["exact"], abs=1e-7)


def test_sinkhorn_takes_scores_that_overflow_when_exponentiated():
    limit = LIMITS["sinkhorn_eps0.05_largest_safe_score_fp16"]
    assert limit == pytest.approx(0.05 * math.log(LIMITS["fp16_max"]))
    scores = torch.tensor([[1.0, 0.2], [0.9, 0.8], [0.1, 1.0]])
    assert torch.exp(scores.half() / 0.05).isinf().any()
    for eps in (0.05, LIMITS["sinkhorn_smallest_safe_eps_fp32_for_score1"] / 2):
        assert_close(sinkhorn(scores, eps).double(), sinkhorn(scores.double(), eps), rtol=1e-4, atol=1e-6)
    big = LIMITS["dinov2_style_logit_limit_fp32_at_tau0.04"] + 1
    assert bool(sinkhorn(torch.tensor([[big, 0.0], [0.0, big]]), 0.04).isfinite().all())


def test_small_correlations_do_not_flush_to_zero_under_autocast():
    tiny = LIMITS["fp16_offdiag_correlation_whose_square_flushes_to_zero_below"] * 0.9
    assert float(torch.tensor(tiny).half() ** 2) == 0
    z = drawn(64, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = barlow_twins(z, z + 0.01)
    assert_close(found.double(), barlow_twins(z.double(), z.double() + 0.01), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_zeros_in_half_precision_give_no_nan(dtype):
    assert float(torch.tensor(1e-12).half()) == LIMITS["eps_1e-12_in_fp16"]
    z = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    assert not unit_rows(z).isnan().any()
    nt_xent(z, z.detach() + 1).backward()
    assert not z.grad.isnan().any()


def test_spacings_are_those_of_the_machine():
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert LIMITS[f"{name}_relative_spacing"] == torch.finfo(dtype).eps
    assert LIMITS["fp16_max"] == torch.finfo(torch.float16).max
    assert torch.tensor(-1e9).half() == -torch.inf
