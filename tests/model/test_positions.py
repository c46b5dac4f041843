import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.model.attention import Attention, Turns
from mmssl.model.positions import (
    Alibi,
    ConvPositions,
    Learned2d,
    RelativeBias,
    Rotary2d,
    SinCos2d,
    attention_bias,
    slopes,
    take,
    take_pad,
)
from mmssl.types import Mask
from tests.losses.cases import MASKED, drawn, tensor


@pytest.mark.parametrize(("dim", "grid"), [(8, (3, 3)), (768, (14, 14)), (12, (2, 5))])
def test_the_table_is_the_formula(dim, grid):
    quarter = dim // 4
    table = SinCos2d(dim, grid).table[0]
    assert table.shape == (grid[0] * grid[1], dim)
    for row in {0, 1, grid[0] - 1}:
        for column in {0, 1, grid[1] - 1}:
            wanted = []
            for position in (column, row):
                angles = [position * 10000 ** (-i / quarter) for i in range(quarter)]
                wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found = table[row * grid[1] + column].double()
            assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)


def test_columns_change_the_first_half_of_the_channels_and_rows_the_second():
    table = SinCos2d(768, (14, 14)).table[0]
    sine, cosine = table[0].view(2, 2, 192).unbind(1)
    assert sine.abs().max() == 0
    assert (cosine - 1).abs().max() == 0
    changed = [(table[place] != table[0]).nonzero().flatten() for place in (1, 14)]
    assert changed[0].max() < 384 <= changed[1].min()
    assert min(len(where) for where in changed) > 100


def test_positions_are_added_before_tokens_are_hidden_and_once_per_sample():
    positions, tokens = SinCos2d(8, (2, 3)), torch.randn(2, 6, 8)
    mask = Mask.of(torch.tensor([[c == "x" for c in row] for row in ("xx.x.x", ".xxxx.", "..xxxx", "x.x.xx")]))
    found, _ = positions(tokens, mask)
    for row, kept in enumerate([(2, 4), (0, 5), (0, 1), (1, 3)]):
        for place, position in enumerate(kept):
            assert_close(found[row, place], tokens[row // 2, position] + positions.table[0, position], rtol=0, atol=0)
    assert_close(positions(tokens)[0], tokens + positions.table, rtol=0, atol=0)
    assert take(tokens, None) is tokens


def test_positions_are_saved_but_not_trained():
    positions = SinCos2d(8, (2, 2))
    assert not list(positions.parameters())
    assert list(positions.state_dict()) == ["table"]


@pytest.mark.parametrize(("grid", "side"), [((6, 6), 3), ((4, 4), 3), ((2, 5), 3), ((3, 3), 6)])
def test_a_square_of_another_size_lies_evenly_over_the_same_grid(grid, side):
    positions, quarter = SinCos2d(8, grid), 2
    found = positions(torch.zeros(1, side * side, 8))[0][0]
    for row in range(side):
        for column in range(side):
            wanted = []
            for place, whole in ((column, grid[1]), (row, grid[0])):
                angles = [((place + 0.5) * whole / side - 0.5) * 10000 ** (-i / quarter) for i in range(quarter)]
                wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert_close(found[row * side + column].double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)
    assert list(positions.state_dict()) == ["table"]
    again = torch.ones(2, side * side, 8, dtype=torch.float64)
    assert_close(positions(again)[0][1], 1 + found.double(), rtol=0, atol=0)


def test_patches_of_two_sizes_have_the_same_mean_position():
    """Half as many patches a side: each lies in the middle of the four that it covers."""
    positions = SinCos2d(8, (8, 8))
    fine, coarse = positions.table[0], positions(torch.zeros(1, 16, 8))[0][0]
    angle = [torch.atan2(table[:, 1::4], table[:, 3::4]) for table in (fine, coarse)]  # slow waves: of column and row
    four = angle[0].view(4, 2, 4, 2, 2).mean((1, 3)).flatten(0, 1)
    assert_close(angle[1], four, rtol=1e-5, atol=1e-6)


def test_another_number_of_tokens_must_be_a_square():
    with pytest.raises(ValueError, match=r"^image_size: 6 patches form no square"):
        SinCos2d(8, (4, 4))(torch.zeros(1, 6, 8))
    with pytest.raises(ValueError, match=r"^positions: relative ones know images of 4 x 4 patches, this has 9"):
        RelativeBias((4, 4), 2, extra=1)(torch.zeros(1, 9, 8))


def test_a_width_that_cannot_be_quartered_is_refused():
    with pytest.raises(ValueError, match="hidden_size: 6 is not"):
        SinCos2d(6, (2, 2))


# Biases of the attention -----------------------------------------------------------------------------------------------


def test_slopes_are_powers_of_two_and_those_between():
    twelve = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.707107, 0.353553, 0.176777, 0.088388]
    assert slopes(12, torch.zeros(())).tolist() == pytest.approx(twelve, abs=5e-7)
    assert slopes(16, torch.zeros(())).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    assert slopes(1, torch.zeros(())).tolist() == [2**-8]
    assert slopes(3, torch.zeros(())).tolist() == pytest.approx([2**-4, 2**-8, 2**-2])


def test_a_bias_falls_with_the_distance_on_the_original_timeline():
    alibi = Alibi(12)
    whole, keep = alibi(12), torch.tensor([[0, 3, 10], [3, 4, 11]])
    assert whole.shape == (1, 12, 12, 12)
    for i in range(12):
        for j in range(12):
            assert_close(whole[0, :, i, j], -slopes(12, whole) * abs(i - j))
    kept = alibi(12, keep)
    assert kept.shape == (2, 12, 3, 3)
    assert_close(kept[0, :, 1, 2], -7 * slopes(12, whole))  # places 3 and 10
    for row in range(2):
        assert_close(kept[row], whole[0][:, keep[row]][:, :, keep[row]], rtol=0, atol=0)


def test_the_learned_scale_multiplies_each_head_and_does_not_fall_below_zero():
    alibi = Alibi(4)
    alibi.scale.data = torch.tensor([2.0, 0.0, -3.0, 0.5])
    found = alibi(5)[0]
    assert_close(found[:, 0, 4], -4 * slopes(4, found) * torch.tensor([2.0, 0.0, 0.0, 0.5]))


def test_extra_tokens_have_no_distance():
    found = Alibi(4, extra=2)(5, torch.tensor([[1, 4]]))
    assert found.shape == (1, 4, 4, 4)
    assert found[..., :2, :].abs().max() == found[..., :, :2].abs().max() == 0
    assert_close(found[0, :, 2, 3], -3 * slopes(4, found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_are_exact_in_a_model_of_low_precision(dtype):
    found = Alibi(12).to(dtype)(999)
    assert found.dtype == torch.float32
    assert_close(found, Alibi(12)(999), rtol=0, atol=0)


def test_relative_biases_are_looked_up_by_rows_and_columns_apart():
    bias, tokens = RelativeBias((2, 3), heads=2, extra=1), torch.zeros(2, 6, 4)
    bias.table.weight.data = torch.arange(18 * 2.0).view(18, 2)  # 3 * 5 pairs, and three for the extra token
    _, found = bias(tokens)
    for i in range(6):
        for j in range(6):
            entry = (i // 3 - j // 3 + 1) * 5 + i % 3 - j % 3 + 2
            assert found[0, :, 1 + i, 1 + j].tolist() == [2 * entry, 2 * entry + 1]
    assert found[0, 0, 0, 1:].tolist() == [30] * 6  # from the extra token
    assert found[0, 0, 1:, 0].tolist() == [32] * 6  # towards it
    assert found[0, 0, 0, 0] == 34
    mask = Mask.of(torch.tensor([[c == "x" for c in row] for row in ("xx.x.x", ".xxxx.")]))
    kept, some = bias(tokens, mask)
    assert kept.shape == (2, 2, 4)
    for row, places in enumerate([(0, 3, 5), (0, 1, 6)]):
        assert_close(some[row], found[0][:, places][:, :, places], rtol=0, atol=0)
    assert RelativeBias((2, 3), 2, extra=0)(tokens)[1].shape == (1, 2, 6, 6)
    with pytest.raises(ValueError, match=r"^extra_tokens: 2"):
        RelativeBias((2, 3), 2, extra=2)


def test_padding_is_hidden_as_a_key_and_extra_tokens_never_are():
    pad = torch.tensor([[False, False, True], [False, True, True]])
    assert attention_bias(None, None, 1) is None
    attend = attention_bias(None, pad, 1)
    assert attend.tolist() == [[[[True, True, True, False]]], [[[True, True, False, False]]]]
    bias = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    added = attention_bias(bias, pad, 1)
    assert added.shape == (2, 2, 4, 4)
    for row in range(2):
        hide = ~attend[row, 0, 0]
        assert bool((added[row][..., hide] == -math.inf).all())
        assert_close(added[row][..., ~hide], bias[0][..., ~hide], rtol=0, atol=0)
    assert take_pad(None, None) is None
    pad = torch.tensor([[False] * 4, [False, False, True, True]])
    mask = Mask.of(torch.tensor([[c == "x" for c in row] for row in (".xx.", "x...", "x...", ".x..")])[[0, 0, 2, 3]], pad)
    assert take_pad(pad, mask).tolist() == [[False, False], [False, False], [False, True], [False, True]]


# Convolutional positions -----------------------------------------------------------------------------------------------


def stack(positions, x):
    """The code of one row (L, D), a frame at a time."""
    for conv in positions.convs:
        kernel, out = conv.kernel_size[0], []
        padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
        group, width = conv.weight.shape[1], conv.weight.shape[0] // conv.groups
        for frame in range(len(x)):
            y = conv.bias.clone()
            for channel in range(len(y)):
                first = channel // width * group
                y[channel] += (conv.weight[channel].T * padded[frame : frame + kernel, first : first + group]).sum()
            y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
            out.append(torch.tensor([float(v) * 0.5 * (1 + math.erf(float(v) / math.sqrt(2))) for v in y]))
        x = torch.stack(out).double()
    return x


@pytest.mark.parametrize("kernel", [3, 4])
@torch.no_grad()
def test_conv_positions_see_masked_frames_as_zeros_and_are_added_to_what_is_kept(kernel):
    torch.manual_seed(0)
    positions = ConvPositions(6, 2, kernel, 2, Alibi(3)).double()
    tokens, hidden = torch.randn(2, 7, 6).double(), torch.rand(4, 7).argsort(1) < 3
    mask = Mask.of(hidden)
    found, bias = positions(tokens, mask)
    for row in range(4):
        x, keep = tokens[row // 2], mask.keep[row]
        wanted = (x + stack(positions, x.masked_fill(hidden[row, :, None], 0.0)))[keep]
        assert_close(found[row], wanted, rtol=1e-5, atol=1e-6)
        assert_close(bias[row], positions.bias(7)[0][:, keep][:, :, keep], rtol=0, atol=0)
    whole, bias = positions(tokens)
    assert_close(whole[1], tokens[1] + stack(positions, tokens[1]), rtol=1e-5, atol=1e-6)
    assert bias.shape == (1, 3, 7, 7)


@torch.no_grad()
def test_conv_positions_do_not_depend_on_padding():
    torch.manual_seed(0)
    positions = ConvPositions(8, 5, 19, 4).double()
    tokens = torch.randn(2, 40, 8).double()
    pad = torch.arange(40) >= torch.tensor([[40], [25]])
    found, bias = positions(tokens, None, pad)
    assert bias is None
    assert_close(found[1, :25], positions(tokens[1:, :25])[0][0], rtol=1e-10, atol=1e-12)
    refilled = positions(tokens.masked_fill(pad[..., None], 0.0))[0]  # zeroed before the first layer only
    assert float((refilled[1, :25] - found[1, :25]).abs().max()) > 0.1
    hidden = torch.zeros(4, 40, dtype=torch.bool)
    hidden[:, 3:9] = True
    kept, _ = positions(tokens, Mask.of(hidden, pad), pad)
    alone, _ = positions(tokens[1:, :25], Mask.of(hidden[2:, :25]))
    assert_close(kept[2:, :19], alone, rtol=1e-10, atol=1e-12)


def test_scaled_positions_are_smaller_by_that_factor():
    whole, small = SinCos2d(8, (4, 4)), SinCos2d(8, (4, 4), 0.25)
    for side in (4, 2):
        zeros = torch.zeros(1, side * side, 8)
        torch.testing.assert_close(small(zeros)[0], 0.25 * whole(zeros)[0])


@pytest.mark.parametrize("side", [8, 14, 16])
def test_the_table_of_relative_biases_has_a_row_for_each_pair_and_three_for_cls(side):
    assert RelativeBias((side, side), 2, 1).table.num_embeddings == MASKED["relative_position_table"][f"grid{side}"]


def test_positions_that_turn_have_the_reference_values():
    case = MASKED["rope2d_base100"]
    token, place = tensor(case["token"]), tensor(case["position_yx"])
    found = Turns.of(place[None, None], len(token), case["base"]).apply(token[None, None, None])
    assert_close(found[0, 0, 0], tensor(case["output"]), rtol=1e-9, atol=0)


def test_products_of_what_is_turned_know_how_far_apart_places_are_and_nothing_else():
    q, k = drawn(2, 3, 1, 12, seed=1), drawn(2, 3, 1, 12, seed=2)  # (B, heads, L, d)

    def product(first, second):
        both = (Turns.of(tensor([[place]]), 12).apply(x) for x, place in ((q, first), (k, second)))
        return (next(both) * next(both)).sum(-1)

    assert_close(product((1, 5), (3, 2)), product((4, 9), (6, 6)), rtol=1e-10, atol=1e-12)
    assert float((product((1, 5), (3, 2)) - product((5, 1), (2, 3))).abs().max()) > 0.1
    assert_close(Turns.of(torch.zeros(1, 1, 2).double(), 12).apply(q), q, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^heads: 6 channels"):
        Turns.of(torch.zeros(1, 1, 2), 6)


def test_half_precision_turns_as_precisely_as_it_can_be_written():
    q = drawn(2, 3, 9, 12, seed=1).bfloat16()
    turns = Turns.of(torch.arange(18.0).view(1, 9, 2), 12)
    wanted = Turns.of(torch.arange(18.0).view(1, 9, 2).double(), 12).apply(q.double())
    assert turns.apply(q).dtype == torch.bfloat16
    assert_close(turns.apply(q), wanted.bfloat16(), rtol=2**-8, atol=1e-6)


@torch.no_grad()
def test_visible_tokens_turn_with_their_own_place_and_extra_ones_do_not():
    positions, tokens = Rotary2d(8, 2), drawn(2, 16, 8, seed=1)
    mask = Mask.of(torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(1).argsort(1) < 9)
    whole, seen = positions(tokens)[1], positions(tokens, mask)[1]
    assert whole.cos.shape == (1, 1, 18, 2, 2)
    for row in range(4):
        chosen = torch.cat([torch.arange(2), mask.keep[row] + 2])
        assert torch.equal(seen.sin[row, 0], whole.sin[0, 0, chosen])
    assert torch.equal(whole.sin[0, 0, :2], torch.zeros(2, 2, 2))
    assert torch.equal(whole.cos[0, 0, :2], torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match=r"^image_size: 6 patches form no square"):
        positions(torch.zeros(1, 6, 8))


@torch.no_grad()
def test_what_is_hidden_is_hidden_from_tokens_that_turn():
    torch.manual_seed(0)
    attention, x = Attention(16, 2).double(), drawn(1, 10, 16, seed=2)
    turns = Rotary2d(8, 1)(torch.zeros(1, 9, 16))[1]
    attend = torch.ones(1, 9, dtype=torch.bool)
    attend[0, 4] = False
    told = attention_bias(turns, None, 1, attend)
    other = x.clone()
    other[:, 5] = 3.0
    rest = [i for i in range(10) if i != 5]
    assert_close(attention(x, told)[:, rest], attention(other, told)[:, rest], rtol=0, atol=0)
    assert float((attention(x, turns)[:, rest] - attention(other, turns)[:, rest]).abs().max()) > 1e-3


def test_interpolated_positions_are_those_of_the_plain_factor_and_not_of_a_fudged_one():
    case = MASKED["position_interpolation_fudge"]
    torch.manual_seed(0)
    positions = Learned2d(32, (14, 14))
    grid = positions.table.detach().unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    for side, told in case["max_abs_difference"].items():
        found = positions._table(int(side) ** 2).detach().unflatten(1, (int(side), int(side))).permute(0, 3, 1, 2)
        plain, fudged = (
            F.interpolate(grid, scale_factor=(int(side) + more) / 14, mode="bicubic", align_corners=False) for more in (0, 0.1)
        )
        assert float((found - plain).abs().max()) <= case["plain_scale_factor_difference"] + 1e-6
        assert told / 3 < float((found - fudged).abs().max()) < told * 3  # of another table
