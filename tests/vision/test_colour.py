import pytest
import torch
from torch.testing import assert_close

from modalities.vision.colour import annealed_mean, colour_bins, lab, rare_colours, soft_bins
from tests.losses.cases import MASKED, tensor

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def test_lab_has_the_reference_values():
    for rgb, wanted in MASKED["srgb_to_lab_d65"].items():
        assert_close(lab(tensor([int(value) for value in rgb.strip("()").split(",")]) / 255), tensor(wanted), **EXACT)
    assert_close(lab(tensor([[0.0] * 3, [1.0] * 3]))[:, 0], tensor([0.0, 100.0]), rtol=0, atol=1e-4)
    grey = lab(torch.linspace(0, 1, 20, dtype=torch.float64)[:, None].expand(-1, 3))
    assert float(grey[:, 1:].abs().max()) < 0.01
    assert bool((grey[:, 0].diff() > 0).all())


def test_bins_are_the_squares_that_colours_fall_into():
    bins = colour_bins()
    # The published list has 313, of which no sRGB colour falls into 52: counted over all 256^3 colours there are 261, too.
    assert MASKED["colorization"]["Q_full"] == 313
    assert len(bins) == 261
    assert MASKED["colorization"]["grid"] == 10
    assert bool((bins % 10 == 0).all())
    rgb = torch.rand(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = (lab(rgb)[:, None, 1:] - bins).abs().amax(-1).amin(1)
    assert float((apart <= 5).double().mean()) > 0.99  # some of the rare corners fall between the 64 steps


def test_soft_bins_have_the_reference_values():
    case = MASKED["ab_soft_encoding"]
    bins = torch.cartesian_prod(*[torch.arange(-110, 111, 10, dtype=torch.float64)] * 2)
    found = soft_bins(tensor([case["ab"], [0.0, 0.0]]), bins)
    assert_close(found.sum(1), tensor([1.0, 1.0]), **EXACT)
    assert [int(n) for n in (found > 0).sum(1)] == [5, 5]
    for centre, square, weight in zip(case["nearest5"], case["squared_distance"], case["weights"], strict=True):
        place = int((bins == tensor(centre)).all(1).nonzero())
        assert_close(found[0, place].item(), weight, **EXACT)
        assert float((bins[place] - tensor(case["ab"])).square().sum()) == square


def test_rare_colours_count_more_and_one_on_average():
    case = MASKED["colorization"]
    share = tensor(case["p"])
    found = rare_colours(share, case["lam"])
    assert_close(found, tensor(case["weights_normalised_so_sum_p_w_is_1"]), **EXACT)
    assert float(share @ found) == pytest.approx(1, rel=1e-12)
    assert_close(rare_colours(share, 1.0), torch.ones(4, dtype=torch.float64), **EXACT)


def test_the_annealed_mean_lies_between_mean_and_mode():
    case, logits = MASKED["colorization"], tensor([2.0, 1.0, 0.0, -1.0])
    weights = annealed_mean(logits, torch.eye(4, dtype=torch.float64), case["annealed_T"])
    assert_close(weights, tensor(case["annealed_softmax_of_2_1_0_m1"]), **EXACT)
    bins = tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, 0.0], [0.0, -10.0]])
    assert_close(annealed_mean(logits, bins, 1.0), logits.softmax(0) @ bins, **EXACT)
    assert_close(annealed_mean(logits, bins, 1e-3), bins[0], **EXACT)
