import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmssl.model.decoder import ConvDecoder, ConvDecoderOptions
from mmssl.types import Mask


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(width, grid, **options):
    """In float64 with all weights drawn anew."""
    decoder = ConvDecoder(width, grid, ConvDecoderOptions(**options)).double().eval()
    for i, parameter in enumerate(decoder.parameters()):
        parameter.data = drawn(*parameter.shape, seed=i) / 2
    return decoder


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def convolved(conv, x, grid):
    """One place and channel at a time; x: (L, D)."""
    sides = (1, *grid) if len(grid) == 1 else grid
    weight = conv.weight if conv.weight.dim() == 4 else conv.weight[:, :, None]
    reach = [(size - 1) // 2 for size in weight.shape[2:]]
    share, out = len(weight) // conv.groups, torch.zeros(len(x), len(weight), dtype=x.dtype)
    for row in range(sides[0]):
        for column in range(sides[1]):
            for channel in range(len(weight)):
                first = channel // share * weight.shape[1]
                total = conv.bias[channel].clone()
                for i in range(weight.shape[2]):
                    for j in range(weight.shape[3]):
                        r, c = row + i - reach[0], column + j - reach[1]
                        if 0 <= r < sides[0] and 0 <= c < sides[1]:
                            seen = x[r * sides[1] + c, first : first + weight.shape[1]]
                            total += (weight[channel, :, i, j] * seen).sum()
                out[row * sides[1] + column, channel] = total
    return out


@pytest.mark.parametrize(
    ("grid", "width", "options"),
    [
        ((3, 4), 8, {"dim": 8, "groups": 2, "kernel": 3, "layers": 2}),  # images: every layer adds its input
        ((9,), 8, {"dim": 4, "groups": 2, "kernel": 5, "layers": 3}),  # speech: all but the first
        ((9,), 8, {"dim": 8, "groups": 1, "kernel": 3, "layers": 2, "residual": False, "hidden": 10}),  # text: none
    ],
)
@torch.no_grad()
def test_the_decoder_is_convolution_norm_gelu_and_a_projection(grid, width, options):
    decoder, length = build(width, grid, noise=0.0, **options), math.prod(grid)
    mask = Mask.of(torch.rand(4, length, generator=torch.Generator().manual_seed(0)).argsort(1) < 5)
    visible = drawn(4, length - 5, width, seed=9)
    found = decoder(visible, mask, [0, 1])
    for row in range(4):
        x = torch.zeros(length, width, dtype=torch.float64)
        x[mask.keep[row]] = visible[row]
        for i, conv in enumerate(decoder.convs):
            y = convolved(conv, x, grid)
            y = gelu((y - y.mean(1, True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt())
            adds = options.get("residual", True) and (i > 0 or options["dim"] == width)
            x = x + y if adds else y
        if "hidden" in options:
            first, _, last = decoder.proj
            wanted = gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
        else:
            wanted = x @ decoder.proj.weight.T + decoder.proj.bias
        assert_close(found[row], wanted, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_a_padded_sample_is_decoded_as_if_it_were_alone():
    decoder, lengths = build(8, (9,), dim=8, groups=2, kernel=5, layers=3, noise=0.0), (9, 6)
    pad = torch.arange(9) >= torch.tensor(lengths)[:, None]
    hidden = torch.zeros(4, 9, dtype=torch.bool)
    hidden[:2, 1:5], hidden[2:, 2:4] = True, True
    mask, visible = Mask.of(hidden, pad), drawn(4, 5, 8)
    found = decoder(visible, mask, [0, 1], pad)
    for row, length in zip(range(4), (9, 9, 6, 6)):
        alone = Mask.of(hidden[row : row + 1, :length])
        own = visible[row : row + 1, torch.isin(mask.keep[row], alone.keep[0])]
        assert_close(found[row, :length], decoder(own, alone, [0])[0], rtol=1e-9, atol=1e-11)


def test_dropout_acts_on_visible_tokens_in_training_only():
    torch.manual_seed(0)
    decoder, mask, seen = build(64, (40,), dim=64, groups=1, layers=1, dropout=0.5), Mask.of(torch.arange(40)[None] < 20), []
    decoder.convs[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].T))
    visible = drawn(1, 20, 64)
    decoder(visible, mask, [3])
    decoder.train()(visible, mask, [3])
    assert_close(seen[1][:20], seen[0][:20], rtol=0, atol=0)  # the noise
    dropped = seen[1][20:] == 0
    assert abs(float(dropped.double().mean()) - 0.5) < 0.06  # 4 standard errors
    assert_close(seen[1][20:][~dropped], 2 * visible[0][~dropped])


def test_a_single_projection_starts_as_torch_has_it_and_two_as_the_authors_have_them():
    torch.manual_seed(0)
    single = ConvDecoder(64, (9,), ConvDecoderOptions(dim=64, layers=1)).proj
    assert abs(float(single.weight.detach().std()) * math.sqrt(3 * 64) - 1) < 0.05  # uniform within 1 / sqrt(64)
    for linear in ConvDecoder(64, (9,), ConvDecoderOptions(dim=64, layers=1, hidden=128)).proj[::2]:
        assert isinstance(linear, nn.Linear)
        assert abs(float(linear.weight.detach().std()) / 0.02 - 1) < 0.05
        assert linear.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": -0.1}, "^decoder: noise"),
        ({"hidden": -1}, "^decoder: noise and hidden"),
        ({"dropout": 1.0}, "dropout at least 0 and below 1"),
        ({"kernel": 4}, "the kernel odd"),
        ({"layers": 0}, "at least 1"),
        ({"dim": 1 << 15}, "at most 16384"),
        ({"groups": 3}, r"^decoder\.groups: 3 groups must divide decoder\.dim 16 and hidden_size 16"),
    ],
)
def test_an_impossible_decoder_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        ConvDecoder(16, (9,), ConvDecoderOptions(**{"dim": 16, "groups": 4} | options))
