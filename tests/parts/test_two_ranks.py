"""What parts hold on two ranks is what they hold on one process with all the samples."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.distributed import world
from mmssl.parts import Center, Magnitude, Memory, Queue
from mmssl.parts.kmeans import draw_rows, kmeans, pca_whiten, spherical_kmeans, uniform_order
from mmssl.types import Clock
from tests.losses.cases import CASES
from tests.ranks import on_two_ranks

CASE = CASES["dino_center_two_ranks"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(rank):
    """State of each part after two updates of two micro-batches, and what each rank reads of the queue."""
    parts = [Queue(10, 3), Queue(10, 3, newest_first=True), Memory(40, 3, 0.5), Center(3), Magnitude()]
    for part in parts:
        part.double()
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for update in range(2):
        for part in parts:
            part.before_step(Clock(update))
        for micro in range(2):
            rows = draw(6, 3, seed=10 * update + micro)
            rows[4, 0] = torch.nan if update and micro else rows[4, 0]
            index = ids[12 * update + 6 * micro :][:6]
            for part in parts[:2]:
                part.push(rows[rank :: world()], index[rank :: world()])
            parts[2].write(index[rank :: world()], rows[rank :: world()])
            parts[3].update(rows.nan_to_num()[rank :: world()])
            parts[4].measure(rows.nan_to_num()[rank :: world()].mean())
        for part in parts:
            part.after_step(Clock(update + 1))
    return [dict(part.state_dict()) for part in parts], [
        (queue.read(own=True), queue.read_ids(own=True)) for queue in parts[:2]
    ]


def clusters(rank):
    """Clusters of 43 rows, which two ranks cannot share equally."""
    rows = draw(43, 4) + 2 * draw(5, 4, seed=1).repeat_interleave(9, 0)[:43]
    unit, keyed = F.normalize(rows, dim=1), torch.Generator().manual_seed(0)
    start = draw_rows(rows, 5, keyed)
    far = torch.cat([start[:4], start[:1] + 100])  # empty at first
    return [
        *spherical_kmeans(unit, F.normalize(start, dim=1)),
        *kmeans(rows, start, keyed),
        *kmeans(rows, far, keyed),
        pca_whiten(rows, 3),
        uniform_order(kmeans(rows, start, keyed).assignment, keyed),
    ]


def centre(rank):
    """Of the reference case, whose ranks have other logits each."""
    given = CASE["inputs"]
    center = Center(4, given["momentum"]).double()
    center.value.copy_(torch.tensor(given["center"], dtype=torch.float64))
    logits = [given["rank0_teacher_logits"], given["rank1_teacher_logits"]]
    center.update(torch.tensor(logits[rank] if world() > 1 else logits[0] + logits[1], dtype=torch.float64))
    center.after_step(Clock(1))
    return center.value


def both(rank):
    return states(rank), clusters(rank), centre(rank)


def refuse(rank):
    with pytest.raises(ValueError, match=r"^queue: 7 rows, must be a multiple of the 2 ranks"):
        Queue(7, 2).read(own=True)
    with pytest.raises(ValueError, match=r"^queue: 5 rows, must hold at least the 6 samples"):
        Queue(5, 2).push(torch.zeros(3, 2), torch.arange(3))
    return both(rank)


@pytest.mark.distributed
def test_two_ranks_hold_what_one_process_holds(tmp_path):
    (first, first_clusters, *centers), (second, second_clusters, other) = on_two_ranks(refuse, folder=tmp_path)
    one, one_clusters, alone = both(0)
    for found in (*centers, other, alone):
        assert_close(found.tolist(), CASE["expected"]["center_after_on_both_ranks"], rtol=1e-9, atol=0)
    assert_close(first[0], second[0], rtol=0, atol=0)
    assert_close(first[0], one[0], rtol=1e-12, atol=1e-12)
    for (rows, ids), (other, more), (whole, known) in zip(first[1], second[1], one[1]):
        assert_close(torch.stack([rows, other], 1).flatten(0, 1), whole)
        assert torch.equal(torch.stack([ids, more], 1).flatten(), known)
    assert_close(first_clusters, second_clusters, rtol=0, atol=0)
    assert_close(first_clusters, one_clusters, rtol=1e-9, atol=1e-9)
