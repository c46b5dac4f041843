"""Overwritten rectangles, noise and removed regions: how much, where exactly, and by the sample's key alone."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmssl import random
from mmssl.parts.corruption import GroupOptions, RegionOptions, covered, noised, overwritten, region
from mmssl.random import generator

ROWS, SIZE = 40, 16


def images(rows=ROWS, size=SIZE):
    return torch.randn(rows, 3, size, size, generator=generator("corruption"))


def keys(rows=ROWS):
    return tuple(random.key("row", i) for i in range(rows))


# Rectangles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "align", "largest"), [(16, 1, 0.3), (16, 4, 0.5), (32, 4, 0.3), (24, 1, 0.1)])
def test_rectangles_are_those_of_a_loop_that_stops_when_enough_is_covered(size, align, largest):
    share = torch.linspace(0.02, 0.85, ROWS)
    found = covered(share, size, align, largest, keys())
    side = size // align
    for row, key in enumerate(keys()):
        draws = random.uniform([random.key(key, "rectangles")], (4, 2000), torch.device("cpu"))
        # The generator fills row by row: the loop must read as many numbers of each kind as were drawn.
        count = next(n for n in range(17, 2000) if _as_many(n, side, max(1.0, largest * side)))
        u = draws.flatten()[: 4 * count].view(4, count).double().numpy()
        canvas = np.zeros((size, size), bool)
        for top, left, height, width in u.T:
            if canvas.sum() >= float(share[row]) * size * size:
                break
            longest = max(1.0, largest * side)
            r, c = int(np.float32(top) * side), int(np.float32(left) * side)
            h, w = (1 + round(float(np.float32(one) * np.float32(longest - 1))) for one in (height, width))
            canvas[r * align : (r + h) * align, c * align : (c + w) * align] = True
        assert np.array_equal(found[row].numpy(), canvas), row


def _as_many(count, side, longest):
    """Three times what covers nine tenths of an image on average if rectangles fall anywhere, and 16."""
    usual = (1 + longest) / 2
    area = min((usual * (1 - usual / (2 * side)) / side) ** 2, 0.9)
    return count >= 16 + 3 * np.log(0.1) / np.log1p(-area)


@pytest.mark.parametrize(("size", "align", "largest"), [(8, 1, 0.3), (32, 4, 0.3), (14, 1, 0.05), (16, 8, 1.0)])
def test_even_nine_tenths_are_always_covered(size, align, largest):
    share = torch.full((400,), 0.9)
    altered = covered(share, size, align, largest, keys(400)).double().mean((1, 2))
    cell = (align / size) ** 2
    assert float(altered.min()) >= 0.9
    assert float(altered.min()) < 0.9 + cell + max(align, largest * size) ** 2 / size**2


def test_what_is_marked_is_overwritten_and_nothing_else_is():
    x = images()
    for fill in ("noise", "zeros"):
        found = overwritten(x, keys(), GroupOptions(fill=fill, paste=0.0))
        assert found.altered.shape == (ROWS, 1, SIZE, SIZE)
        assert torch.equal((found.x != x).all(1, keepdim=True), found.altered)
        assert torch.equal((found.x != x).any(1, keepdim=True), found.altered)
        inside = found.x.permute(1, 0, 2, 3)[:, found.altered[:, 0]]  # (3, n)
        if fill == "zeros":
            assert not inside.any()
        else:
            assert abs(float(inside.mean())) < 0.05
            assert abs(float(inside.std()) - 1) < 0.05


def test_the_share_is_drawn_evenly_between_a_half_and_the_option():
    x = images(400, 32)
    altered = overwritten(x, keys(400), GroupOptions(share=0.75, paste=0.0)).altered.double().mean((1, 2, 3))
    over = (6 / 32) ** 2 / 2  # by which the last rectangle goes too far, on average less than half of a usual one
    assert float(altered.min()) >= 0.5
    assert abs(float(altered.mean()) - 0.625) < over
    assert float(altered.quantile(0.9)) > 0.7
    small = overwritten(x, keys(400), GroupOptions(share=0.2, paste=0.0)).altered.double().mean((1, 2, 3))
    assert 0.2 <= float(small.min()) <= float(small.mean()) < 0.2 + over


def test_the_next_image_is_pasted_into_some():
    x = images(400, 8)
    found = overwritten(x, keys(400), GroupOptions(share=0.5, fill="zeros", paste=0.5, paste_share=0.3))
    other = x.roll(-1, 0)
    pasted = (found.x == torch.where(found.altered, other, x)).all((1, 2, 3))
    blank = (found.x == torch.where(found.altered, 0.0, x)).all((1, 2, 3))
    assert bool((pasted ^ blank).all())
    assert 0.42 < float(pasted.double().mean()) < 0.58
    shares = found.altered.double().mean((1, 2, 3))
    assert float(shares[pasted].min()) >= 0.3
    assert float(shares[blank].min()) >= 0.5 > float(shares[pasted].mean())


def test_corruption_is_a_function_of_the_key_alone():
    x, rows = images(), [7, 3, 21]
    some = tuple(keys()[i] for i in rows)
    options = GroupOptions(paste=0.0)
    for one in (lambda x, k: overwritten(x, k, options), *(
        lambda x, k, kind=kind: noised(x, k, kind, 0.3) for kind in ("masking", "gaussian", "salt")
    )):  # fmt: skip
        whole, part = one(x, keys()), one(x[rows], some)
        assert torch.equal(whole.x[rows], part.x)
        assert torch.equal(whole.altered[rows], part.altered)
        assert not torch.equal(one(x, keys()[::-1]).x, whole.x)
    for kind in ("centre", "random"):
        options = RegionOptions(kind=kind, overlap=1)
        whole = region(keys(), SIZE, x.device, options)
        assert torch.equal(whole.hidden[rows], region(some, SIZE, x.device, options).hidden)


# Noise ------------------------------------------------------------------------------------------------------------------


def test_masking_and_salt_alter_their_share_of_values_each_by_itself():
    x = images(ROWS, 32)
    for kind in ("masking", "salt"):
        found = noised(x, keys(), kind, 0.3)
        assert found.altered.shape == x.shape
        assert abs(float(found.altered.double().mean()) - 0.3) < 0.005  # 4 standard deviations
        assert torch.equal(found.x[~found.altered], x[~found.altered])
        both = (found.altered[:, 0] & found.altered[:, 1]).double().mean()
        assert abs(float(both) - 0.09) < 0.007
    masked, salted = (noised(x, keys(), kind, 0.3) for kind in ("masking", "salt"))
    assert not masked.x[masked.altered].any()
    low, high = x.flatten(2).min(2).values[..., None, None], x.flatten(2).max(2).values[..., None, None]
    at_low, at_high = (salted.altered & (salted.x == one) for one in (low, high))
    assert torch.equal(at_low ^ at_high, salted.altered)
    assert abs(float(at_high.sum() / salted.altered.sum()) - 0.5) < 0.015


def test_gaussian_noise_is_added_everywhere():
    x = images(ROWS, 32)
    found = noised(x, keys(), "gaussian", 0.3)
    assert bool(found.altered.all())
    assert abs(float((found.x - x).std()) - 0.3) < 0.003
    assert abs(float((found.x - x).mean())) < 0.004


# A region ---------------------------------------------------------------------------------------------------------------


def test_the_centre_is_that_of_the_paper():
    """128 pixels, a square of 64 in the middle, of which 4 at the rim are seen."""
    found = region(keys(2), 128, torch.device("cpu"), RegionOptions())
    asked, hidden = torch.zeros(2, 1, 128, 128, dtype=torch.bool), torch.zeros(2, 1, 128, 128, dtype=torch.bool)
    asked[..., 32:96, 32:96] = True
    hidden[..., 36:92, 36:92] = True
    assert torch.equal(found.asked, asked)
    assert torch.equal(found.hidden, hidden)


def test_blobs_have_their_share_hang_together_and_differ():
    found = region(keys(), 32, torch.device("cpu"), RegionOptions("random", 0.25))
    assert torch.equal(found.hidden, found.asked)
    assert_close(found.hidden.sum((1, 2, 3)), torch.full((ROWS,), 256))
    assert len({row.numpy().tobytes() for row in found.hidden}) == ROWS
    inside = found.hidden[:, 0]
    beside = (inside[:, 1:] & inside[:, :-1]).sum() / inside[:, :-1].sum()  # 0.25 for single pixels
    assert float(beside) > 0.7
    assert float(inside.double().mean(0).std()) < 0.12  # no place is preferred: 0.07 by chance


# What cannot be ---------------------------------------------------------------------------------------------------------

REFUSED = [
    (GroupOptions(share=0.95), r"corruption\.share: 0\.95, must be above 0 and at most 0\.9"),
    (GroupOptions(paste_share=0.0), r"corruption\.paste_share: 0\.0, must be above 0"),
    (GroupOptions(paste=1.5), r"corruption\.paste: 1\.5, must be a probability"),
    (GroupOptions(largest=0.0), r"corruption\.largest: 0\.0, must be above 0"),
    (GroupOptions(align=5), r"corruption\.align: 5, must divide the 32 pixels"),
    (GroupOptions(align=0), r"corruption\.align: 0, must divide"),
    (GroupOptions(align=32), r"corruption\.align: 32, must divide"),
    (RegionOptions(share=0.0), r"region\.share: 0\.0 of 32 x 32 pixels"),
    (RegionOptions(share=1.0), r"region\.share: 1\.0 of 32 x 32 pixels"),
    (RegionOptions(overlap=8), r"region\.overlap: 8 pixels, .*take at most 7"),
    (RegionOptions("random", blobs=1), r"region\.blobs: 1, must be between 2 and the 32 pixels"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_options_that_cannot_be_are_refused(options, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        options.check(32)


def test_pasting_takes_another_image():
    with pytest.raises(ValueError, match=r"^corruption\.paste: .*micro-batch of 1 sample.*set it to 0"):
        GroupOptions().check_batch(1)
    GroupOptions().check_batch(2)
    GroupOptions(paste=0.0).check_batch(1)
