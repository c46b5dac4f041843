import json
import math
from pathlib import Path

import pytest
import torch

from mmssl.evaluate.collapse import alpha_req, rankme

CASES = json.loads((Path(__file__).parents[1] / "vectors/joint-embedding.json").read_text())["cases"]
MATRICES = {
    "Z_a": torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)),
    "Z_b": torch.eye(4, dtype=torch.float64),
    "Z_c": torch.ones(4, 3, dtype=torch.float64),
    "Z_d": torch.tensor(CASES["ntxent"]["inputs"]["z1"], dtype=torch.float64),
}


@pytest.mark.parametrize("name", MATRICES)
def test_rankme_is_that_of_the_vectors(name):
    wanted = CASES["rankme"]["expected"][name]
    assert rankme(MATRICES[name]) == pytest.approx(wanted, rel=1e-9)
    assert rankme(MATRICES[name].float()) == pytest.approx(wanted, rel=1e-5)


def features_with(eigenvalues: torch.Tensor) -> torch.Tensor:
    """(400, D) centred samples, moved off the origin, whose covariance has these eigenvalues."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(400, len(eigenvalues), generator=draw, dtype=torch.float64)
    left, _ = torch.linalg.qr(noise - noise.mean(0))
    right, _ = torch.linalg.qr(torch.randn(*[len(eigenvalues)] * 2, generator=draw, dtype=torch.float64))
    return left * eigenvalues.sqrt() @ right * math.sqrt(399) + 3


def test_alpha_is_the_exponent_of_a_power_law_of_eigenvalues():
    eigenvalues = torch.arange(1, 65, dtype=torch.float64) ** -1.5
    wanted = CASES["alpha_req"]["expected"]["alpha"]
    assert alpha_req(features_with(eigenvalues)) == pytest.approx(wanted, rel=1e-9)
    assert alpha_req(features_with(7 * eigenvalues).float()) == pytest.approx(wanted, rel=1e-3)


def test_directions_without_variance_do_not_bend_the_line():
    eigenvalues = torch.arange(1, 21, dtype=torch.float64) ** -0.8
    flat = torch.cat([features_with(eigenvalues), torch.zeros(400, 30, dtype=torch.float64)], 1)
    assert alpha_req(flat) == pytest.approx(0.8, rel=1e-9)
