import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.losses import average_layers, cosine_regression, data2vec_regression, instance_norm, token_std
from mmssl.types import Mask
from tests.losses.cases import drawn, expected, gradients, inputs, tensor


def mask_of(rows, length, hidden, seed=0):
    order = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return Mask.of(order < hidden)


# Regression


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("copies", [1, 3])
def test_regression_matches_a_slow_loop(copies, scale):
    prediction, target, mask = drawn(2 * copies, 5, 4), drawn(2, 5, 4, seed=1), mask_of(2 * copies, 5, 3)
    total = 0.0
    for row in range(2 * copies):
        for token in range(5):
            if mask.hidden[row, token]:
                error = sum((float(prediction[row, token, d]) - float(target[row // copies, token, d])) ** 2 for d in range(4))
                total += error * (0.5 if scale is None else scale)  # 4 ** -0.5
    found = data2vec_regression(prediction, target, mask, scale)
    assert_close(found, torch.tensor(total / (2 * copies * 3), dtype=torch.float64), rtol=1e-12, atol=0)


def test_regression_of_single_vectors_averages_over_rows():
    prediction, target = drawn(6, 9), drawn(2, 9, seed=1)
    rows = [sum((float(prediction[r, d]) - float(target[r // 3, d])) ** 2 for d in range(9)) / 3 for r in range(6)]
    found = data2vec_regression(prediction, target)
    assert_close(found, torch.tensor(sum(rows) / 6, dtype=torch.float64), rtol=1e-12, atol=0)


def test_regression_is_computed_in_fp32_unless_it_comes_in_double():
    prediction, target = drawn(2, 5, 64), drawn(2, 5, 64, seed=1)
    low = data2vec_regression(prediction.bfloat16(), target.bfloat16())
    assert low.dtype == torch.float32
    exact = data2vec_regression(prediction.bfloat16().double(), target.bfloat16().double())
    assert exact.dtype == torch.float64
    assert_close(low.double(), exact, rtol=1e-6, atol=0)  # bf16 arithmetic would be off by 1e-3
    assert average_layers([target.bfloat16()], 1).dtype == torch.float32
    assert average_layers([target], 1).dtype == torch.float64


@pytest.mark.parametrize(("first", "second"), [((2, 5, 4), (2, 5, 3)), ((2, 5, 4), (2, 4, 4)), ((3, 5, 4), (2, 5, 4))])
def test_shapes_that_do_not_fit_are_refused(first, second):
    with pytest.raises(ValueError, match="do not fit"):
        data2vec_regression(drawn(*first), drawn(*second))


@pytest.mark.parametrize(("dim", "wanted"), [(768, 27.713), (1024, 32.0)])
def test_a_zero_prediction_of_an_image_target_scores_the_root_of_its_width(dim, wanted):
    target = average_layers([drawn(2, 6, dim, seed=i) for i in range(3)], 3)
    found = float(data2vec_regression(torch.zeros(4, 6, dim, dtype=torch.float64), target, mask_of(4, 6, 4)))
    assert abs(found / wanted - 1) < 1e-3


@pytest.mark.parametrize("dim", [768, 1024])
def test_a_zero_prediction_scores_between_all_layers_alike_and_all_independent(dim):
    layers = [drawn(2, 60, dim, seed=i) for i in range(8)]
    mask, zero = Mask.of(torch.arange(60).repeat(2, 1) < 59), torch.zeros(2, 60, dim, dtype=torch.float64)
    for scale, wanted in ((None, dim**0.5), (1.0, dim)):  # speech, text
        alike = float(data2vec_regression(zero, average_layers(layers[:1] * 8, 8, final="none"), mask, scale))
        apart = float(data2vec_regression(zero, average_layers(layers, 8, final="none"), mask, scale))
        assert abs(alike / wanted - 1) < 1e-2
        assert abs(apart / wanted * 8 - 1) < 2e-2


@pytest.mark.parametrize("beta", [0.5, 2.0, 4.0])
def test_smooth_l1_is_that_of_torch_and_the_formula(beta):
    prediction, target, mask = 3 * drawn(4, 5, 6), drawn(2, 5, 6, seed=1), mask_of(4, 5, 3)
    found = data2vec_regression(prediction, target, mask, 1.0, beta)
    chosen = prediction[mask.hidden], target.repeat_interleave(2, 0)[mask.hidden]
    assert_close(found, torch.nn.SmoothL1Loss(reduction="sum", beta=beta)(*chosen) / 12, rtol=1e-12, atol=0)
    errors = (chosen[0] - chosen[1]).abs().flatten().tolist()
    assert min(errors) < beta < max(errors)
    by_hand = sum(e**2 / (2 * beta) if e < beta else e - beta / 2 for e in errors)
    assert float(found) == pytest.approx(by_hand / 12, rel=1e-12)
    mean = data2vec_regression(prediction, target, mask, 1 / 6, beta)  # the image recipe's: over channels as well
    assert_close(mean, torch.nn.SmoothL1Loss(beta=beta)(*chosen), rtol=1e-12, atol=0)


def test_visible_tokens_have_no_part_in_the_loss_or_its_gradient():
    prediction, target, mask = drawn(2, 5, 4).requires_grad_(), drawn(2, 5, 4, seed=1), mask_of(2, 5, 3)
    (gradient,) = torch.autograd.grad(data2vec_regression(prediction, target, mask), prediction)
    assert gradient[~mask.hidden].abs().max() == 0
    assert_close(gradient[mask.hidden], (prediction - target)[mask.hidden].detach() / 6, rtol=1e-12, atol=0)  # 2 / (2 * 6)


# Targets


def test_average_layers_matches_a_slow_loop():
    layers = [drawn(2, 5, 3, seed=i) * (i + 1) + i for i in range(4)]
    wanted = torch.zeros(2, 5, 3, dtype=torch.float64)
    for sample in range(2):
        for channel in range(3):
            for layer in layers[-2:]:
                values = [float(v) for v in layer[sample, :, channel]]
                mean = sum(values) / 5
                variance = sum((v - mean) ** 2 for v in values) / 5  # biased
                for token, value in enumerate(values):
                    wanted[sample, token, channel] += (value - mean) / math.sqrt(variance + 1e-5) / 2
    assert_close(average_layers(layers, 2, final="none"), wanted, rtol=1e-10, atol=1e-12)
    for sample in range(2):
        for token in range(5):
            values = [float(v) for v in wanted[sample, token]]
            mean = sum(values) / 3
            variance = sum((v - mean) ** 2 for v in values) / 3
            wanted[sample, token] = torch.tensor([(v - mean) / math.sqrt(variance + 1e-5) for v in values], dtype=torch.float64)
    assert_close(average_layers(layers, 2), wanted, rtol=1e-10, atol=1e-12)


NORMS = [(each, final) for each in ("instance", "layer", "none") for final in ("instance", "layer", "none")]


@pytest.mark.parametrize(("each", "final"), NORMS)
def test_a_padded_target_is_that_of_each_row_by_itself(each, final):
    layers, lengths = [3 * drawn(3, 8, 6, seed=i) + i for i in range(3)], (8, 5, 3)
    pad = torch.arange(8) >= torch.tensor(lengths)[:, None]
    found = average_layers(layers, 2, each, final, pad)
    for row, length in enumerate(lengths):
        alone = average_layers([layer[row : row + 1, :length] for layer in layers], 2, each, final)
        assert_close(found[row, :length], alone[0], rtol=1e-12, atol=1e-12)
    whole = average_layers(layers, 2, each, final)
    assert_close(average_layers(layers, 2, each, final, torch.zeros(3, 8).bool()), whole, rtol=1e-12, atol=1e-12)
    assert torch.allclose(whole[2, :3], found[2, :3]) == ("instance" not in (each, final))


@pytest.mark.parametrize("how", ["instance", "layer"])
def test_norms_are_those_of_torch(how):
    x = 3 * drawn(2, 9, 6) + 1
    wanted = F.layer_norm(x, (6,)) if how == "layer" else F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
    assert_close(average_layers([x], 1, how, "none"), wanted, rtol=1e-12, atol=1e-12)
    assert_close(average_layers([x], 1, "none", how), wanted, rtol=1e-12, atol=1e-12)
    assert_close(average_layers([x, 2 * x], 2, "none", "none"), 1.5 * x, rtol=1e-12, atol=1e-12)


def test_instance_norm_of_padded_rows_ignores_what_stands_in_the_padding():
    x, pad = drawn(2, 7, 4), torch.arange(7) >= torch.tensor([[7], [4]])
    found = instance_norm(x, pad=pad)
    assert_close(found[1, :4], instance_norm(x[1:, :4])[0], rtol=1e-12, atol=1e-12)
    assert found[1, 4:].abs().max() == 0
    assert_close(instance_norm(x.masked_fill(pad[..., None], 1e6), pad=pad), found, rtol=1e-12, atol=1e-12)
    assert_close(found[0], instance_norm(x[:1])[0], rtol=1e-12, atol=1e-12)


def test_a_target_without_final_norm_has_mean_zero_over_the_tokens_of_each_sample():
    pad = torch.arange(20) >= torch.tensor([[20], [13]])
    target = average_layers([drawn(2, 20, 16, seed=i).float() for i in range(4)], 3, final="none", pad=pad)
    for row, length in enumerate((20, 13)):
        assert target[row, :length].mean(0).abs().max() < 1e-5
    large = average_layers([drawn(2, 20, 16, seed=i).float() for i in range(4)], 3, "layer", "instance", pad)
    assert large[1, :13].mean(0).abs().max() < 1e-5
    assert_close(large[1, :13].var(0, correction=0), torch.ones(16), rtol=0, atol=1e-3)


def test_an_image_target_has_mean_zero_and_mean_square_one_in_each_token():
    target = average_layers([drawn(2, 30, 64, seed=i) for i in range(4)], 3)
    assert_close(target.mean(-1), torch.zeros(2, 30, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(target.square().mean(-1), torch.ones(2, 30, dtype=torch.float64), rtol=0, atol=1e-3)


def test_equal_layers_average_to_variance_one_and_independent_ones_to_one_over_their_number():
    layers = [drawn(2, 400, 32, seed=i) for i in range(8)]
    same = average_layers([layers[0]] * 8, 8, final="none")
    assert_close(same.var(1, correction=0), torch.ones(2, 32, dtype=torch.float64), rtol=0, atol=1e-4)
    mixed = average_layers(layers, 8, final="none").var(1, correction=0).mean()
    assert abs(float(mixed) * 8 - 1) < 0.05


def test_without_the_final_norm_the_mean_target_is_zero_and_with_it_it_is_not():
    layers = [drawn(2, 20, 16, seed=i) for i in range(4)]
    assert average_layers(layers, 4, final="none").mean(1).abs().max() < 1e-12
    assert average_layers(layers, 4).mean(1).abs().mean() > 1e-3


@pytest.mark.parametrize("top_k", [0, 3, -1])
def test_more_layers_than_there_are_cannot_be_averaged(top_k):
    with pytest.raises(ValueError, match=f"^top_k: {top_k} "):
        average_layers([drawn(1, 2, 2)] * 2, top_k)


def test_instance_norm_of_a_constant_channel_is_zero():
    assert instance_norm(torch.full((1, 4, 2), 3.0)).tolist() == [[[0.0, 0.0]] * 4]


# Cosine regression


def test_cosine_regression_has_the_reference_values_of_byol_and_simsiam():
    p1, p2, z1, z2 = inputs("byol_simsiam", "p1", "p2", "z1", "z2")
    wanted = expected("byol_simsiam")
    both = cosine_regression(p1, z2) + cosine_regression(p2, z1)
    assert_close(both.item(), wanted["byol_sum_of_two_directions_mean_over_batch"], rtol=1e-9, atol=0)
    assert_close((both / 4 - 1).item(), wanted["simsiam"], rtol=1e-9, atol=0)
    first, second, *none = torch.autograd.grad(both, (p1, p2, z1, z2), allow_unused=True)
    assert_close((first, second), (tensor(wanted["d_byol_d_p1"]), tensor(wanted["d_byol_d_p2"])), rtol=0, atol=2e-9)
    assert none == [None, None]


def test_cosine_regression_is_zero_for_a_constant_four_for_opposites_and_finite_for_zeros():
    p = drawn(4, 3)
    assert cosine_regression(p, 7 * p).abs() < 1e-12
    assert_close(cosine_regression(p, -p).item(), 4.0, rtol=1e-12, atol=0)
    zeros = torch.zeros(4, 3).requires_grad_()
    assert cosine_regression(zeros, p) == 2
    assert gradients(cosine_regression(zeros, p), zeros)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_regression_is_computed_in_fp32(dtype):
    p, z = drawn(16, 8).to(dtype), (drawn(16, 8) + 0.1 * drawn(16, 8, seed=1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine_regression(p, z)
    assert found.dtype == torch.float32
    assert_close(found.double(), cosine_regression(p.double(), z.double()), rtol=1e-5, atol=1e-6)


def test_cosine_regression_of_unlike_shapes_is_refused():
    with pytest.raises(ValueError, match=r"^p \(4, 3\), z \(4, 2\): must have one shape"):
        cosine_regression(drawn(4, 3), drawn(4, 2))


# Monitoring


def test_token_std_is_the_deviation_of_the_selected_tokens():
    tokens, mask = drawn(2, 7, 5) * 3 + 1, mask_of(6, 7, 4)
    selected = torch.stack([tokens[row // 3, token] for row in range(6) for token in range(7) if mask.hidden[row, token]])
    assert_close(token_std(tokens, mask), (selected.var(0) + 1e-6).sqrt().mean(), rtol=1e-12, atol=0)
    rows = drawn(6, 7, 5, seed=2)
    assert_close(token_std(rows, mask), (rows[mask.hidden].var(0) + 1e-6).sqrt().mean(), rtol=1e-12, atol=0)
    assert_close(token_std(tokens), (tokens.flatten(0, 1).var(0) + 1e-6).sqrt().mean(), rtol=1e-12, atol=0)


def test_token_std_of_a_constant_is_a_thousandth_and_of_normalised_noise_one():
    for constant in (0.0, 2.0, 5.0):
        assert abs(float(token_std(torch.full((4, 50, 8), constant))) - 0.001) < 1e-6
    assert abs(float(token_std(average_layers([drawn(8, 50, 64)], 1))) - 1) < 0.02


def test_token_std_does_not_count_padding():
    tokens, pad = drawn(4, 7, 5), torch.arange(7) >= torch.tensor([[7], [3], [5], [1]])
    wanted = (tokens[~pad].var(0) + 1e-6).sqrt().mean()
    assert_close(token_std(tokens, pad=pad), wanted, rtol=1e-12, atol=0)
    spoilt = tokens.masked_fill(pad[..., None], math.nan)
    assert_close(token_std(spoilt, pad=pad), wanted, rtol=1e-12, atol=0)
    mask = Mask.of(torch.tensor([[c == "x" for c in row] for row in ("x.x....", ".x.....")]), pad[[0, 2]])
    wanted = (tokens[[0, 2]][mask.hidden].var(0) + 1e-6).sqrt().mean()
    assert_close(token_std(tokens[[0, 2]], mask, pad=pad[[0, 2]]), wanted, rtol=1e-12, atol=0)


def test_token_std_has_no_gradient_and_takes_bf16():
    tokens = drawn(2, 40, 8).bfloat16().requires_grad_()
    found = token_std(tokens)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert_close(found.double(), token_std(tokens.detach().double()), rtol=1e-5, atol=0)


def test_a_constant_reads_as_constant_under_autocast():
    tokens = torch.full((8, 64, 16), 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(token_std(tokens)) == pytest.approx(0.001, rel=1e-3)
