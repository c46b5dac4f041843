import math
import random

import pytest
import torch

from mmssl.config import Recipe
from mmssl.masks import blocks, cover
from mmssl.random import generator
from modalities.vision.masks import rectangles

BASE = ((14, 14), 0.8, 3, 0.07)
LARGE = ((14, 14), 0.75, 3, 0.1)
HUGE = ((16, 16), 0.75, 3, 0.1)


def draws(setting, copies, *parts, inverse=True, make=blocks):
    grid, ratio, width, adjust = setting
    return make(grid, copies, ratio, width, adjust, generator(*parts), inverse)


@pytest.mark.parametrize(("setting", "kept", "length"), [(BASE, 39, 196), (LARGE, 49, 196), (HUGE, 64, 256)])
def test_every_row_keeps_exactly_the_same_number_of_patches(setting, kept, length):
    hidden = draws(setting, 1000, "rows")
    assert (hidden.dtype, hidden.shape) == (torch.bool, (1000, length))
    assert set((~hidden).sum(1).tolist()) == {kept}


@pytest.mark.parametrize(("name", "kept"), [("vision/data2vec2-base", 39), ("vision/data2vec2-large", 49)])
def test_the_shipped_recipes_keep_as_many_patches_as_the_authors(name, kept):
    from PIL import Image

    views = Recipe.load(name).build_views()
    view = views.collate([views(Image.new("RGB", (40, 30)), lambda i, sample=s: generator(sample, i)) for s in range(2)])[0]
    assert view.mask.keep.shape == (2 * 16, kept)
    assert view.mask.hidden.shape == (2 * 16, 196)
    assert view.copies == 16


def test_the_masks_of_a_sample_and_of_samples_differ():
    rows = [tuple(row.tolist()) for sample in range(20) for row in draws(BASE, 16, sample)]
    assert len(set(rows)) == 20 * 16


def test_masks_repeat_with_their_key_and_change_with_it():
    assert torch.equal(draws(BASE, 16, 1, "a"), draws(BASE, 16, 1, "a"))
    assert not torch.equal(draws(BASE, 16, 1, "a"), draws(BASE, 16, 2, "a"))


@pytest.mark.parametrize(("setting", "cells", "within"), [(BASE, 37.5, 0.2), (LARGE, 50.3, 0.2), (HUGE, 65.2, 0.2)])
def test_squares_cover_as_much_as_the_authors_do(setting, cells, within):
    covered = draws(setting, 10_000, "coverage", make=cover).sum(1).float()
    assert abs(float(covered.mean()) - cells) < within


def test_equalising_adds_and_removes_as_much_as_the_authors_do():
    covered, kept = draws(BASE, 10_000, "equal", make=cover), ~draws(BASE, 10_000, "equal")
    assert abs(float((kept & ~covered).sum(1).float().mean()) - 2.5) < 0.1
    assert abs(float((covered & ~kept).sum(1).float().mean()) - 0.9) < 0.1


@pytest.mark.parametrize("inverse", [True, False])
def test_equalising_only_adds_where_cells_are_missing_and_only_removes_where_there_are_too_many(inverse):
    setting = LARGE if inverse else ((14, 14), 0.5, 3, 0.3)
    covered = draws(setting, 2000, "exact", inverse=inverse, make=cover)
    chosen = draws(setting, 2000, "exact", inverse=inverse) ^ inverse
    target = 49 if inverse else 98
    seen = set()
    for before, after in zip(covered, chosen):
        missing = target - int(before.sum())
        seen.add((missing > 0) - (missing < 0))
        added, removed = int((after & ~before).sum()), int((before & ~after).sum())
        assert (added, removed) == (max(missing, 0), max(-missing, 0))
    assert seen == {-1, 0, 1}  # all three cases were met


def test_cells_are_removed_and_added_anywhere():
    covered, kept = draws(BASE, 20_000, "where", make=cover), ~draws(BASE, 20_000, "where")
    for changed, candidates in ((kept & ~covered, ~covered), (covered & ~kept, covered)):
        rows = changed.any(1)
        share = (changed[rows].sum(1, keepdim=True) / candidates[rows].sum(1, keepdim=True)) * candidates[rows]
        expected, found = share.sum(0), changed[rows].sum(0)
        assert bool(((found - expected).abs() < 6 * expected.sqrt() + 6).all())  # every cell as often as any other


def neighbours(state):
    """Share of pairs of adjacent cells in the same state."""
    grid = state.view(-1, 14, 14)
    same = [(grid[:, 1:] == grid[:, :-1]).float().mean(), (grid[..., 1:] == grid[..., :-1]).float().mean()]
    return float(sum(same)) / 2


def test_visible_patches_lie_together():
    share = 39 / 196
    scattered = share**2 + (1 - share) ** 2  # 0.68
    found = neighbours(draws(BASE, 10_000, "clusters"))
    assert found > scattered + 0.1
    shuffled = torch.rand(10_000, 196, generator=generator("shuffled")).argsort(1) < 39
    assert abs(neighbours(shuffled) - scattered) < 0.01


def test_squares_are_squares_clamped_at_the_edge():
    for grid, width in (((5, 7), 3), ((6, 6), 2), ((4, 9), 1)):
        length = grid[0] * grid[1]
        adjust = 1.999 * width**2 / length - 0.5  # a single centre
        possible = set()
        for row in range(grid[0]):
            for column in range(grid[1]):
                cells = set()
                for i in range(width):
                    for j in range(width):
                        r = min(max(row - width // 2 + i, 0), grid[0] - 1)
                        c = min(max(column - width // 2 + j, 0), grid[1] - 1)
                        cells.add(r * grid[1] + c)
                possible.add(frozenset(cells))
        found = cover(grid, 3000, 0.5, width, adjust, generator("one"))
        assert {frozenset(row.nonzero().flatten().tolist()) for row in found} == possible


def test_hiding_squares_is_the_other_mode():
    setting = ((14, 14), 0.6, 3, 0.1)
    hidden, covered = (draws(setting, 500, "other", inverse=False, make=make) for make in (blocks, cover))
    assert set(hidden.sum(1).tolist()) == {math.floor(196 * 0.6)}
    # what is hidden agrees with the squares, except for cells that make the rows equal
    assert float((hidden == covered).float().mean()) > 0.85


def test_masks_are_drawn_without_ambient_randomness():
    before = torch.get_rng_state()
    draws(BASE, 4, 0)
    assert torch.equal(torch.get_rng_state(), before)


# Rectangles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "ratio", "hidden"),
    [((14, 14), 0.6123, 120), ((14, 14), 0.05, 9), ((5, 9), 0.4, 18), ((4, 4), 0.6, 9), ((2, 2), 0.5, 2)],
)
def test_rectangles_hide_exactly_the_share_that_is_asked(grid, ratio, hidden):
    found = rectangles(grid, 200, ratio, 16, 0.3, generator("share"))
    assert (found.dtype, found.shape) == (torch.bool, (200, grid[0] * grid[1]))
    assert set(found.sum(1).tolist()) == {hidden}


@pytest.mark.parametrize("name", ["vision/data2vec1-base", "vision/data2vec1-large"])
def test_the_shipped_recipes_hide_120_of_196_patches(name):
    m = Recipe.load(name).views.mask
    assert (m.kind, m.smallest, m.aspect, m.copies) == ("rectangle", 16, 0.3, 1)
    assert math.floor(196 * m.ratio) == 120


def authors(draw):
    """Rows of one 14 x 14 mask of BEiT with 120 hidden patches, a cell at a time."""
    hidden = set()
    while len(hidden) < 120:
        free, added = 120 - len(hidden), set()
        for _ in range(10):
            area, ratio = draw.uniform(16, free), math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= 14 or width >= 14:
                continue
            top, left = draw.randint(0, 14 - height), draw.randint(0, 14 - width)
            added = {(r, c) for r in range(top, top + height) for c in range(left, left + width)} - hidden
            if 0 < len(added) <= free:
                break
            added = set()
        if not added:
            break
        hidden |= added
    clear = [(r, c) for r in range(14) for c in range(14) if (r, c) not in hidden]
    hidden |= set(draw.sample(clear, 120 - len(hidden)))
    return [[(r, c) in hidden for c in range(14)] for r in range(14)]


def test_rectangles_lie_where_those_of_the_authors_do_and_are_as_compact():
    draw = random.Random(0)
    wanted = torch.tensor([authors(draw) for _ in range(1500)])
    found = rectangles((14, 14), 1500, 0.6123, 16, 0.3, generator("authors")).view(-1, 14, 14)
    assert abs(neighbours(found) - neighbours(wanted)) < 0.005
    assert neighbours(found) > 0.85  # scattered patches would have 0.53
    assert float((found.float().mean(0) - wanted.float().mean(0)).abs().max()) < 0.09  # 5 standard errors


def test_rectangles_repeat_with_their_key_and_use_no_ambient_randomness():
    before = torch.get_rng_state()
    first, again, other = (rectangles((14, 14), 8, 0.6, 16, 0.3, generator(key)) for key in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first}) == 8
    assert torch.equal(torch.get_rng_state(), before)
