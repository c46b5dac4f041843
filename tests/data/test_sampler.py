import pytest

from mmssl.data.sampler import KeyBatches, divisors
from mmssl.errors import RecipeError
from mmssl.random import permutation


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
