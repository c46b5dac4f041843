import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mmssl.config import DataOptions, Recipe
from mmssl.data.dataset import KeyedDataset
from mmssl.data.quarantine import Quarantine
from mmssl.data.sampler import KeyBatches
from mmssl.data.sources import open_source
from mmssl.masks import blocks, cover, uniform
from mmssl.random import generator
from mmssl.registry import modality
from mmssl.types import Batch
from modalities.vision.augment import Crop
from modalities.vision.features import PatchFeatures
from modalities.vision.masks import (
    block_size,
    block_sizes,
    equal_context,
    grown,
    mixed,
    multiblock,
    rectangles,
    units,
    usual_context,
)
from modalities.vision.views import ImageViews, MaskOptions

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


# Squares in rank and file, nothing or rectangles ------------------------------------------------------------------------

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())


@pytest.mark.parametrize("row", VECTORS["simmim_mask_counts"]["rows"])
def test_units_are_as_many_as_the_authors_and_hide_whole_squares(row):
    side, width = row["input"] // row["model_patch"], row["mask_patch"] // row["model_patch"]
    hidden = units((side, side), 50, 0.6, width, generator("units"))
    assert set(hidden.sum(1).tolist()) == {row["masked_tokens"]}
    cut = hidden.view(50, side // width, width, side // width, width).transpose(2, 3).flatten(3)
    assert torch.equal(cut.all(3), cut.any(3))
    assert set(cut.all(3).flatten(1).sum(1).tolist()) == {row["masked_units"]}


@pytest.mark.parametrize("row", VECTORS["len_keep_truncation"]["rows"])
def test_random_masks_keep_as_many_as_mae_but_never_none(row):
    kept = (~uniform(row["L"], 20, row["ratio"], generator("mae"))).sum(1)
    assert set(kept.tolist()) == {max(1, row["len_keep"])}


@pytest.mark.parametrize("row", VECTORS["beit_mask_statistics"]["rows"])
def test_rectangles_stop_short_as_often_as_those_of_the_authors(row):
    draw = generator("short", row["target"])
    counts = torch.stack([grown((14, 14), row["target"], 16, 0.3, draw).sum() for _ in range(1200)]).float()
    assert abs(float(counts.mean()) - row["mean"]) < 0.15  # 5 standard errors
    assert abs(float((counts == row["target"]).float().mean()) - row["p_exact"]) < 0.05
    assert row["minimum"] - 5 <= float(counts.min()) <= float(counts.max()) == row["target"]


def test_half_of_mixed_masks_hide_nothing_and_the_others_a_uniform_share():
    hidden = mixed((14, 14), 2000, 0.5, (0.1, 0.5), 16, 0.3, generator("mixed"))
    counts = hidden.sum(1)
    assert abs(float((counts == 0).float().mean()) - 0.5) < 0.04
    some = counts[counts > 0].float() / 196
    assert float(some.min()) > 0
    assert float(some.max()) <= 0.5
    assert abs(float(some.mean()) - 0.29) < 0.015  # of 0.3, less what stops short
    quarters = torch.histc(some, 4, 0.1, 0.5) / len(some)
    assert float((quarters - 0.25).abs().max()) < 0.06
    assert bool(mixed((8, 8), 50, 1.0, (0.1, 0.5), 4, 0.3, generator("all")).any(1).float().mean() > 0.9)


# Several blocks ---------------------------------------------------------------------------------------------------------

TARGET, CONTEXT = ((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0))


@pytest.mark.parametrize("side", [8, 14, 16])
@pytest.mark.parametrize(("name", "ranges"), [("pred", TARGET), ("enc", CONTEXT)])
def test_blocks_have_the_sizes_of_the_authors(side, name, ranges):
    wanted = {(h, w): share for h, w, share in VECTORS["ijepa_block_sizes"][f"{name}_{side}x{side}"]}
    found = Counter(block_size((side, side), *ranges, i / 4000) for i in range(4001))
    assert set(found) == set(wanted) == block_sizes((side, side), *ranges)
    assert all(abs(found[size] / 4001 - share) < 0.01 for size, share in wanted.items())


def test_published_places_are_those_of_the_authors_and_ours_reach_the_edge():
    wanted, draw = VECTORS["ijepa_target_coverage"], generator("coverage")
    count = torch.zeros(2, 196)
    for i, published in enumerate((True, False)):
        for _ in range(800):
            size = block_size((14, 14), *TARGET, float(torch.rand((), generator=draw)))
            blocks = multiblock((14, 14), 1, (13, 13), size, 4, 10, draw, published)
            count[i].index_add_(0, blocks.wanted.flatten(), torch.ones(blocks.wanted.numel()))
    grid = count.view(2, 14, 14) / (800 * 4)
    assert abs(float(grid[0, 0, 0]) - wanted["p_covered_corner_0_0"]) < 0.012
    assert abs(float(grid[0, 6, 6]) - wanted["p_covered_center_6_6"]) < 0.05
    assert float(grid[0, 13].max()) == float(grid[0, :, 13].max()) == 0
    assert float(grid[1, 13, 1:13].min()) > 0
    assert abs(float(grid[1, 0, 0]) - float(grid[1, 13, 13])) < 0.01


def image_views(side=14, crops=None, **mask):
    features = PatchFeatures(8, image_size=side * 4, patch_size=4)
    return ImageViews(features, mask=MaskOptions(**mask), crops=crops)


def views_of(maker, samples):
    image = Image.new("RGB", (40, 30))
    return [maker(image, lambda i, sample=s: generator("sample", sample, i)) for s in samples]


@pytest.mark.parametrize("published", [False, True])
def test_contexts_never_hold_what_is_to_be_predicted_and_rows_are_equally_long(published):
    maker = image_views(kind="multiblock", copies=2, published=published)
    mask = maker.collate(views_of(maker, range(16)))[0].mask
    rows, groups, count = mask.wanted.shape
    assert (rows, groups) == (32, 4)
    assert mask.keep.shape[0] == 32
    assert 10 < mask.keep.shape[1] < 120
    for row in range(32):
        kept = {*mask.keep[row].tolist()}
        assert not kept & {*mask.wanted[row].flatten().tolist()}
        assert kept == {*(~mask.hidden[row]).nonzero().flatten().tolist()}
        for group in mask.wanted[row]:
            top, left = divmod(int(group[0]), 14)
            height, width = int(group[-1]) // 14 - top + 1, int(group[-1]) % 14 - left + 1
            assert height * width == count
            assert group.tolist() == [r * 14 + c for r in range(top, top + height) for c in range(left, left + width)]
    assert len({tuple(row.flatten().tolist()) for row in mask.wanted}) == 32


def test_places_are_the_sample_s_own_and_repeat_with_their_key():
    maker = image_views(kind="multiblock", copies=1)
    whole = maker.collate(views_of(maker, range(6)))[0].mask
    again = maker.collate(views_of(maker, range(6)))[0].mask
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    part = maker.collate(views_of(maker, (0, 3)))[0].mask  # sizes are the first sample's
    assert torch.equal(part.wanted, whole.wanted[[0, 3]])


def micro_batch(folder, maker, seed, step, rank, world):
    """Mask of the whole micro-batch of a rank, as the loader makes it."""
    source = open_source(DataOptions(path=str(folder), modality="vision"), modality("vision"), "train")
    data = KeyedDataset(source, modality("vision"), maker, seed, Quarantine(None, 1.0, 100))
    keys = KeyBatches(source.size, 8, 8 // world, rank, world, step + 1, seed, start_step=step)
    loader = DataLoader(data, batch_sampler=keys, collate_fn=data.collate)
    return Batch.from_tensors(next(iter(loader))).views[0].mask


def test_several_blocks_of_two_ranks_are_those_of_one_process(image_folder):
    maker, sizes = image_views(kind="multiblock", copies=2), set()
    for step in range(4):  # an epoch has four updates
        whole = micro_batch(image_folder, maker, 0, step, 0, 1)
        halves = [micro_batch(image_folder, maker, 0, step, rank, 2) for rank in range(2)]
        for name in ("hidden", "keep", "restore", "wanted"):
            one, two = (getattr(mask, name) for mask in halves)
            both = torch.stack([one.unflatten(0, (4, 2)), two.unflatten(0, (4, 2))], 1)  # ranks take turns
            assert torch.equal(both.flatten(0, 2), getattr(whole, name)), name
        sizes.add((whole.wanted.shape[2], whole.keep.shape[1]))
    assert len(sizes) > 1  # each update has its own
    other, again = (micro_batch(image_folder, maker, seed, 0, 0, 1) for seed in (1, 0))
    assert other.wanted.shape != again.wanted.shape or not torch.equal(other.wanted, again.wanted)


def test_the_usual_context_is_one_that_nearly_all_masks_reach():
    size = usual_context((14, 14), (13, 13), (6, 6), 4, 10)
    rows = [multiblock((14, 14), 1, (13, 13), (6, 6), 4, 10, generator("usual", i)) for i in range(300)]
    assert 0.9 < sum(int(row.context.sum()) >= size for row in rows) / 300 < 1
    again = multiblock((14, 14), 100, (13, 13), (6, 6), 4, 10, generator("again"), enough=size)
    assert int(again.context.sum(1).min()) >= size
    outside, _ = equal_context([again], [0], size=size)
    assert set((~outside).sum(1).tolist()) == {size}
    assert not bool(((~outside) & ~again.context).any())


def test_cutting_the_context_at_random_does_not_favour_the_upper_rows():
    seen = {}
    for published in (False, True):
        maker = image_views(kind="multiblock", copies=1, published=published)
        mask = maker.collate(views_of(maker, range(128)))[0].mask
        share = (~mask.hidden).float().view(-1, 14, 14).mean(0).sum(1)
        seen[published] = share / share.sum()
    authors = torch.tensor(VECTORS["ijepa_context_statistics"]["row_share_batch128_grid14"])
    assert float((seen[True] - authors).abs().max()) < 0.08  # of one batch with one size
    assert float(seen[True][0]) > 4 * float(seen[True][11:].max())
    assert float(seen[False][0]) < 2.5 * float(seen[False][13])


def test_what_no_draw_could_satisfy_is_refused_at_once_and_the_hardest_rest_ends():
    with pytest.raises(ValueError, match=r"mask\.min_keep: 10, target blocks of 3 x 3 .*at most 8"):
        image_views(8, kind="multiblock")
    with pytest.raises(ValueError, match=r"mask\.context_scale: a block of 5 x 5 patches without one of"):
        image_views(8, kind="multiblock", min_keep=3, context_scale=(0.4, 0.4), target_scale=(0.35, 0.5))
    assert image_views(8, kind="multiblock", min_keep=8) is not None
    # Eight blocks of 6 x 6 leave hardly ever more than 12 cells of 7 x 7: they end up in one place.
    blocks = multiblock((8, 8), 30, (7, 7), (6, 6), 8, 12, generator("hard"))
    assert int(blocks.context.sum(1).min()) > 12
    assert not bool(blocks.context.gather(1, blocks.wanted.flatten(1)).any())


BAD = [
    ({"kind": "multiblock", "target_scale": (0.2, 0.15)}, "mask.target_scale"),
    ({"kind": "multiblock", "context_scale": (0.5, 1.2)}, "mask.context_scale"),
    ({"kind": "multiblock", "target_aspect": (0.0, 1.0)}, "mask.target_aspect"),
    ({"kind": "multiblock", "targets": 0}, "mask: targets is 0"),
    ({"kind": "mixed", "ratios": (0.5, 0.1)}, "mask.ratios"),
    ({"kind": "mixed", "ratios": (0.0, 0.001)}, "mask.ratios"),
    ({"kind": "mixed", "share": 0.0}, "mask.share"),
    ({"kind": "unit", "width": 3}, "mask.width: 3"),
    ({"kind": "unit", "width": 14}, "mask.width: 14"),
    ({"kind": "random", "ratio": 1.0}, "mask.ratio: 1.0"),
    ({"kind": "random", "ratio": 0.001}, "mask.ratio: 0.001"),
]


@pytest.mark.parametrize(("options", "text"), BAD)
def test_masks_that_cannot_be_drawn_are_refused_by_their_key(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        image_views(**options)


def test_mixed_masks_of_two_crops_hide_different_numbers_in_one_batch():
    maker = image_views(8, crops=[Crop(count=2)], kind="mixed", copies=1, smallest=4)
    views = maker.collate(views_of(maker, range(12)))
    counts = [view.mask.hidden.sum(1) for view in views]
    assert all(len(set(one.tolist())) > 2 for one in counts)
    assert not torch.equal(*counts)
    assert all(view.mask.count == 0 for view in views)  # the encoder sees every place
