"""How label-free metrics are judged by k-NN."""

import math

import numpy as np
import pytest

from tools.choices import judged, table

FOUND = [
    {"rankme": 1.0, "loss": 3.0, "knn": 0.2},
    {"rankme": 2.0, "loss": 2.0, "knn": 0.5},
    {"rankme": 4.0, "loss": 1.5, "knn": 0.6},
    {"rankme": 5.0, "loss": 1.0, "knn": 0.4},
]


def test_ranks_are_correlated_and_the_loss_of_a_choice_is_told():
    wanted = np.corrcoef([0, 1, 2, 3], [0, 2, 3, 1])[0, 1]
    assert judged(FOUND, "rankme", 1) == pytest.approx((wanted, 0.2))
    assert judged(FOUND, "loss", -1) == pytest.approx((wanted, 0.2))
    assert judged(FOUND, "lidar", 1) is None
    assert judged([{**point, "order": 1.0} for point in FOUND], "order", 1) is None
    correlation, lost = judged(FOUND, "rankme", -1)
    assert math.isclose(correlation, -wanted)
    assert math.isclose(lost, 0.4)


def test_the_table_leaves_out_what_was_not_measured():
    lines = table({"vision": FOUND, "text": FOUND}).splitlines()
    assert "| high rankme | +0.40 | 20.0 | +0.40 | 20.0 |" in lines
    assert "| high lidar |  |  |  |  |" in lines
    assert lines[-1] == "| k-NN accuracy of the checkpoints | 20.0 to 60.0 | | 20.0 to 60.0 | |"
    assert len({line.count("|") for line in lines}) == 1
