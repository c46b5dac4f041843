import math

import pytest
import torch
from torch.testing import assert_close

from mmssl.losses import (
    chamfer,
    cosine_regression,
    gaussian_log_likelihood,
    masked_l1,
    masked_patch_mse,
    masked_pixel_l1,
    patch_normalise,
    scaled_cosine,
)
from mmssl.types import Mask
from tests.losses.cases import MASKED, drawn, gradients, tensor

EXACT = {"rtol": 1e-9, "atol": 0}


def image(wave, factor):
    values = [round(wave(factor * i), 3) for i in range(48)]
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 4, 4)


def patches(x):
    """(1, 3, 4, 4) to (1, 4, 12), channels last within a patch."""
    return x.view(1, 3, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 4, 12)


def mae():
    case = MASKED["mae_loss"]
    prediction = torch.tensor([round(0.5 * math.cos(0.21 * i), 3) for i in range(48)], dtype=torch.float64).view(1, 4, 12)
    return prediction, patches(image(math.sin, 0.37)), tensor(case["mask"]).bool(), case


def some(rows, length, hidden):
    return Mask.of(torch.rand(rows, length, generator=torch.Generator().manual_seed(0)).argsort(1) < hidden)


# Vectors


def test_mae_has_the_reference_values():
    prediction, target, mask, case = mae()
    assert_close(masked_patch_mse(prediction, target, mask, normalise=True).item(), case["loss_norm_pix"], **EXACT)
    assert_close(masked_patch_mse(prediction, target, mask).item(), case["loss_raw_pixels"], **EXACT)
    everywhere = masked_patch_mse(prediction, target, None, normalise=True)
    assert_close(everywhere.item(), case["loss_norm_pix_all_patches_WRONG"], **EXACT)
    assert_close(target.mean(-1)[0], tensor(case["patch_mean"]), **EXACT)
    assert_close(patch_normalise(target)[0, 1], tensor(case["target_norm_patch1"]), **EXACT)


def test_simmim_has_the_reference_value():
    case = MASKED["simmim_loss"]
    target, prediction = (patches(image(*one)) for one in ((math.sin, 0.5), (math.cos, 0.3)))
    mask = tensor(case["token_mask"]).bool().view(1, 4)
    found = masked_pixel_l1(prediction, target, mask).item()
    assert_close(found, case["loss"] * (8 + 1e-5) / 8, **EXACT)  # two patches of 4 pixels


def test_tera_has_the_reference_value():
    case = MASKED["tera_l1"]
    prediction, target, mask = tensor(case["pred"])[None], tensor(case["target"])[None], tensor(case["mask"])[None].bool()
    assert_close(masked_l1(prediction, target, mask).item(), case["loss"], **EXACT)
    assert_close(masked_patch_mse(prediction[..., None][0], target[..., None][0], mask[0]).item(), case["mse_variant"], **EXACT)


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_scaled_cosine_has_the_reference_values(gamma):
    case = MASKED["graphmae_sce"]
    found = scaled_cosine(tensor(case["recon"]), tensor(case["target"]), gamma=gamma)
    assert_close(found.item(), case["loss"][str(gamma)], **EXACT)


def test_regression_of_directions_has_the_reference_values_of_seq_jepa_and_byol_a():
    case = MASKED["seq_jepa_loss"]
    found = scaled_cosine(tensor(case["prediction"]), tensor(case["target"]), gamma=1)
    assert_close(found.item(), case["loss_1_minus_cos"], **EXACT)
    case = MASKED["byol_a"]
    assert_close(cosine_regression(tensor(case["p"]), tensor(case["target"])).item(), case["byol_loss"], **EXACT)


def test_log_likelihood_has_the_reference_value():
    case = MASKED["aasae"]
    x, mean = tensor(case["x"])[None], tensor(case["mean"])[None]
    assert_close(gaussian_log_likelihood(mean, x, case["log_scale"]).item(), case["log_likelihood_sum"], **EXACT)


# Arithmetic


def test_chamfer_has_the_reference_values():
    case = MASKED["point_mae"]
    prediction, target = tensor(case["pred"]).requires_grad_(), tensor(case["gt"])
    assert_close(chamfer(prediction, target).item(), case["chamfer_l2"], **EXACT)
    assert_close(chamfer(prediction, target, squared=False).item(), case["chamfer_l1"], **EXACT)
    both = chamfer(torch.stack([prediction, target[:3]]), torch.stack([target, target]))
    assert_close(both.item(), (chamfer(prediction, target) + chamfer(target[:3], target)).item() / 2, **EXACT)
    for squared in (True, False):  # a point that is right pulls nowhere
        (pull,) = gradients(chamfer(prediction, torch.cat([target, prediction.detach()[:1]]), squared), prediction)
        assert bool(pull.isfinite().all())
    with pytest.raises(ValueError, match="do not fit"):
        chamfer(prediction, target[:, :2])


@pytest.mark.parametrize("copies", [1, 3])
def test_masked_errors_match_slow_loops(copies):
    prediction, target, mask = drawn(2 * copies, 5, 4), drawn(2, 5, 4, seed=1), some(2 * copies, 5, 3)
    squares, sizes = [], []
    for row in range(2 * copies):
        for token in range(5):
            if mask.hidden[row, token]:
                errors = [float(prediction[row, token, i]) - float(target[row // copies, token, i]) for i in range(4)]
                squares += [e**2 for e in errors]
                sizes += [abs(e) for e in errors]
    for given in (mask, mask.hidden):
        assert masked_patch_mse(prediction, target, given).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)
        assert masked_pixel_l1(prediction, target, given).item() == pytest.approx(sum(sizes) / len(sizes), rel=1e-12)
    found = masked_l1(prediction, target, mask.hidden[..., None])
    assert found.item() == pytest.approx(sum(sizes) / len(sizes), rel=1e-12)


@pytest.mark.parametrize("width", ["48", "192", "768"])
def test_a_zero_prediction_of_normalised_patches_scores_its_known_value(width):
    pixels = drawn(1, 3, int(width)) * 50
    found = masked_patch_mse(torch.zeros_like(pixels), pixels, None, normalise=True)
    assert found.item() == pytest.approx(MASKED["mae_zero_prediction"]["n_to_limit"][width], rel=1e-8)


def test_a_constant_patch_becomes_zero():
    assert patch_normalise(torch.full((2, 5), 3.0)).tolist() == [[0.0] * 5] * 2


def test_what_is_visible_has_no_part_in_the_loss_or_its_gradient():
    prediction, target, mask, _ = mae()
    changed = prediction + (~mask)[..., None] * 7
    for loss in (masked_patch_mse, masked_pixel_l1, scaled_cosine):
        leaf = prediction.clone().requires_grad_()
        (gradient,) = gradients(loss(leaf, target, mask), leaf)
        assert gradient[~mask].abs().max() == 0
        assert gradient[mask].abs().min() > 0
        assert torch.equal(loss(changed, target, mask), loss(prediction, target, mask))


def test_rows_that_hide_nothing_and_masks_that_do_not_at_all_give_no_nan():
    target, nothing = drawn(2, 5, 4, seed=1), torch.zeros(2, 5, dtype=torch.bool)
    one = nothing.clone()
    one[0, 1:3] = True
    for loss in (masked_patch_mse, masked_pixel_l1, scaled_cosine, lambda p, t, m: masked_l1(p, t, m[..., None])):
        prediction = drawn(2, 5, 4).requires_grad_()
        assert_close(loss(prediction, target, one), loss(prediction[:1, 1:3], target[:1, 1:3], one[:1, 1:3]), **EXACT)
        value = loss(prediction, target, nothing)
        assert value.item() == 0
        assert gradients(value, prediction)[0].abs().max() == 0


def test_scaled_cosine_has_a_finite_gradient_where_predictions_are_right_and_where_they_are_zeros():
    target = drawn(50, 8).float()
    for prediction in (target * 3, torch.zeros(50, 8)):
        leaf = prediction.requires_grad_()
        for gamma in (1.0, 1.5, 3.0):
            assert gradients(scaled_cosine(leaf, target, gamma=gamma), leaf)[0].isfinite().all()


def test_the_scale_of_the_log_likelihood_is_learned_towards_the_error():
    mean, target = torch.zeros(4, 500, dtype=torch.float64), 2 * drawn(4, 500)
    best = target.square().mean().log()  # twice the log of the standard deviation
    scales = [best - 0.1, best, best + 0.1]
    values = [gaussian_log_likelihood(mean, target, scale).item() for scale in scales]
    assert max(values) == values[1]
    by_hand = -0.5 * 500 * (math.log(2 * math.pi) + best.item() + 1)
    assert values[1] == pytest.approx(by_hand, rel=1e-6)
    leaf = best.clone().requires_grad_()
    assert gradients(gaussian_log_likelihood(mean, target, leaf), leaf)[0].abs() < 1e-2


# Precision and bad input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_computed_in_fp32(dtype):
    prediction, target, mask = drawn(4, 6, 48).to(dtype), (drawn(4, 6, 48, seed=1) + 2).to(dtype), some(4, 6, 4)
    for loss in (
        lambda p, t: masked_patch_mse(p, t, mask, normalise=True),
        lambda p, t: masked_pixel_l1(p, t, mask),
        lambda p, t: masked_l1(p, t, mask.hidden[..., None]),
        lambda p, t: scaled_cosine(p, t, mask, 3.0),
        gaussian_log_likelihood,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(prediction, target)
        assert found.dtype == torch.float32
        assert_close(found.double(), loss(prediction.double(), target.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("first", "second"), [((2, 5, 4), (2, 5, 3)), ((2, 5, 4), (2, 4, 4)), ((3, 5, 4), (2, 5, 4))])
def test_shapes_that_do_not_fit_are_refused(first, second):
    for loss in (masked_patch_mse, masked_pixel_l1, scaled_cosine):
        with pytest.raises(ValueError, match="do not fit"):
            loss(drawn(*first), drawn(*second), torch.ones(first[:2], dtype=torch.bool))


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)])
def test_a_mask_of_other_tokens_or_of_numbers_is_refused(mask):
    with pytest.raises(ValueError, match=r"^mask: .* must be bool, True = masked, of the \(2, 5\) tokens"):
        masked_patch_mse(drawn(2, 5, 4), drawn(2, 5, 4), mask)


def test_a_gamma_below_one_is_refused():
    with pytest.raises(ValueError, match=r"^gamma: 0.5, must be at least 1"):
        scaled_cosine(drawn(2, 3), drawn(2, 3), gamma=0.5)
