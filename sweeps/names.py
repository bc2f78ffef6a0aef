"""Names of jobs, made from their overrides: readable, safe as names of folders, the same whenever they are made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

LONGEST = 100
UNSAFE = re.compile(r"[^A-Za-z0-9.+-]+")


def job_name(overrides: Sequence[str]) -> str:
    """`condconv.experts=8 seed=1` becomes `experts-8_seed-1`; what cannot be said in safe letters ends with a hash.

    The seed comes last, so that folders sort by what is varied.
    """
    pairs = [override.lstrip("+~").partition("=") for override in overrides]
    pairs.sort(key=lambda pair: pair[0] == "seed")
    parts, exact = [], True
    for key, _, value in pairs:
        wanted = value.replace(" ", "").replace("'", "").replace('"', "").strip("[]{}").replace(",", "+")
        safe = UNSAFE.sub("_", wanted).strip("._") or "none"
        exact = exact and safe == wanted
        parts.append(f"{UNSAFE.sub('_', key.rpartition('.')[2].rpartition('/')[2])}-{safe}")
    name = "_".join(parts) or "job"
    if exact and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 7].rstrip('_')}_{short_hash(overrides)}"


def unique_names(jobs: Iterable[Sequence[str]]) -> list[str]:
    """A name for each; jobs whose names differ at most in capitals, which some disks do not tell apart, get a hash."""
    overrides = list(jobs)
    names = [job_name(job) for job in overrides]
    folded = [name.casefold() for name in names]
    return [
        f"{name}_{short_hash(job)}" if folded.count(name.casefold()) > 1 else name
        for name, job in zip(names, overrides, strict=True)
    ]


def short_hash(words: Sequence[str], length: int = 6) -> str:
    """Hexadecimal digits that depend on the words, not on their order."""
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:length]
