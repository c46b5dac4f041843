"""Masks over sequences; those over patches are in `vision/test_masks.py`."""

import math

import pytest
import torch

from mmssl.masks import blocks, cover, spans, uniform
from mmssl.random import generator

BASE, LARGE = (0.5, 5, 0.05), (0.55, 5, 0.1)  # ratio, width, adjust: speech, data2vec 2.0


def draws(setting, copies, *parts, length=999, make=blocks, inverse=False):
    return make((length,), copies, *setting, generator(*parts), inverse)


# Blocks


@pytest.mark.parametrize(("setting", "masked"), [(BASE, 499), (LARGE, 549)])
def test_blocks_hide_exactly_their_share(setting, masked):
    hidden = draws(setting, 300, "rows")
    assert (hidden.dtype, hidden.shape) == (torch.bool, (300, 999))
    assert set(hidden.sum(1).tolist()) == {masked}
    assert set((~draws(setting, 300, "rows", inverse=True)).sum(1).tolist()) == {math.floor(999 * (1 - setting[0]))}


@pytest.mark.parametrize(("setting", "share"), [(BASE, 0.421), (LARGE, 0.476)])
def test_segments_cover_as_much_as_the_authors_do(setting, share):
    covered = draws(setting, 4000, "coverage", make=cover).float().mean(1)
    assert abs(float(covered.mean()) - share) < 0.003


def test_topping_up_adds_what_the_authors_add():
    covered, hidden = draws(BASE, 2000, "top", make=cover), draws(BASE, 2000, "top")
    assert abs(float((hidden & ~covered).sum(1).float().mean()) - 78) < 2
    assert not bool((covered & ~hidden)[covered.sum(1) <= 499].any())  # nothing is taken back where there is room


@pytest.mark.parametrize(("length", "width"), [(7, 3), (8, 4), (5, 5), (9, 1)])
def test_segments_lie_around_their_centres_and_end_at_the_edge(length, width):
    one = (0.5, width, 1.999 * width / length - 0.5)  # a single centre
    possible = {frozenset(min(max(centre - width // 2 + i, 0), length - 1) for i in range(width)) for centre in range(length)}
    found = draws(one, 2000, "one", length=length, make=cover)
    assert {frozenset(row.nonzero().flatten().tolist()) for row in found} == possible


# Spans


@pytest.mark.parametrize(("ratio", "width", "share"), [(0.65, 10, 0.49), (0.5, 5, 0.41), (0.55, 5, 0.44)])
def test_spans_hide_as_much_as_the_authors_do(ratio, width, share):
    hidden = torch.cat([spans(1500, 1, ratio, width, generator("spans", i)) for i in range(300)])
    assert abs(float(hidden.float().mean()) - share) < 0.01


def test_single_rows_are_unions_of_whole_spans_that_start_in_range():
    for i in range(200):
        (row,) = spans(60, 1, 0.5, 7, generator("runs", i))
        runs = "".join("x" if h else " " for h in row.tolist()).split()
        assert all(len(run) >= 7 for run in runs)
        assert len(runs) <= math.floor(0.5 * 60 / 7 + 1)
        assert not bool(row[-1])  # starts lie in [0, L - w)


def test_the_number_of_spans_is_rounded_at_random():
    sums = [int(spans(1000, 1, 0.025, 10, generator("u", i)).sum()) for i in range(400)]  # 2.5 spans
    two = sum(s <= 20 for s in sums) / 400
    assert abs(two - 0.5) < 0.1  # 4 standard deviations


def test_there_is_at_least_one_span():
    assert spans(30, 4, 0.01, 5, generator("one")).sum(1).tolist() == [5] * 4


def test_rows_of_spans_are_made_equal_by_unmasking():
    hidden = spans(200, 64, 0.65, 10, generator("equal"))
    assert len(set(hidden.sum(1).tolist())) == 1
    assert len({tuple(row.tolist()) for row in hidden}) == 64
    assert 0 < int(hidden[0].sum()) < 0.49 * 200  # the row that hides fewest decides


def test_a_row_is_never_hidden_as_a_whole():
    for i in range(50):
        assert bool((~spans(8, 3, 1.0, 1, generator("whole", i))).any(1).all())


@pytest.mark.parametrize("length", [9, 10])
def test_a_span_must_fit(length):
    with pytest.raises(ValueError, match=r"^mask\.width: a span of 10"):
        spans(length, 1, 0.5, 10, generator(0))


# Independent tokens


@pytest.mark.parametrize(("ratio", "kept"), [(0.48, 266), (0.5, 256), (0.999, 1), (0.0001, 511)])
def test_uniform_masks_keep_their_share(ratio, kept):
    hidden = uniform(512, 50, ratio, generator("uniform"))
    assert (hidden.dtype, hidden.shape) == (torch.bool, (50, 512))
    assert set((~hidden).sum(1).tolist()) == {kept}


def test_uniform_masks_hide_every_token_as_often():
    hidden = uniform(20, 20_000, 0.4, generator("often")).float()
    assert bool(((hidden.mean(0) - 0.4).abs() < 5 * math.sqrt(0.24 / 20_000)).all())
    neighbours = (hidden[:, 1:] * hidden[:, :-1]).mean()  # without replacement: 8/20 * 7/19
    assert abs(float(neighbours) - 8 / 20 * 7 / 19) < 0.003


# All


@pytest.mark.parametrize(
    "make",
    [
        lambda draw: blocks((50,), 4, 0.5, 5, 0.05, draw),
        lambda draw: spans(50, 4, 0.5, 5, draw),
        lambda draw: uniform(50, 4, 0.5, draw),
    ],
)
def test_masks_repeat_with_their_key_and_change_with_it(make):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(make(generator(1)), make(generator(1)))
    assert not torch.equal(make(generator(1)), make(generator(2)))
    assert torch.equal(torch.get_rng_state(), before)
