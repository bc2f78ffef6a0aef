"""Which images are used: the first so many of each class, and some held out of training for validation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.folder import some

Holdout = int | float | None
"""Images of each class that are held out: a number, or a share below 1 of the class; None or 0 for none."""


def check_holdout(holdout: Holdout) -> Holdout:
    """The holdout itself, None for 0.

    Raises:
        ValueError: it is neither a whole number nor a share between 0 and 1.
    """
    if holdout is None or (not isinstance(holdout, bool) and holdout == 0):
        return None
    whole = isinstance(holdout, int) and not isinstance(holdout, bool) and holdout > 0
    if not whole and not (isinstance(holdout, float) and 0 < holdout < 1):
        raise ValueError(
            f"holdout {holdout!r}: expected a whole number of images of each class, a share above 0 and below 1, or "
            f"null to validate on val/ (data.holdout)"
        )
    return holdout


def first_of_each(labels: Sequence[int] | np.ndarray, limit: int | None) -> np.ndarray:
    """Positions of the first `limit` images of each class, in their order; None is no limit."""
    labels = np.asarray(labels, dtype=np.int64)
    return np.flatnonzero(_rank(labels) < limit) if limit is not None else np.arange(len(labels))


def split(labels: Sequence[int] | np.ndarray, holdout: int | float, names: Sequence[str]) -> tuple[np.ndarray, ...]:
    """(positions to train on, positions held out): of each class the last images, so neighbours stay together.

    The rule looks at nothing but the order of the images, so the parts are the same whatever the seed.

    Args:
        labels: of all training images, in order.
        holdout: see `check_holdout`; of a share the next whole number is taken, at least 1.
        names: of the classes, for messages.

    Raises:
        ValueError: a class has too few images to leave one for each part.
    """
    labels = np.asarray(labels, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(names))
    held = np.full_like(counts, holdout) if isinstance(holdout, int) else np.maximum(1, np.rint(holdout * counts))
    small = [f"{names[label]} ({counts[label]})" for label in np.flatnonzero((counts > 0) & (held >= counts))]
    if small:
        raise ValueError(
            f"data.holdout={holdout} leaves no training image in {len(small)} class(es): {some(small)}; set a smaller "
            f"number"
        )
    is_held = _rank(labels) >= (counts - held.astype(np.int64))[labels]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _rank(labels: np.ndarray) -> np.ndarray:
    """How many images of the same class stand before each."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return rank
