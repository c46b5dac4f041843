import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.losses import MSN, batch_contrast, codebook_diversity, dino, ibot_tokens, ijepa, in_batch_info_nce, msn, nt_xent
from mmssl.losses.clustering import sinkhorn
from mmssl.parts import Center
from mmssl.types import Clock, Mask
from tests.losses.cases import MASKED, drawn, gradients, tensor
from tests.ranks import on_two_ranks

EXACT = {"rtol": 1e-9, "atol": 0}


def cosines(*names):
    case = MASKED["msn_loss"]
    prototypes = F.normalize(tensor(case["prototypes"]), dim=1)
    return [F.normalize(tensor(case[name]), dim=1) @ prototypes.T for name in names]


# Vectors


def test_msn_has_the_reference_values():
    case = MASKED["msn_loss"]
    anchors, target = cosines("anchors_view_major", "targets")
    views = anchors.chunk(2)  # (2 views, B, K)
    plain, balanced = msn(views, target, iterations=0), msn(views, target)
    assert_close(plain.cross_entropy.item(), case["ce_no_sinkhorn"], **EXACT)
    assert_close(balanced.cross_entropy.item(), case["ce_sinkhorn"], **EXACT)
    for found in (plain, balanced):
        assert_close(found.me_max.item(), case["me_max"], **EXACT)
        assert_close(found.entropy.item(), case["entropy"], **EXACT)
    assert_close((balanced.cross_entropy + balanced.me_max).item(), case["total_memax1_sinkhorn"], **EXACT)


def test_ibot_has_the_reference_values():
    case = MASKED["ibot_loss"]
    names = ("student_cls", "teacher_cls", "student_patch", "teacher_patch", "mask", "center_cls", "center_patch")
    student, teacher, student_patch, teacher_patch, mask, center, center_patch = (tensor(case[name]) for name in names)
    cls = dino(student, teacher, center[0], case["student_temp"], case["teacher_temp"])
    assert_close(cls.item(), case["cls_loss"], **EXACT)
    temperatures = case["student_temp"], case["teacher_patch_temp"]
    crops = [
        ibot_tokens(s, t, center_patch[0, 0], m.bool(), *temperatures) for s, t, m in zip(student_patch, teacher_patch, mask)
    ]
    assert_close(torch.stack(crops), tensor(case["patch_loss_per_crop"]), **EXACT)
    both = ibot_tokens(
        *(x.flatten(0, 1) for x in (student_patch, teacher_patch)), center_patch[0, 0], mask[:, 0].bool(), *temperatures
    )
    assert_close(both.item(), case["patch_loss"], **EXACT)
    assert_close((cls + both).item(), case["total"], **EXACT)
    for start, scores, wanted in (
        (center, teacher.flatten(0, 1), case["new_center_cls"]),
        (center_patch[0], teacher_patch.flatten(0, 2), case["new_center_patch"][0]),  # of all tokens, masked or not
    ):
        part = Center(4).double()
        part.value.copy_(start[0])
        part.update(scores)
        part.after_step(Clock(1))
        assert_close(part.value, tensor(wanted[0]), **EXACT)


def test_ijepa_has_the_reference_values():
    case = MASKED["ijepa_loss"]
    prediction, target = tensor(case["prediction"]), tensor(case["target_raw"])
    assert_close(ijepa(prediction, target).item(), case["smooth_l1_beta1"], **EXACT)
    assert_close(ijepa(prediction, target, beta=0.0).item(), case["mse_for_comparison"], **EXACT)
    assert_close(F.layer_norm(target, (6,)), tensor(case["target_normed"]), **EXACT)


def test_contrasts_have_the_reference_values_of_sit_simcse_sccl_and_nt_xent():
    case = MASKED["sit_contrastive"]
    q, k = tensor(case["q"]), tensor(case["k"])
    assert_close(in_batch_info_nce(q, k, case["temp"]).item(), case["ce"], **EXACT)
    assert_close(batch_contrast(q, k, case["temp"]).item(), case["loss_scaled_2T"], **EXACT)
    case = MASKED["simcse"]
    found = in_batch_info_nce(tensor(case["z1"]), tensor(case["z2"]), case["temp"])
    assert_close(found.item(), case["loss"], **EXACT)
    case = MASKED["sccl_instance"]
    assert_close(nt_xent(tensor(case["f1"]), tensor(case["f2"]), case["temp"]).item(), case["loss"], **EXACT)
    case = MASKED["nt_xent"]
    z1, z2 = tensor(case["z1"]), tensor(case["z2"])
    assert_close(nt_xent(z1, z2, case["temperature"]).item(), case["loss"], **EXACT)
    assert_close(nt_xent(z1, z2, 0.5).item(), case["loss_temperature_0_5"], **EXACT)


# MSN


def test_msn_matches_a_slow_loop_over_probabilities():
    anchors, target = F.normalize(drawn(3, 4, 6), dim=2), F.normalize(drawn(4, 6, seed=1), dim=1)
    p, q = (anchors / 0.2).softmax(2), (target / 0.2).softmax(1) ** 2
    q = q / q.sum(1, keepdim=True)
    for _ in range(3):
        q = q / q.sum(0) / 6
        q = q / q.sum(1, keepdim=True) / 4
    q = 4 * q  # each iteration leaves a quarter a sample
    nats = [-sum(float(q[i, k] * p[v, i, k].log()) for k in range(6)) for v in range(3) for i in range(4)]
    mean = [float(p[:, :, k].mean()) for k in range(6)]
    found = msn(anchors.unbind(), target, temperature=0.2, sharpen=0.5)
    assert found.cross_entropy.item() == pytest.approx(sum(nats) / 12, rel=1e-10)
    assert found.me_max.item() == pytest.approx(math.log(6) + sum(x * math.log(x) for x in mean), rel=1e-10)
    assert found.entropy.item() == pytest.approx(torch.distributions.Categorical(p).entropy().mean().item(), rel=1e-10)


def test_sinkhorn_needs_targets_that_sum_to_one_first():
    _, target = cosines("anchors_view_major", "targets")
    case = MASKED["msn_loss"]
    sharp = (target / 0.025).softmax(1)
    assert_close(sharp, tensor(case["target_probs_sharpened"]), **EXACT)
    codes = sinkhorn(sharp.log(), 1.0, 3)
    assert_close(codes, tensor(case["target_probs_after_sinkhorn3"]), **EXACT)
    assert_close(codes.sum(1), tensor([1.0, 1.0]), rtol=0, atol=1e-12)
    assert (sinkhorn(target, 0.025, 3) - codes).abs().max() > 1e-3


def test_mean_entropy_is_maximal_where_prototypes_are_used_alike_and_its_gradient_is_finite_at_zero():
    alike = [torch.eye(64) * 50, torch.eye(64).flip(0) * 50]  # each sample has its own prototype
    found = msn(alike, alike[0], iterations=0)
    assert_close(found.me_max.item(), 0.0, rtol=0, atol=1e-5)
    one = torch.zeros(4, 1024)
    one[:, 3] = 50.0  # softmax leaves zeros
    leaf = one.requires_grad_()
    found = msn([leaf], one, iterations=0)
    assert_close(found.me_max.item(), math.log(1024), rtol=1e-6, atol=0)
    assert gradients(sum(found), leaf)[0].isfinite().all()


def test_targets_are_constants():
    anchors, target = [drawn(4, 5).requires_grad_()], drawn(4, 5, seed=1).requires_grad_()
    for iterations in (0, 3):
        assert torch.autograd.grad(sum(msn(anchors, target, iterations=iterations)), target, allow_unused=True) == (None,)
    rows, mask = drawn(2, 3, 5).requires_grad_(), torch.ones(2, 3, dtype=torch.bool)
    teacher = drawn(2, 3, 5, seed=1).requires_grad_()
    assert torch.autograd.grad(ibot_tokens(rows, teacher, torch.zeros(5), mask), teacher, allow_unused=True) == (None,)
    assert torch.autograd.grad(ijepa(rows, teacher), teacher, allow_unused=True) == (None,)


# iBOT and I-JEPA


def test_ibot_matches_a_slow_loop_in_which_rows_count_alike():
    student, teacher, center = drawn(3, 4, 5), drawn(3, 4, 5, seed=1), drawn(5, seed=2)
    hidden = torch.tensor([[c == "x" for c in row] for row in ("xx.x", "....", ".x..")])
    rows = []
    for row in range(3):
        nats = []
        for token in range(4):
            if hidden[row, token]:
                target = ((teacher[row, token] - center) / 0.07).softmax(0)
                nats.append(-float((target * (student[row, token] / 0.2).log_softmax(0)).sum()))
        rows.append(sum(nats) / max(1, len(nats)))
    for mask in (hidden, Mask.replacing(hidden)):
        found = ibot_tokens(student, teacher, center, mask, 0.2, 0.07)
        assert found.item() == pytest.approx(sum(rows) / 3, rel=1e-12)


def test_ibot_of_masks_that_hide_nothing_is_zero_with_a_gradient_of_zeros():
    student = drawn(2, 3, 5).requires_grad_()
    value = ibot_tokens(student, drawn(2, 3, 5, seed=1), torch.zeros(5), torch.zeros(2, 3, dtype=torch.bool))
    assert value.item() == 0
    assert gradients(value, student)[0].abs().max() == 0


def test_several_predictions_of_the_same_features_share_the_target():
    prediction, target = drawn(6, 4, 5), 3 * drawn(2, 4, 5, seed=1) + 1
    wanted = F.smooth_l1_loss(prediction, F.layer_norm(target, (5,)).repeat_interleave(3, 0), beta=0.5)
    assert_close(ijepa(prediction, target, 0.5), wanted, rtol=1e-12, atol=0)


# Precision and bad input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_is_computed_in_fp32(dtype):
    first, second = (F.normalize(drawn(4, 6, 16, seed=seed), dim=-1).to(dtype) for seed in range(2))
    mask = drawn(4, 6, seed=3) > 0
    for loss in (
        lambda x, y: torch.stack(msn(x.unbind(), y[0])),
        lambda x, y: ibot_tokens(x, y, torch.zeros(16), mask),
        ijepa,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(first, second)
        assert found.dtype == torch.float32
        assert_close(found.double(), loss(first.double(), second.double()), rtol=1e-4, atol=0)


def test_bad_input_is_refused():
    x = drawn(4, 5)
    for name, options in (("temperature", {"temperature": 0.0}), ("sharpen", {"sharpen": -1.0})):
        with pytest.raises(ValueError, match=f"^{name}: .*must be above 0"):
            msn([x], x, **options)
    with pytest.raises(ValueError, match=r"^iterations: -1, must be at least 1"):
        msn([x], x, iterations=-1)
    with pytest.raises(ValueError, match=r"^views: no anchor"):
        msn([], x)
    with pytest.raises(ValueError, match="must have one shape"):
        msn([x, x[:2]], x)
    with pytest.raises(ValueError, match="must have one shape"):
        ibot_tokens(x[None], x[None, :2], torch.zeros(5), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^mask: "):
        ibot_tokens(x[None], x[None], torch.zeros(5), torch.ones(1, 3, dtype=torch.bool))


# Ranks

HIDDEN = torch.tensor([[c == "x" for c in row] for row in ("xxx.", "x...", "....", "..x.", "xx..", ".x..", ".xxx", "....")])


def rank_losses(rows):
    """Of the samples `rows` of eight: each loss, and its gradient with respect to shared weights."""
    x, teacher, found = drawn(8, 4, 6)[rows], drawn(8, 4, 5, seed=2)[rows], {}
    hidden = HIDDEN[rows]
    share = hidden.double().sum() / HIDDEN.sum() * len(HIDDEN) / len(hidden)  # what a rank's losses count if tokens count alike
    losses = {
        **{name: lambda z, i=i: msn(z[:, :2].unbind(1), teacher[:, 0])[i] for i, name in enumerate(MSN._fields)},
        "ibot_tokens": lambda z: ibot_tokens(z, teacher, drawn(5, seed=3), hidden),
        "diversity": lambda z: share * codebook_diversity(z.softmax(-1)[:, :, None], hidden),
    }
    for name, loss in losses.items():
        theta = drawn(6, 5, seed=1).requires_grad_()
        value = loss(x @ theta)
        found[name] = (value.detach(), *torch.autograd.grad(value, theta))
    return found


def work(rank):
    return rank_losses(slice(rank, None, 2))


@pytest.mark.distributed
def test_t11_every_loss_of_two_ranks_is_that_of_one_process(tmp_path):
    (first, second), whole = on_two_ranks(work, folder=tmp_path), rank_losses(slice(None))
    assert HIDDEN[::2].sum() != HIDDEN[1::2].sum()
    for name, wanted in whole.items():
        for found_0, found_1, one in zip(first[name], second[name], wanted):
            assert_close((found_0 + found_1) / 2, one, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")  # noqa: B023
        assert wanted[1].abs().max() > 1e-6
