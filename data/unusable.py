"""Images that cannot be used: skipped up to a limit, and reported once."""

import warnings
from collections.abc import Callable, Iterator

import torch

from data.folder import some


class Unusable:
    """Which examples of a part turned out unusable, in memory shared with the workers: each counts once for all.

    Of one training process: several have a count of their own each, of the examples that they meet.

    Args:
        total: number of examples.
        train: whether another example takes the place of an unusable one; in evaluation it is left out.
        limit: so many are tolerated, by each training process.
    """

    def __init__(self, total: int, *, train: bool, limit: int) -> None:
        self.train = train
        self.limit = limit
        self._flags = torch.zeros(total, dtype=torch.bool).share_memory_()
        self._reported = 0

    def __contains__(self, position: int) -> bool:
        return bool(self._flags[position])

    def add(self, position: int) -> None:
        self._flags[position] = True

    def candidates(self, index: int) -> Iterator[int]:
        """Positions to try for example `index`, itself first: one more than tolerated, then `check` stops the run."""
        total = len(self._flags)
        tries = min(self.limit + 2, total) if self.train else 1
        for position in range(index, index + tries):
            if position % total not in self:
                yield position % total

    def check(self, where: object, describe: Callable[[int], str]) -> None:
        """Warn of those met since the last call.

        Args:
            where: the images are from.
            describe: position -> name and reason; it reads the image again, as workers cannot hand a reason over.

        Raises:
            RuntimeError: there are more than the limit, or nothing else is left.
        """
        positions = torch.nonzero(self._flags).flatten().tolist()
        count, total = len(positions), len(self._flags)
        if count == self._reported:
            return
        self._reported = count
        files = some([describe(position) for position in positions])
        found = f"{count} unusable image(s) of {total} in {where}"
        if count > self.limit or count == total:
            raise RuntimeError(f"{found}, tolerated are {self.limit} per process (data.max_corrupt): {files}")
        how = "replaced by the next usable one" if self.train else "left out of the evaluation"
        warnings.warn(f"{found}, {how} (limit {self.limit} per process): {files}", stacklevel=4)
