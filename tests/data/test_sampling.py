from typing import Any

import pytest
import torch

from data.sampling import EpochSampler, example_rng, example_seed, split_key


def keys(num_examples: int, epoch: int, **options: Any) -> list[tuple[int, int]]:
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


def test_the_order_and_augmentation_draw_from_different_numbers():
    """`data.in_memory` augments by (seed, epoch), the other data sets by (seed, epoch, index)."""
    order = [index for _, index in keys(101, epoch=2, seed=3)]
    for used in ((3, 2), *((3, 2, index) for index in range(101))):
        generator = torch.Generator().manual_seed(example_seed(*used))
        assert order != torch.randperm(101, generator=generator).tolist(), used


@pytest.mark.parametrize("blocks", [None, [30, 20, 51]])
def test_no_epoch_of_any_seed_has_the_order_of_another(blocks: list[int] | None):
    """Runs of neighbouring seeds, which the studies compare, are independent; in torch's sampler they share orders."""
    pairs = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {tuple(index for _, index in keys(101, epoch, seed=seed, blocks=blocks)) for seed, epoch in pairs}
    assert len(orders) == len(pairs)


def test_blocks_are_shuffled_and_read_a_few_at_a_time():
    blocks = [10, 7, 12, 9, 11, 8, 10]
    order = [index for _, index in keys(67, epoch=1, blocks=blocks, blocks_together=2)]
    assert sorted(order) == list(range(67))
    assert order != [index for _, index in keys(67, epoch=2, blocks=blocks, blocks_together=2)]
    block_of = [number for number, length in enumerate(blocks) for _ in range(length)]
    seen = [block_of[index] for index in order]
    groups = [set(seen[:10]), set(seen[-10:])]
    assert all(len(group) <= 3 for group in groups)
    # Within a pair of blocks the examples are mixed, and a whole group ends before the next one begins.
    first = {block: seen.index(block) for block in set(seen)}
    last = {block: 66 - seen[::-1].index(block) for block in set(seen)}
    pairs = sorted(first, key=first.__getitem__)
    for one, other in zip(pairs[::2], pairs[1::2], strict=False):
        assert first[other] < last[one] and first[one] < last[other]
    for pair, following in zip(range(0, 6, 2), range(2, 8, 2), strict=False):
        assert max(last[block] for block in pairs[pair : pair + 2]) < first[pairs[following]]


def test_blocks_keep_global_batches_for_any_number_of_processes():
    blocks = [30, 20, 50]
    alone = keys(100, epoch=3, blocks=blocks)
    ranks = [keys(100, epoch=3, blocks=blocks, rank=rank, world_size=2) for rank in range(2)]
    assert [set(alone[n : n + 10]) for n in range(0, 100, 10)] == [
        set(ranks[0][n : n + 5]) | set(ranks[1][n : n + 5]) for n in range(0, 50, 5)
    ]
    with pytest.raises(ValueError, match="blocks of 99 examples in all do not make up 100"):
        keys(100, epoch=0, blocks=[99])


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
