"""Order and randomness of the examples, as pure functions of (seed, epoch, index).

Nothing here depends on the number of workers or processes, nor on what was drawn before: the same seed gives the same
images in the same global batches on any machine, and a run that resumes in the middle of an epoch sees what the
uninterrupted run would have seen.
"""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

Key = int | tuple[int, int]
Batch = tuple[Tensor, Tensor]


def split_key(key: Key) -> tuple[int, int]:
    """`(epoch, index)` of a sampler's key. Plain indices (evaluation, or a sampler of Lightning's) mean epoch 0."""
    return key if isinstance(key, tuple) else (0, key)


def example_seed(*parts: int) -> int:
    """A 64-bit seed that depends on every part, such as (seed, epoch, index); neighbours get unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@contextmanager
def example_rng(*parts: int) -> Iterator[None]:
    """Seeds torch's default CPU generator with `example_seed(*parts)` inside the block and restores it afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(example_seed(*parts))
    try:
        yield
    finally:
        generator.set_state(state)


class EpochSampler(DistributedSampler[int]):
    """Shuffles the training set anew every epoch and yields keys `(epoch, index)`.

    The epoch travels with the key because persistent workers never see an attribute that is set later. Processes take
    every world-size-th example, so the union of their k-th batches is the same for any number of processes. The few
    examples that the number of processes does not divide are dropped. Lightning calls `set_epoch` and leaves
    subclasses of DistributedSampler in place.

    Args:
        num_examples: size of the training set.
        seed, rank, world_size: of the order, and of this process.
        blocks: lengths of the blocks (tar shards) that the examples lie in, one after the other; None: no blocks.
        blocks_together: so many blocks are shuffled into each other; the order of the blocks is random too. All
            processes read from the same few files at any time, near enough to a full shuffle for blocks that hold a
            mixture of the classes.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        blocks: Sequence[int] | None = None,
        blocks_together: int = 16,
    ) -> None:
        if blocks is not None and sum(blocks) != num_examples:
            raise ValueError(f"blocks of {sum(blocks)} examples in all do not make up {num_examples} examples")
        # Only the length of what it samples from is looked at.
        super().__init__(range(num_examples), world_size, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.blocks = blocks
        self.blocks_together = blocks_together
        self._resumed = (0, 0)

    def resume_at(self, epoch: int, num_examples: int) -> None:
        """Begin with `epoch` and leave out its first `num_examples`, which were used before; later epochs are whole.

        The length stays that of a whole epoch. Set before iterating: workers begin to fetch at once.
        """
        self.set_epoch(epoch)
        self._resumed = (epoch, num_examples)

    def __iter__(self) -> Iterator[Any]:  # a supertype of int, which Sampler promises, and of our keys
        epoch, done = self._resumed
        share = self.order()[self.rank : self.total_size : self.num_replicas]
        for index in share[done if epoch == self.epoch else 0 :]:
            yield self.epoch, index

    def order(self) -> list[int]:
        """All examples in the order of the present epoch, over all processes; a function of seed and epoch alone."""
        # Not seed + epoch, as in torch's sampler: there, epoch 1 of one seed has the order of epoch 0 of the next. And
        # not (seed, epoch) nor an index: those are augmentation's.
        generator = torch.Generator().manual_seed(example_seed(self.seed, self.epoch, -1))
        if self.blocks is None:
            return torch.randperm(len(self.dataset), generator=generator).tolist()
        ends = torch.tensor(self.blocks).cumsum(0).tolist()
        shuffled = torch.randperm(len(self.blocks), generator=generator).tolist()
        order: list[int] = []
        for first in range(0, len(shuffled), self.blocks_together):
            group = shuffled[first : first + self.blocks_together]
            examples = torch.cat([torch.arange(ends[block] - self.blocks[block], ends[block]) for block in group])
            order += examples[torch.randperm(len(examples), generator=generator)].tolist()
        return order


class ShareSampler(Sampler[int]):
    """Every world-size-th example in order, without padding: processes evaluate each example exactly once together."""

    def __init__(self, num_examples: int, *, rank: int, world_size: int) -> None:
        self.share = range(rank, num_examples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


class ImageDataset(Dataset[Any]):
    """A map from a sampler's key to one example (or, by `__getitems__`, from a list of keys to a whole batch).

    Attributes:
        blocks: lengths of the files that the examples lie in, for `EpochSampler`; None where order costs nothing.
    """

    blocks: Sequence[int] | None = None

    def collate(self, examples: Any) -> Batch | None:
        """What the fetched examples become: `(images uint8 [N,3,H,W], labels int64 [N])`, or None for no example."""
        raise NotImplementedError

    def check(self) -> None:
        """Called in the main process after every fetched batch, to report what the workers met."""

    def __len__(self) -> int:
        raise NotImplementedError


class ImageLoader(DataLoader[Any]):
    """A DataLoader that lets the dataset report after every batch and leaves out batches without any example."""

    dataset: ImageDataset

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises its private iterator class
        for batch in super().__iter__():
            self.dataset.check()
            if batch is not None:
                yield batch


def leave_signals_to_trainer(worker: int) -> None:
    """For loading processes: a scheduler or a terminal sends its signals to them too, and they are still needed.

    The training process ends them when it ends, and they end by themselves when it is gone.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
