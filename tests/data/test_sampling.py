import torch

from data.sampling import EpochSampler, example_rng, example_seed, split_key


def keys(num_examples: int, epoch: int, **options: int) -> list[tuple[int, int]]:
    sampler = EpochSampler(num_examples, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_epoch_is_another_permutation_and_carries_its_number():
    first, second = keys(101, epoch=0), keys(101, epoch=1)
    assert {epoch for epoch, _ in second} == {1}
    assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(101))
    assert [index for _, index in first] != [index for _, index in second]
    assert first == keys(101, epoch=0)
    assert first != keys(101, epoch=0, seed=1)


def test_global_batches_are_the_same_for_any_number_of_processes():
    global_batch = 12
    alone = keys(100, epoch=3, seed=5)
    for world_size in (2, 3):
        ranks = [keys(100, epoch=3, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
        per_rank = global_batch // world_size
        for batch in range(100 // global_batch):
            together = {key for rank in ranks for key in rank[batch * per_rank : (batch + 1) * per_rank]}
            assert together == set(alone[batch * global_batch : (batch + 1) * global_batch])


def test_plain_indices_mean_the_first_epoch():
    assert split_key(7) == (0, 7)
    assert split_key((2, 7)) == (2, 7)


def test_example_rng_restores_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with example_rng(1, 2, 3):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with example_rng(1, 2, 3):
        assert torch.equal(torch.rand(3), inside)


def test_example_seeds_differ_in_every_part():
    seeds = {example_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(40)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)
