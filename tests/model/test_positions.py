import math

import pytest
import torch
from torch.testing import assert_close

from mmssl.model.positions import SinCos2d, take
from mmssl.types import Mask


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
    found = positions(tokens, mask)
    for row, kept in enumerate([(2, 4), (0, 5), (0, 1), (1, 3)]):
        for place, position in enumerate(kept):
            assert_close(found[row, place], tokens[row // 2, position] + positions.table[0, position], rtol=0, atol=0)
    assert_close(positions(tokens), tokens + positions.table, rtol=0, atol=0)
    assert take(tokens, None) is tokens


def test_positions_are_saved_but_not_trained():
    positions = SinCos2d(8, (2, 2))
    assert not list(positions.parameters())
    assert list(positions.state_dict()) == ["table"]


def test_a_width_that_cannot_be_quartered_is_refused():
    with pytest.raises(ValueError, match="hidden_size: 6 is not"):
        SinCos2d(6, (2, 2))
