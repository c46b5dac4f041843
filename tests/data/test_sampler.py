from collections import Counter
from itertools import pairwise

import pytest
import torch

from mmssl.data.sampler import Buckets, KeyBatches, cut, divisors
from mmssl.errors import RecipeError
from mmssl.random import generator, permutation


def batches(world: int, rank: int, micro: int, samples: int = 50, start: int = 0, steps: int = 14, seed: int = 3):
    return list(KeyBatches(samples, 8, micro, rank, world, steps, seed, start))


def updates(world: int, micro: int, **more) -> list[list[tuple[int, int]]]:
    """Keys of each update, put together from all ranks position by position."""
    ranks = [batches(world, rank, micro, **more) for rank in range(world)]
    flat = [keys[j] for parts in zip(*ranks) for j in range(micro) for keys in parts]
    return [flat[i : i + 8] for i in range(0, len(flat), 8)]


def test_positions_by_hand():
    order = permutation(50, 3, "order", 0).tolist()
    first, second = batches(2, 1, 2)[:2]  # rank 1 of 2: odd positions, two at a time
    assert first == [(0, order[1]), (0, order[3])]
    assert second == [(0, order[5]), (0, order[7])]


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (1, 1), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)])
def test_any_number_of_ranks_sees_the_same_global_batches(world, micro):
    assert updates(world, micro) == updates(1, 8)


def test_an_epoch_has_every_sample_at_most_once_and_the_next_another_order():
    keys = [key for batch in batches(1, 0, 8, steps=12) for key in batch]
    epochs = [[index for epoch, index in keys if epoch == e] for e in (0, 1)]
    assert [len(set(epoch)) for epoch in epochs] == [48, 48]  # 50 samples: 6 updates of 8
    assert epochs[0] != epochs[1]
    assert keys != [key for batch in batches(1, 0, 8, steps=12, seed=4) for key in batch]


@pytest.mark.parametrize("start", range(15))
def test_resume_at_every_step(start):
    whole = batches(2, 0, 2)
    assert batches(2, 0, 2, start=start) == whole[start * 2 :]


def test_length_counts_the_whole_run():
    sampler = KeyBatches(50, 8, 2, 0, 2, steps=14, seed=0, start_step=5)
    assert (len(sampler), sampler.accumulation, sampler.epoch_length) == (28, 2, 6)
    assert len(list(sampler)) == 18


def test_batches_that_cannot_be_shared_name_the_possible_values():
    with pytest.raises(RecipeError) as caught:
        KeyBatches(1000, 64, 12, 0, 2, 10, 0)
    text = str(caught.value)
    assert "train.global_batch a multiple of 24, such as 48 or 72" in text
    assert "train.micro_batch one of 1, 2, 4, 8, 16, 32" in text
    with pytest.raises(RecipeError, match=r"ranks one of 1, 2, 4, 8\."):
        KeyBatches(1000, 64, 8, 0, 3, 10, 0)


def test_fewer_samples_than_a_batch():
    with pytest.raises(RecipeError, match=r"train\.global_batch: the data hold 63 samples.*at most 63"):
        KeyBatches(63, 64, 64, 0, 1, 10, 0)
    KeyBatches(64, 64, 64, 0, 1, 10, 0)


def test_divisors():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]


# Samples of known length --------------------------------------------------------------------------------------------

LENGTHS = torch.randint(5, 60, (300,), generator=generator("lengths"))
LENGTHS[::17] = -1


def bucketed(world: int = 1, rank: int = 0, micro: int = 2, start: int = 0, steps: int = 40, seed: int = 3, **more):
    """Four micro-batches an update."""
    sizes = {"lengths": LENGTHS, "longest": 50, "buckets": 5} | more
    return KeyBatches(len(sizes["lengths"]), 4 * micro, micro, rank, world, steps, seed, start, **sizes)


def test_lengths_by_hand():
    lengths = torch.tensor([2, 9, 1, 2, 0, 8, 9, 2, -1, 1])
    # Usable are 1 1 2 2 2 8 9 9, the caps of the four buckets 1, 2, 8 and 9. Updates have two shares of at most 8 units: two
    # samples each while the last is a 2 (three would end in an 8), then one 2 and one 8, then the 9s, too long by themselves.
    plan = Buckets(lengths, None, 4, shares=2, micro_batch=1, budget=8)
    assert [*plan.cuts] == [0, 4, 6, 8]
    order, _ = plan.epoch(0, 0)
    assert sorted(order[:2].tolist()) == [2, 9]
    assert sorted(order[2:5].tolist()) == [0, 3, 7]
    assert sorted(order[5:].tolist()) == [1, 5, 6]
    batches = list(KeyBatches(10, 2, 1, 0, 1, 3, 0, lengths=lengths, buckets=4, budget=8))
    assert sorted(len(batch) for batch in batches) == [1, 1, 1, 1, 2, 2]
    found = {tuple(sorted(i for _, i, _ in a + b)): a[0][2] for a, b in zip(batches[::2], batches[1::2])}
    assert all(length == min(int(lengths[i]) for i in update) for update, length in found.items())


def test_places_of_cuts_are_the_best_by_trial():
    caps = sorted(torch.randint(1, 30, (200,), generator=generator("caps")).tolist())
    for shares, budget in ((1, 60), (3, 100), (4, 5), (2, 400)):
        cuts = cut(caps, shares, budget)
        for first, last in pairwise(cuts):
            n = (last - first) // shares
            assert (last - first) % shares == 0
            assert n == 1 or n * caps[last - 1] <= budget
            more = first + (n + 1) * shares
            assert more > len(caps) or (n + 1) * caps[more - 1] > budget
        assert len(caps) - cuts[-1] < shares * max(1, budget // caps[-1])


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batches_of_known_length(world):
    alone = list(bucketed())
    ranks = [list(bucketed(world, rank)) for rank in range(world)]
    updates = [[key for batch in alone[i : i + 4] for key in batch] for i in range(0, len(alone), 4)]
    assert len(ranks[0]) * world == len(alone)
    for number, update in enumerate(updates):
        parts = [rank[number * 4 // world : (number + 1) * 4 // world] for rank in ranks]
        n = len(update) // 4
        together = [parts[r][a][j] for a in range(4 // world) for j in range(n) for r in range(world)]
        assert together == update


def test_a_key_ends_with_the_least_length_of_its_update_and_micro_batches_keep_to_their_budget():
    sampler = bucketed(budget=200)
    batches = list(sampler)
    assert len({len(batch) for batch in batches}) > 2
    for i in range(0, len(batches), 4):
        update = [key for batch in batches[i : i + 4] for key in batch]
        lengths = [min(int(LENGTHS[index]), 50) for _, index, _ in update]
        assert {length for _, _, length in update} == {min(lengths)}
        assert len({len(batch) for batch in batches[i : i + 4]}) == 1
        assert len(update) // 4 * max(lengths) <= 200


def test_epochs_have_the_same_updates_of_other_samples_in_another_order():
    one = bucketed()
    updates = one.epoch_length
    batches = list(bucketed(steps=2 * updates))
    epochs = [[index for batch in batches for epoch, index, _ in batch if epoch == e] for e in (0, 1)]
    sizes = [[len(batch) for batch in batches[e * 4 * updates : (e + 1) * 4 * updates]] for e in (0, 1)]
    assert Counter(sizes[0]) == Counter(sizes[1])
    assert sizes[0] != sizes[1]
    assert sizes[0] != sorted(sizes[0], reverse=True)  # not from short to long
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) > 0.9 * int((LENGTHS > 0).sum())
        assert bool((LENGTHS[epoch] > 0).all())
    contents = [{frozenset(i for _, i, _ in b) for b in batches[e * 4 * updates : (e + 1) * 4 * updates]} for e in (0, 1)]
    assert not contents[0] & contents[1]


def test_samples_of_one_length_are_mixed_among_all():
    batches = list(bucketed(lengths=torch.full((64,), 100), buckets=16, micro=4))
    assert all(len(batch) == 4 for batch in batches)  # by default the budget is that of micro_batch samples of the longest
    assert {length for batch in batches for _, _, length in batch} == {50}
    order = [index for batch in batches[:16] for _, index, _ in batch]
    assert sorted(order) == [*range(64)]
    assert max(order[:16]) - min(order[:16]) > 32


@pytest.mark.parametrize("start", [0, 1, 7, 23, 39, 40])
def test_resume_with_lengths(start):
    whole = list(bucketed(2, 1))
    assert list(bucketed(2, 1, start=start)) == whole[start * 2 :]


def test_data_that_do_not_fill_an_update_of_known_lengths():
    with pytest.raises(RecipeError, match=r"train\.global_batch: the data hold 3 usable samples.*to at most 6, or"):
        bucketed(lengths=torch.tensor([4, 4, -1, 4]))
    with pytest.raises(RecipeError, match=r"data hold 0 usable samples.*Add data"):
        bucketed(lengths=torch.tensor([-1, -1]))
    with pytest.raises(
        RecipeError, match=r"data\.budget: 4 micro-batches.*of 90 units.*the 9 usable.*to at most 20,"
    ) as caught:
        bucketed(lengths=torch.full((9,), 10), budget=90)
    assert "train.global_batch" in str(caught.value)
    assert bucketed(lengths=torch.full((9,), 10), budget=20).epoch_length == 1
    with pytest.raises(RecipeError, match="cannot be shared by 3 ranks"):
        bucketed(world=3)


def test_an_order_that_a_method_chose_is_followed_and_refused_where_lengths_decide():
    chosen = torch.arange(10).flip(0)
    keys = KeyBatches(10, 4, 4, 0, 1, 2, 0, order=lambda epoch: chosen)
    assert [[index for _, index in batch] for batch in keys] == [[9, 8, 7, 6], [5, 4, 3, 2]]
    with pytest.raises(RecipeError, match=r"^method\.name: it chooses"):
        KeyBatches(10, 4, 4, 0, 1, 2, 0, lengths=torch.arange(1, 11), order=lambda epoch: chosen)
