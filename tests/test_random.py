import itertools

import torch

from mmssl.random import generator, key, normal, permutation, row_keys


def test_a_key_depends_on_every_part_its_type_and_the_order():
    tuples = [*itertools.product((0, 1, "0", "view"), repeat=3), (0,), (0, 0), ("0\x1fint:0",), ("00",), (-1,), ("",)]
    keys = [key(*parts) for parts in tuples]
    assert len(set(keys)) == len(tuples)
    assert all(0 <= k < 2**63 for k in keys)


def test_keys_are_the_same_in_every_process_and_version():
    assert key(0, "augment", 1, 2, 3) == 373_156_717_029_434_330


def test_a_generator_repeats_itself_and_differs_from_others():
    assert torch.equal(torch.rand(5, generator=generator(1, "a")), torch.rand(5, generator=generator(1, "a")))
    assert not torch.equal(torch.rand(5, generator=generator(1, "a")), torch.rand(5, generator=generator(1, "b")))


def test_a_permutation_is_one():
    assert permutation(50, 0, "order", 0).sort().values.tolist() == list(range(50))
    assert permutation(50, 0, "order", 0).tolist() == permutation(50, 0, "order", 0).tolist()
    assert permutation(50, 0, "order", 0).tolist() != permutation(50, 0, "order", 1).tolist()


def test_a_row_of_noise_depends_on_its_own_key_alone():
    like = torch.empty(0)
    both, alone = normal([3, 4], (50, 40), like), normal([4], (50, 40), like)
    assert torch.equal(both[1], alone[0])
    assert torch.equal(normal([4, 3], (50, 40), like)[1], both[0])
    assert not torch.equal(both[0], both[1])
    assert abs(both.mean()) < 0.07  # 4 standard errors of 4000 draws
    assert abs(both.std() - 1) < 0.05


def test_noise_takes_type_from_like_and_costs_nothing_on_meta():
    assert normal([1], (2,), torch.empty(0, dtype=torch.float64)).dtype == torch.float64
    assert normal([1, 2], (3, 4), torch.empty(0, device="meta")).shape == (2, 3, 4)


def test_a_global_batch_has_the_same_row_keys_on_any_world_and_split():
    whole = row_keys(7, 3, 0, 8, 0, 1)
    assert len(set(whole)) == 8
    for world, micros in itertools.product((1, 2, 4), (1, 2)):
        rows = 8 // world // micros
        for micro, rank in itertools.product(range(micros), range(world)):
            # micro-batch `micro` of rank `rank` holds places micro*world*rows + row*world + rank of the global batch
            first = micro * world * rows
            assert row_keys(7, 3, micro, rows, rank, world) == whole[first + rank : first + world * rows : world]


def test_row_keys_differ_between_steps_and_seeds():
    every = {k for seed in (0, 1) for step in range(5) for k in row_keys(seed, step, 0, 8, 0, 1)}
    assert len(every) == 2 * 5 * 8


def test_keyed_draws_leave_ambient_randomness_alone():
    before = torch.get_rng_state()
    generator(1)
    permutation(10, 2)
    normal([3], (4,), torch.empty(0))
    assert torch.equal(torch.get_rng_state(), before)
