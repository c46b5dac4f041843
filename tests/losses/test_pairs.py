"""Losses of pairs against loops over single rows, in float64, and against transformers."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from mmssl import losses
from tests.losses.cases import drawn

PAIRS = torch.tensor([True, True, False, True, True, True])
CONTENT = torch.tensor([1, 2, 1, 1, 3, 4])  # of rows 0, 2 and 3 the same
ALIKE = CONTENT[:, None] == CONTENT


def cosines(z1, z2):
    z1, z2 = z1 / z1.norm(dim=1, keepdim=True), z2 / z2.norm(dim=1, keepdim=True)
    return [[float(a @ b) for b in z2] for a in z1]


def choices(i, treat):
    """Positives and negatives of row i by the rules, in words: pairs only; the same content is neither, or a positive."""
    others = [j for j in range(6) if PAIRS[j] and j != i]
    same = [j for j in others if CONTENT[j] == CONTENT[i]]
    rest = [j for j in others if CONTENT[j] != CONTENT[i]]
    return {"leave_out": ([i], rest), "positive": ([i, *same], rest), "negative": ([i], others)}[treat]


def how(treat):
    return {"pairs": PAIRS, "alike": None if treat == "negative" else ALIKE, "positive": treat == "positive"}


@pytest.mark.parametrize("treat", ["leave_out", "positive", "negative"])
def test_clip_is_the_mean_of_a_loop_over_pairs_both_ways(treat):
    z1, z2, scale = drawn(6, 4), drawn(6, 4, seed=1), 7.0
    total, table = 0.0, cosines(z1, z2)
    for turned in (table, [*zip(*table)]):
        for i in (i for i in range(6) if PAIRS[i]):
            near, far = choices(i, treat)
            whole = math.log(sum(math.exp(scale * turned[i][j]) for j in (*near, *far)))
            total += sum(whole - scale * turned[i][j] for j in near) / len(near)
    found = losses.clip(z1, z2, scale, **how(treat))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(total / 10, rel=1e-12)


@pytest.mark.parametrize("treat", ["leave_out", "positive", "negative"])
def test_siglip_is_a_sum_of_choices_for_each_pair(treat):
    z1, z2, scale, bias = drawn(6, 4), drawn(6, 4, seed=1), 5.0, -2.0
    total, table = 0.0, cosines(z1, z2)
    for i in (i for i in range(6) if PAIRS[i]):
        near, far = choices(i, treat)
        total += sum(math.log1p(math.exp(-(scale * table[i][j] + bias))) for j in near)
        total += sum(math.log1p(math.exp(scale * table[i][j] + bias)) for j in far)
    assert float(losses.siglip(z1, z2, scale, bias, **how(treat))) == pytest.approx(total / 5, rel=1e-12)


def test_losses_are_those_of_transformers():
    z1, z2, scale, bias = drawn(6, 4), drawn(6, 4, seed=1), torch.tensor([9.0]).double(), torch.tensor([-3.0]).double()
    logits = torch.tensor(cosines(z2, z1), dtype=torch.float64) * scale  # per text, as theirs
    assert_close(losses.clip(z1, z2, scale), image_text_contrastive_loss(logits), rtol=1e-12, atol=0)
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    theirs = -(signs * (logits + bias)).sigmoid().log().sum(-1).mean()  # as in SiglipModel.forward
    assert_close(losses.siglip(z1, z2, scale, bias), theirs, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "loss", [lambda *z, **how: losses.clip(*z, 20.0, **how), lambda *z, **how: losses.siglip(*z, 9.0, -9.0, **how)]
)
def test_rows_that_are_no_pairs_have_no_influence_and_none_at_all_is_no_loss(loss):
    z1, z2 = drawn(6, 4).requires_grad_(), drawn(6, 4, seed=1).requires_grad_()
    value = loss(z1, z2, pairs=PAIRS)
    assert_close(value, loss(z1[PAIRS], z2[PAIRS]), rtol=1e-12, atol=0)
    for gradient in torch.autograd.grad(value, (z1, z2)):
        assert float(gradient[2].abs().max()) == 0
        assert float(gradient[PAIRS].abs().min()) > 0
    none = loss(z1, z2, pairs=torch.zeros(6, dtype=torch.bool))
    assert float(none.detach()) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in torch.autograd.grad(none, (z1, z2)))


def test_half_precision_is_computed_in_fp32_and_shapes_must_agree():
    z1, z2 = drawn(8, 4).bfloat16(), drawn(8, 4, seed=1).bfloat16()
    for loss in (losses.clip(z1, z2, torch.tensor([100.0])), losses.siglip(z1, z2, torch.tensor([100.0]), -10.0)):
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(losses.clip(z1.float(), z2.float(), 50.0), losses.clip(z1, z2, 50.0), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"z1 \(6, 4\), z2 \(5, 4\): must have one shape"):
        losses.clip(drawn(6, 4), drawn(5, 4), 1.0)
