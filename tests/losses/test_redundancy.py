import pytest
import torch
from torch.testing import assert_close

from mmssl.losses import barlow_twins, vicreg
from tests.losses.cases import drawn, expected, gradients, inputs, tensor

EXACT = {"rtol": 1e-9, "atol": 0}
ROUNDED = {"rtol": 0, "atol": 2e-8}


def weighted(z1, z2):
    terms = vicreg(z1, z2)
    return 25 * terms.invariance + 25 * terms.variance + terms.covariance


# Barlow Twins


def test_barlow_twins_has_the_reference_values_and_gradient():
    wanted = expected("barlow_twins")
    z1, z2 = inputs("barlow_twins", "z1", "z2")
    loss = barlow_twins(z1, z2)
    assert_close(loss.item(), wanted["loss"], **EXACT)
    assert_close(barlow_twins(z1, z2, 0.005).item(), wanted["loss_lambda_0.005"], **EXACT)
    assert_close(barlow_twins(z1, z2, 0.0).item(), wanted["on_diag"], **EXACT)
    assert_close((barlow_twins(z1, z2, 1.0) - wanted["on_diag"]).item(), wanted["off_diag_unweighted"], **EXACT)
    assert_close(gradients(loss, z1, z2), (tensor(wanted["dz1"]), tensor(wanted["dz2"])), **ROUNDED)


def test_barlow_twins_of_constants_is_the_width():
    z = torch.ones(8, 5, dtype=torch.float64).requires_grad_()
    loss = barlow_twins(z, z)
    assert_close(loss.item(), 5.0, **EXACT)
    assert gradients(loss, z)[0].isfinite().all()


def test_barlow_twins_knows_neither_shift_nor_scale_of_a_dimension():
    z1, z2 = inputs("barlow_twins", "z1", "z2")
    loss, factor = barlow_twins(z1, z2), tensor([3.0, 0.5, 10.0])
    assert_close(barlow_twins(z1 + factor, z2), loss, rtol=1e-9, atol=0)
    assert 1e-9 < (barlow_twins(z1 * factor, z2) - loss).abs() < 6e-6  # by eps
    assert_close(barlow_twins(z1 * factor, z2, eps=0.0), barlow_twins(z1, z2, eps=0.0), **EXACT)


# VICReg


def test_vicreg_has_the_reference_terms_and_gradient():
    wanted = expected("vicreg")
    z1, z2 = inputs("vicreg", "z1", "z2")
    terms = vicreg(z1, z2)
    assert terms._fields == ("invariance", "variance", "covariance")
    for found, name in zip(terms, ("inv", "var", "cov")):
        assert_close(found.item(), wanted[name], **EXACT)
    assert_close(weighted(z1, z2).item(), wanted["loss"], **EXACT)
    assert_close(gradients(weighted(z1, z2), z1, z2), (tensor(wanted["dz1"]), tensor(wanted["dz2"])), **ROUNDED)


def test_vicreg_of_constants_is_its_weight_of_variance_less_the_root_of_eps():
    z = torch.ones(8, 5, dtype=torch.float64).requires_grad_()
    assert_close(weighted(z, z).item(), expected("collapse_loss_levels")["vicreg"], **EXACT)
    assert gradients(weighted(z, z), z)[0].isfinite().all()


def test_vicreg_wants_spread_and_independence_only():
    x = torch.linalg.qr(drawn(64, 9) - drawn(64, 9).mean(0))[0][:, :4]
    x = torch.linalg.qr(x - x.mean(0))[0] * 64**0.5  # uncorrelated, standard deviation just above 1
    terms = vicreg(x, x)
    assert (terms.invariance, terms.variance) == (0, 0)
    assert terms.covariance < 1e-25


# Both


@pytest.mark.parametrize("loss", [barlow_twins, weighted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_are_computed_in_fp32_also_under_autocast(loss, dtype):
    z1, z2 = drawn(64, 16).to(dtype), (drawn(64, 16) + drawn(64, 16, seed=1)).to(dtype)
    wanted = loss(z1.double(), z2.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(z1, z2)
    assert found.dtype == torch.float32
    assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_bad_input_is_refused():
    z = drawn(4, 3)
    for loss in (barlow_twins, vicreg):
        with pytest.raises(ValueError, match=r"^z1 \(4, 3\), z2 \(4, 2\): must have one shape"):
            loss(z, z[:, :2])
    with pytest.raises(ValueError, match=r"^train\.global_batch: 1, .* at least 2"):
        vicreg(z[:1], z[:1])
