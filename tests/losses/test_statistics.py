import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.evaluate.collapse import alpha_req, rankme
from mmssl.losses import alignment, assignment_entropy, dimensions, sinkhorn, uniformity, unit_std
from tests.losses.cases import drawn, expected, gradients, inputs, tensor

EXACT = {"rtol": 1e-9, "atol": 0}


def test_unit_std_has_the_reference_value():
    found = unit_std(torch.cat(inputs("ntxent", "z1", "z2")))
    assert_close(found.item(), expected("collapse_diagnostics")["mean_std"] * 3**0.5, **EXACT)
    assert not found.requires_grad


def test_unit_std_is_one_for_noise_and_zero_for_a_constant():
    assert abs(float(unit_std(drawn(4096, 64))) - 1) < 0.01
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert unit_std((drawn(64).abs() * torch.arange(1, 9)[:, None]).to(dtype)) < 0.01  # one direction, many lengths
    assert unit_std(torch.ones(8, 64)) < 1e-6


def test_entropies_of_assignments():
    p = sinkhorn(inputs("swav_sinkhorn", "scores_view0")[0])
    found = assignment_entropy(p)
    assert_close(found.mean.item(), expected("swav_sinkhorn")["mean_row_entropy_Q_view0"], **EXACT)
    mean = [x / 4 for x in expected("swav_sinkhorn")["Q_view0_prototype_mass"]]
    assert_close(found.of_mean.item(), -sum(x * math.log(x) for x in mean), **EXACT)
    one_hot = assignment_entropy(torch.eye(5)[[0, 1, 2, 3, 4]])
    assert_close(one_hot.of_mean.item(), math.log(5), rtol=1e-6, atol=0)
    assert one_hot.mean == 0
    assert assignment_entropy(torch.eye(5)[[2, 2]]).of_mean == 0


def test_alignment_and_uniformity_have_the_reference_values():
    z1, z2 = inputs("ntxent", "z1", "z2")
    wanted = expected("collapse_diagnostics")
    assert_close(alignment(z1, z2).item(), wanted["alignment_mean_sq_distance_of_pairs"], **EXACT)
    assert_close(uniformity(z1).item(), wanted["uniformity_log_mean_exp_-2d2_over_pairs_of_z1"], **EXACT)


def test_alignment_and_uniformity_match_slow_loops():
    z1, z2 = F.normalize(drawn(5, 3), dim=1), F.normalize(drawn(5, 3, seed=1), dim=1)
    distances = [math.dist(a.tolist(), b.tolist()) for a, b in zip(z1, z2)]
    for power in (1.0, 2.0, 3.0):
        assert_close(alignment(z1, z2, power).item(), sum(d**power for d in distances) / 5, **EXACT)
    pairs = [math.exp(-3 * math.dist(z1[i].tolist(), z1[j].tolist()) ** 2) for i in range(5) for j in range(i)]
    assert_close(uniformity(z1, 3.0).item(), math.log(sum(pairs) / 10), **EXACT)


def test_uniformity_of_a_constant_is_zero_and_has_a_finite_gradient():
    z = torch.ones(6, 3, dtype=torch.float64).requires_grad_()
    assert uniformity(z).abs() < 1e-12
    assert gradients(uniformity(z), z)[0].isfinite().all()
    wide = drawn(32, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = uniformity(wide)
    assert_close(found.double(), uniformity(wide.double()), rtol=1e-5, atol=0)


def test_alpha_req_of_features_made_with_a_power_law_is_its_exponent():
    x = drawn(200, 64)
    basis = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    features = basis.U * torch.arange(1, 65, dtype=torch.float64) ** -0.75 @ basis.Vh + 3
    wanted = expected("alpha_req")["alpha"]
    assert_close(alpha_req(features), wanted, **EXACT)
    assert_close(alpha_req(features.float()), wanted, rtol=1e-4, atol=0)
    assert_close(alpha_req(torch.cat((features, features), 1)), wanted, **EXACT)  # half of the eigenvalues are 0


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (torch.diag(tensor([4, 2, 1, 1])), "Z_a"),
        (torch.eye(4).double(), "Z_b"),
        (torch.ones(4, 3).double(), "Z_c"),
        (inputs("ntxent", "z1")[0].detach(), "Z_d"),
    ],
)
def test_rankme_has_the_reference_values(features, name):
    assert_close(rankme(features), expected("rankme")[name], **EXACT)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        alignment(drawn(4, 3), drawn(4, 2))
    with pytest.raises(ValueError, match=r"^train\.global_batch: 1, "):
        uniformity(drawn(1, 3))
    with pytest.raises(ValueError, match=r"^t: 0, must be above 0"):
        uniformity(drawn(4, 3), 0)


@pytest.mark.parametrize(("rows", "width"), [(6, 40), (40, 6)])
def test_dimensions_are_the_participation_ratio_of_the_covariance(rows, width):
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = z / z.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(unit.T))
    assert_close(dimensions(z), eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rtol=1e-9, atol=0)


def test_dimensions_of_a_line_and_of_a_point():
    line = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    assert float(dimensions(line)) == pytest.approx(1)
    assert float(dimensions(torch.ones(4, 3))) < 1.5
