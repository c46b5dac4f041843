import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.parts import Center, Memory
from mmssl.types import Clock


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(memory, *batches):
    memory.before_step(Clock())
    for index, rows in batches:
        memory.write(torch.as_tensor(index), rows)
    memory.after_step(Clock(1))


def test_a_slot_holds_the_latest_row_of_its_sample():
    memory, rows = Memory(6, 3), draw(5, 3) * 4
    start = memory.rows.clone()
    assert_close(start.norm(dim=1), torch.ones(6))
    write(memory, ([4, 1], rows[:2]), ([0, 4], rows[2:4]))
    wanted = start.clone()
    wanted[[1, 0, 4]] = F.normalize(rows[[1, 2, 3]], dim=1)
    assert_close(memory.rows, wanted)
    assert memory.seen.tolist() == [True, True, False, False, True, False]
    assert_close(memory.read(torch.tensor([4, 2])), wanted[[4, 2]])


def test_with_momentum_old_and_new_rows_are_averaged_on_the_sphere():
    memory, rows = Memory(3, 2, momentum=0.25), draw(2, 2)
    start = memory.rows.clone()
    write(memory, ([2, 0], rows))
    mixed = 0.25 * start[[2, 0]] + 0.75 * rows / rows.norm(dim=1, keepdim=True)
    assert_close(memory.rows[[2, 0]], mixed / mixed.norm(dim=1, keepdim=True))
    assert torch.equal(memory.rows[1], start[1])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rows_that_are_not_finite_and_skipped_updates_leave_no_trace(momentum):
    memory, rows = Memory(4, 3, momentum), draw(2, 3)
    before = memory.rows.clone()
    rows[0, 1] = torch.nan
    memory.before_step(Clock())
    memory.write(torch.tensor([3, 2]), draw(2, 3, seed=5))
    write(memory, ([0, 1], rows))
    assert torch.equal(memory.rows[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(memory.rows[1], before[1])
    assert memory.seen.tolist() == [False, True, False, False]


def test_it_goes_on_from_its_state_to_the_bit():
    one, other = Memory(4, 3, 0.5), Memory(4, 3, 0.5, seed=1)
    write(one, ([0, 1], draw(2, 3)))
    other.load_state_dict({name: t.clone() for name, t in one.state_dict().items()})
    for memory in (one, other):
        write(memory, ([1, 2], draw(2, 3, seed=2)))
    assert_close(dict(other.state_dict()), dict(one.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [1.0, -0.1])
def test_a_momentum_that_keeps_all_or_less_than_nothing_is_refused(momentum):
    with pytest.raises(ValueError, match=r"^memory_momentum: "):
        Memory(3, 2, momentum)
    with pytest.raises(ValueError, match=r"^center_momentum: "):
        Center(3, momentum)


def test_the_center_moves_after_it_was_used(vector):
    case = vector("dino")
    center = Center(4, case["inputs"]["center_momentum"]).double()
    center.value.copy_(torch.tensor(case["inputs"]["center"], dtype=torch.float64))
    scores, old = torch.tensor(case["inputs"]["teacher_logits"], dtype=torch.float64), center.value.clone()
    center.before_step(Clock())
    for crop in scores.split(2):
        center.update(crop)
    assert torch.equal(center.value, old)
    center.after_step(Clock(1))
    assert_close(center.value, torch.tensor(case["expected"]["center_after"], dtype=torch.float64), rtol=1e-9, atol=0)


def test_micro_batches_count_as_one_batch_and_bad_or_skipped_ones_do_not():
    center, scores = Center(3), draw(8, 3)
    center.update(scores + 100)
    center.before_step(Clock())  # the update above was skipped
    for rows in scores.split(2):
        center.update(rows)
    center.after_step(Clock(1))
    assert_close(center.value, 0.1 * scores.mean(0))
    before = center.value.clone()
    center.update(torch.full((2, 3), torch.inf))
    center.after_step(Clock(2))
    center.after_step(Clock(3))  # nothing was staged
    assert torch.equal(center.value, before)


def test_of_a_sample_that_meets_itself_the_first_row_counts():
    memory, rows = Memory(4, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    memory.write(torch.tensor([2, 1, 2]), rows)
    memory.after_step(Clock(1))
    assert_close(memory.read(torch.tensor([2, 1])), rows[:2])
