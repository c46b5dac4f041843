import math
from itertools import product

import pytest
import torch

from mmssl.random import generator
from modalities.vision.tiles import far_orders, tiles, turned
from tests.losses.cases import MASKED, drawn, tensor

JIGSAW = MASKED["jigsaw"]


def test_tiles_lie_anywhere_in_their_cells_and_are_normalised_by_themselves():
    image, seen = drawn(2, 12, 12), [set() for _ in range(9)]  # cells of 4 x 4
    for key in range(60):
        found = tiles(image, 3, 2, generator("tiles", key))
        assert found.shape == (9, 2, 2, 2)
        for i, tile in enumerate(found):
            for top, left in product(range(3), range(3)):
                cut = image[:, i // 3 * 4 + top :, i % 3 * 4 + left :][:, :2, :2]
                wanted = (cut - cut.mean((1, 2), keepdim=True)) / cut.std((1, 2), keepdim=True)
                if torch.allclose(tile, wanted):
                    seen[i].add((top, left))
    assert all(len(one) == 9 for one in seen)


def test_tiles_of_the_authors_fit_with_room_to_jitter():
    side, size = JIGSAW["grid"], JIGSAW["tile"]
    image = drawn(1, JIGSAW["image"], JIGSAW["image"])
    assert tiles(image, side, size, generator("fit")).shape == (9, 1, size, size)
    assert JIGSAW["image"] // side == JIGSAW["cell"] == size + JIGSAW["max_jitter"]
    with pytest.raises(ValueError, match=r"^tiles: 86 pixels, larger than the cells of 85 x 85"):
        tiles(image, side, 86, generator("fit"))


def test_orders_are_all_different_and_as_far_apart_as_can_be():
    assert math.factorial(9) == JIGSAW["permutations_total"]
    far = far_orders(9, 9, generator("orders"))
    apart = (far[:, None] != far).sum(2)
    assert bool((far.sort(1).values == torch.arange(9)).all())
    assert set(apart[~torch.eye(9, dtype=torch.bool)].tolist()) == {JIGSAW["hamming_max"]}  # nine can share no place at all
    every = far_orders(24, 4, generator("orders"))
    assert len({tuple(row) for row in every.tolist()}) == 24
    assert torch.equal(every, far_orders(24, 4, generator("orders")))
    assert not torch.equal(every, far_orders(24, 4, generator("others")))
    with pytest.raises(ValueError, match=r"^count: 25 orders of 4 pieces, there are 24"):
        far_orders(25, 4, generator("orders"))


def test_turns_are_counter_clockwise():
    case = MASKED["rotation"]
    images = torch.stack([tensor(case["input"])[None], torch.zeros(1, 2, 2, dtype=torch.float64)])
    found, quarters = turned(images)
    assert quarters.tolist() == [0, 1, 2, 3] * 2
    assert torch.equal(found[:4, 0], torch.stack([tensor(case[name]) for name in ("input", "k1", "k2", "k3")]))
    assert not bool(found[4:].any())
