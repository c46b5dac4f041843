import math

import pytest
import torch
from torch.testing import assert_close

from mmssl.losses import assignment_entropy, dino, predict_others, teacher_distribution
from tests.losses.cases import drawn, expected, gradients, inputs

EXACT = {"rtol": 1e-9, "atol": 0}


def crops():
    teacher, student, center = inputs("dino", "teacher_logits", "student_logits", "center")
    return student.view(3, 2, 4).unbind(), teacher.view(2, 2, 4).unbind(), center


def test_dino_has_the_reference_values():
    (student, teacher, center), wanted = crops(), expected("dino")
    assert_close(dino(student, teacher, center).item(), wanted["loss"], **EXACT)
    updated = torch.tensor(wanted["center_after"], dtype=torch.float64)
    assert_close(dino(student, teacher, updated).item(), wanted["loss_if_center_were_updated_first"], **EXACT)
    p = teacher_distribution(torch.cat(teacher), center, 0.04)
    assert_close(p, torch.tensor(wanted["teacher_probs"], dtype=torch.float64), **EXACT)
    entropy = assignment_entropy(p).mean.item()
    assert_close(entropy, wanted["mean_teacher_entropy"], **EXACT)
    assert_close(wanted["loss"] - entropy, wanted["mean_KL_teacher_student"], **EXACT)


def test_dino_matches_a_slow_loop_over_pairs():
    student, teacher, center = drawn(5, 3, 6).unbind(), drawn(2, 3, 6, seed=1).unbind(), drawn(6, seed=2)
    terms = []
    for i in range(2):
        for v in range(5):
            if v != i:
                for b in range(3):
                    p = [math.exp(x) for x in ((teacher[i][b] - center) / 0.07).tolist()]
                    s = [math.exp(x) for x in (student[v][b] / 0.2).tolist()]
                    terms.append(-sum(a / sum(p) * math.log(c / sum(s)) for a, c in zip(p, s)))
    assert len(terms) == 8 * 3
    assert_close(dino(student, teacher, center, 0.2, 0.07).item(), sum(terms) / len(terms), **EXACT)


@pytest.mark.parametrize(("crops", "name"), [(10, "dino_2_global_8_local"), (12, "dino_2_global_10_local")])
def test_a_crop_does_not_predict_itself(crops, name):
    """Crop v's prediction costs v + 1 nats, so that the mean tells which pairs were counted."""
    logits = [torch.tensor([[0.0, math.log(math.exp(v + 1) - 1)]], dtype=torch.float64) for v in range(crops)]
    target = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    pairs = [(i, v) for i in range(2) for v in range(crops) if v != i]
    assert len(pairs) == expected("term_counts")[name]
    wanted = sum(v + 1 for _, v in pairs) / len(pairs)
    assert_close(predict_others({0: target, 1: target}, logits).item(), wanted, **EXACT)


def test_no_gradient_reaches_the_teacher():
    student, teacher, center = ([x.clone().requires_grad_() for x in given] for given in crops())
    loss = dino(student, teacher, center[0])
    assert torch.autograd.grad(loss, [*teacher, *center], allow_unused=True) == (None,) * len([*teacher, *center])
    assert all(g.abs().max() > 0 for g in gradients(dino(student, teacher, center[0]), *student))


def test_uniform_collapse_costs_the_logarithm_of_the_outputs():
    zeros = [torch.zeros(2, 65536)] * 3
    found = dino(zeros, zeros[:2], torch.zeros(65536)).item()
    assert_close(found, expected("collapse_loss_levels")["dino_K=65536_uniform"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_computed_in_fp32(dtype):
    student, teacher, center = drawn(3, 8, 32).to(dtype), drawn(2, 8, 32, seed=1).to(dtype), drawn(32).float()
    wanted = dino(student.double(), teacher.double(), center.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = dino(student.unbind(), teacher.unbind(), center)
    assert found.dtype == torch.float32
    assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_bad_input_is_refused():
    (student, teacher, center), none = crops(), drawn(1, 2, 4)
    with pytest.raises(ValueError, match=r"^views: 1, there must be another"):
        dino(none, none, center)
    with pytest.raises(ValueError, match=r"^views: the teacher sees 2 crops, the student only 1"):
        dino(student[:1], teacher, center)
    with pytest.raises(ValueError, match=r"^teacher_temperature: 0, must be above 0"):
        dino(student, teacher, center, 0.1, 0)
    with pytest.raises(ValueError, match=r"^views: 0, "):
        predict_others({0: center}, [])
