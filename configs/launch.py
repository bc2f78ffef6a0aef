"""The moment a command started, the same for all its processes: it names the run's folder (configs/claims.py).

Hydra's `${now:...}` is read by each process for itself, so processes that torchrun or SLURM start at slightly different
times would each make a folder of their own.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

STEM = "%Y-%m-%d/%H-%M-%S"
_started: datetime | None = None
_store: Any = None  # kept alive: torch's process group will use the same server


def begin() -> None:
    """A new command starts in this process."""
    global _started
    _started = None


def run_stem() -> str:
    """How names of run folders begin: date and time, or the number of the SLURM job.

    A requeued job keeps its number, so it finds its own folder again.
    """
    global _started
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "0"))
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{job}" + (f"_{task}" if task is not None else "")
    if _started is None:
        _started = datetime.fromisoformat(agreed("started", datetime.now().isoformat()))
    return _started.strftime(STEM)


def is_named_here(folder: Path) -> bool:
    """Whether a run's folder has its name from the time this command started, and not from the user or from SLURM."""
    return _started is not None and f"{folder.parent.name}/{folder.name}".startswith(_started.strftime(STEM))


def slurm_nodes() -> int:
    """Nodes of this SLURM job step; 1 elsewhere."""
    return int(os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1")))


def slurm_processes_per_node() -> int:
    """Processes of this SLURM job step on each node; 1 elsewhere."""
    return max(1, int(os.environ.get("SLURM_NTASKS", "1")) // slurm_nodes())


def agreed(name: str, mine: str) -> str:
    """What the first process says under a name, if torchrun (or whoever sets torch's variables) started several."""
    global _store
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in variables) or int(os.environ["WORLD_SIZE"]) < 2:
        return mine
    from torch.distributed import rendezvous

    if _store is None:
        _store, _, _ = next(rendezvous("env://"))
    key = f"condconv/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if int(os.environ["RANK"]) == 0:
        _store.set(key, mine)
    return str(_store.get(key).decode())
