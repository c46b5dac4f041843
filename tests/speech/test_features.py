import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.model.positions import Alibi, SingleConvPositions, WeightNormConv
from mmssl.types import Mask
from modalities.speech.features import KERNELS, STRIDES, SpeechFeatures

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())
KINDS = {"layer": {}, "layer and bias": {"conv_bias": True}, "group": {"conv_norm": "group"}}


def features(dim=16, channels=8, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SpeechFeatures(dim, channels, position_groups=4, **options).double().eval()
        for parameter in made.parameters():  # norms and biases start at ones and zeros
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return made


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


# Convolutions over the wave --------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_vectors():
    case = CASES["wav2vec_conv"]
    assert (list(KERNELS), list(STRIDES)) == (case["kernels"], case["strides"])
    assert (SpeechFeatures.receptive_field, SpeechFeatures.stride) == (case["receptive_field"], case["total_stride"])
    assert SpeechFeatures.frames(399) == case["frames_399"] == 0
    assert {int(n): SpeechFeatures.frames(int(n)) for n in case["frames"]} == {int(n): f for n, f in case["frames"].items()}
    every = range(400, 400_001, 7)
    assert all(SpeechFeatures.frames(n) == (n - 400) // 320 + 1 for n in every)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_convolution_norm_and_gelu_seven_times_then_norm_and_projection(kind):
    made, wave = features(**KINDS[kind]), noise(2, 1200)
    x = wave[:, None]
    for i, stride in enumerate(STRIDES):
        conv, norm = made.convs[i], made.norms[i]
        assert (conv.bias is None) == ("bias" not in kind)
        windows = x.unfold(2, KERNELS[i], stride)  # (B, C, L, K)
        x = torch.einsum("bclk,ock->bol", windows, conv.weight) + (0.0 if conv.bias is None else conv.bias[:, None])
        if kind != "group" or i == 0:
            over = 2 if kind == "group" else 1
            mean, variance = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    x = x.transpose(1, 2)
    assert_close(made.listen(wave), x, rtol=0, atol=1e-11)
    x = F.layer_norm(x, (8,), made.norm.weight, made.norm.bias) @ made.proj.weight.T + made.proj.bias
    assert x.shape == (2, 3, 16)
    assert_close(made(wave), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "local"), [("layer", True), ("layer and bias", True), ("group", False)])
def test_a_frame_hears_the_400_samples_from_320_times_its_place(kind, local):
    made, wave = features(**KINDS[kind]), noise(1, 2000).requires_grad_()
    (gradient,) = torch.autograd.grad(made(wave)[0, 2].sin().sum(), wave)
    inside = gradient[0, 640:1040].abs()
    assert float((inside > 0).double().mean()) > 0.99
    outside = torch.cat([gradient[0, :640], gradient[0, 1040:]]).abs()
    assert (float(outside.max()) == 0.0) == local


@torch.no_grad()
def test_padding_changes_the_features_of_group_norm_only():
    short = noise(1, 8000)
    padded = F.pad(short, (0, 3000))
    for kind, options in KINDS.items():
        made = features(**options).float()
        apart = float((made(padded.float())[:, :24] - made(short.float())).abs().max())
        assert apart < 1e-4 if kind != "group" else apart > 0.05


def test_the_convolutions_have_as_many_parameters_as_those_of_the_vectors():
    wanted = CASES["wav2vec2_conv_params"]
    with torch.device("meta"):
        base, large = SpeechFeatures(768, conv_norm="group"), SpeechFeatures(1024, conv_bias=True)
    for made, name in ((base, "base_group_norm_no_bias"), (large, "large_layer_norm_with_bias")):
        assert sum(p.numel() for part in (made.convs, made.norms) for p in part.parameters()) == wanted[name]


def test_convolutions_start_as_kaiming_says():
    torch.manual_seed(0)
    made = SpeechFeatures(16, 128, conv_norm="group", conv_bias=True)
    for conv, inputs, kernel in zip(made.convs, [1] + [128] * 6, KERNELS):
        assert float(conv.weight.detach().std()) == pytest.approx((2 / (inputs * kernel)) ** 0.5, rel=0.06)
        assert float(conv.bias.detach().abs().max()) <= (inputs * kernel) ** -0.5


# The wide convolution of positions -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_norm_of_a_weight_is_taken_at_each_tap():
    case = CASES["weight_norm_dim2"]
    v, g, w, wrong = (torch.tensor(case[name]).double() for name in ("v", "g", "w", "wrong_dim0"))
    conv = WeightNormConv(2, 2, 1).double()
    conv.v.copy_(v), conv.g.copy_(g)
    x = noise(3, 2, 6)
    assert_close(conv(x), F.conv1d(x, w, padding=1), rtol=0, atol=1e-7)  # float32 vectors
    assert_close(conv(x), F.conv1d(x, torch._weight_norm(v, g, 2), padding=1), rtol=0, atol=1e-12)
    assert float((conv(x) - F.conv1d(x, wrong, padding=1)).abs().max()) > 0.1


def test_the_norm_of_a_weight_starts_as_it_is_and_learns():
    torch.manual_seed(0)
    conv = WeightNormConv(64, 16, 4)
    assert {name: tuple(p.shape) for name, p in conv.named_parameters()} == {"v": (64, 16, 16), "g": (1, 1, 16), "bias": (64,)}
    assert float(conv.v.detach().std()) == pytest.approx((4 / (16 * 64)) ** 0.5, rel=0.03)
    assert not bool(conv.bias.any())
    x = torch.randn(2, 64, 9)
    assert_close(conv(x), F.conv1d(x, conv.v, padding=8, groups=4))
    conv(x).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in conv.parameters())
    along = (conv.v.grad * conv.v.detach()).sum((0, 1))  # the length of v is of no consequence
    assert float(along.abs().max()) < 1e-4 * float(conv.v.grad.abs().sum())


@torch.no_grad()
def test_weights_of_low_precision_are_normalised_in_a_higher_one():
    conv = WeightNormConv(64, 4, 1).bfloat16()
    x = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    x[0, range(64), range(64)] = 1.0
    exact = torch._weight_norm(conv.v.double(), conv.g.double(), 2)
    found = conv(x)[0].double()  # row of output channels, one tap of one input at each place
    wanted = F.conv1d(x.double(), exact, padding=2)[0]
    assert found.shape == wanted.shape == (64, 65)
    assert float((found - wanted).abs().max()) < 2.0**-7 * float(wanted.abs().max())


@pytest.mark.parametrize("kernel", [128, 19])
@torch.no_grad()
def test_positions_of_an_even_kernel_drop_the_last_frame(kernel):
    positions, x = SingleConvPositions(8, kernel, 4).double(), noise(2, 30, 8)
    whole = positions.conv(x.transpose(1, 2))
    assert whole.shape[2] == 31 - kernel % 2
    found, bias = positions(x)
    assert bias is None
    assert_close(found, x + F.gelu(whole[..., :30]).transpose(1, 2), rtol=0, atol=0)


@torch.no_grad()
def test_positions_see_hidden_frames_and_padding_as_zeros_and_are_added_to_what_is_kept():
    positions, tokens = SingleConvPositions(8, 6, 4, Alibi(2)).double(), noise(2, 12, 8)
    hidden = torch.zeros(4, 12, dtype=torch.bool)
    for row, first in enumerate((1, 3, 0, 4)):
        hidden[row, first : first + 4] = True
    pad = torch.arange(12) >= torch.tensor([[12], [9]])
    mask = Mask.of(hidden, pad)
    found, bias = positions(tokens, mask, pad)
    for row in range(4):
        x, keep = tokens[row // 2, : 12 if row < 2 else 9], mask.keep[row]
        seen = x.masked_fill(hidden[row, : len(x), None], 0.0)
        valid = keep < len(x)
        assert_close(found[row][valid], (x + positions(seen[None])[0][0] - seen)[keep[valid]], rtol=0, atol=1e-12)
        assert_close(bias[row], positions.bias(12)[0][:, keep][:, :, keep], rtol=0, atol=0)


def test_options_choose_the_positions():
    assert type(features(positions="single", position_kernel=128).positions(2, 0)) is SingleConvPositions
    single = features(positions="single", position_kernel=128, alibi=False).positions(2, 0)
    assert (single.conv.v.shape, single.bias) == ((16, 4, 128), None)
    with pytest.raises(ValueError, match=r"^position_groups: 3 groups must divide hidden_size 16"):
        SpeechFeatures(16, 8, positions="single", position_groups=3)
