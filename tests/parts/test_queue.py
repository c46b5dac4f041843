import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.parts import Queue
from mmssl.types import Clock


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(queue, *batches):
    """An applied update of micro-batches (rows, ids)."""
    queue.before_step(Clock())
    for rows, ids in batches:
        queue.push(rows, torch.as_tensor(ids))
    queue.after_step(Clock(1))


def test_it_starts_with_keyed_rows_of_length_1_that_belong_to_no_sample():
    queue = Queue(500, 3)
    assert_close(queue.rows.norm(dim=1), torch.ones(500))
    assert_close(queue.rows.mean(0), torch.zeros(3), rtol=0, atol=0.1)
    assert (queue.ids == -1).all()
    assert torch.equal(queue.rows, Queue(500, 3).rows)
    assert not torch.equal(queue.rows, Queue(500, 3, seed=1).rows)
    assert (queue.pointer, queue.count, queue.is_full) == (0, 0, False)


def test_the_pointer_goes_round_as_in_moco(vector):
    case = vector("moco_queue_pointer")
    queue, pointers = Queue(case["inputs"]["K"], 3), []
    start = queue.rows.clone()
    for number in range(case["inputs"]["enqueued"]):
        rows = draw(2, 3, seed=number) * 5
        update(queue, (rows, [2 * number, 2 * number + 1]))
        pointers.append(queue.pointer)
        if number == 0:
            assert torch.equal(queue.rows[2:], start[2:])
    assert pointers == case["expected"]["pointer_after_each"]
    assert_close(queue.read()[case["expected"]["slots_holding_last_batch"]], F.normalize(rows, dim=1))
    assert queue.read_ids().tolist() == [6, 7, 2, 3, 4, 5]


def test_newest_first_is_the_order_of_swav(vector):
    case = vector("swav_queue_buffer")
    queue, usable = Queue(case["inputs"]["queue_length"], 3, newest_first=True), []
    for ids, wanted in zip(case["inputs"]["batches"], case["expected"]["after"]):
        update(queue, (torch.stack([draw(3, seed=i) for i in ids]), ids))
        assert queue.read_ids().tolist() == [i or -1 for i in wanted]
        held = [i for i in wanted if i]
        assert_close(queue.read()[: len(held)], F.normalize(torch.stack([draw(3, seed=i) for i in held]), dim=1))
        usable.append(queue.is_full)
    assert usable == case["expected"]["usable_after"]


@pytest.mark.parametrize(("newest_first", "wanted"), [(False, [6, 7, 8, 4, 5]), (True, [6, 7, 8, 3, 4])])
def test_a_batch_may_go_around_the_end(newest_first, wanted):
    queue = Queue(5, 2, newest_first)
    for first in (0, 3, 6):
        update(queue, (draw(3, 2, seed=first), [first, first + 1, first + 2]))
    if newest_first:
        assert queue.read_ids().tolist() == wanted
    else:
        assert queue.read_ids().roll(-queue.pointer).tolist() == [4, 5, 6, 7, 8]
        assert queue.read_ids().tolist() == [5, 6, 7, 8, 4]
    assert (queue.count, queue.written, queue.is_full) == (5, 9, True)


def test_the_loss_reads_what_was_there_before_the_update_and_micro_batches_are_written_in_order():
    queue = Queue(4, 3)
    before = queue.read().clone()
    first, second = draw(2, 3, seed=1).requires_grad_(), draw(2, 3, seed=2)
    queue.before_step(Clock())
    queue.push(first, torch.tensor([1, 2]))
    queue.push(second, torch.tensor([3, 4]))
    assert torch.equal(queue.read(), before)
    queue.after_step(Clock(1))
    assert_close(queue.read(), F.normalize(torch.cat([first.detach(), second]), dim=1))
    assert queue.read_ids().tolist() == [1, 2, 3, 4]
    assert not queue.rows.requires_grad


def test_a_skipped_update_leaves_no_trace():
    queue, other = Queue(4, 3), Queue(4, 3)
    queue.before_step(Clock())
    queue.push(draw(2, 3, seed=7), torch.tensor([8, 9]))
    for one in (queue, other):
        update(one, (draw(2, 3, seed=1), [1, 2]))
    assert_close(dict(queue.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_not_written(bad):
    queue, rows = Queue(4, 3), draw(2, 3)
    start = queue.rows.clone()
    rows[1, 2] = bad
    update(queue, (rows, [1, 2]))
    assert_close(queue.read(), torch.cat([F.normalize(rows[:1], dim=1), start[1:]]))
    assert queue.read_ids().tolist() == [1, -1, -1, -1]
    assert queue.pointer == 2


def test_it_goes_on_from_its_state_to_the_bit():
    one, other = Queue(5, 3), Queue(5, 3, seed=4)
    for seed in range(2):
        update(one, (draw(2, 3, seed=seed), [seed, seed]))
    other.load_state_dict({name: t.clone() for name, t in one.state_dict().items()})
    assert other.pointer == one.pointer == 4
    for queue in (one, other):
        update(queue, (draw(2, 3, seed=9), [7, 8]))
    assert_close(dict(other.state_dict()), dict(one.state_dict()), rtol=0, atol=0)
    assert other.read_ids().tolist() == [8, 0, 1, 1, 7]


def test_no_rows_and_batches_longer_than_the_queue_are_refused():
    with pytest.raises(ValueError, match=r"^queue: 0 rows"):
        Queue(0, 3)
    with pytest.raises(ValueError, match=r"^queue: 4 rows, must hold at least the 5 samples"):
        Queue(4, 3).push(draw(5, 3), torch.arange(5))


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        assert Queue(10, 3).rows.is_meta
