"""A run's folder belongs to one run at a time: two that started in the same second would write over each other.

The first process of a run holds a lock on a file in the folder while it works; the others of the same run do not ask.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, read_write
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from configs import launch
from configs.messages import UserError
from configs.runs import CONFIG_FILE

LOCK_FILE = ".run.lock"
Result = TypeVar("Result")


def in_own_folder(task: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """For a task that works in `paths.run`, or in the folder that it resumes: no other run works there meanwhile.

    If a folder that is named by the time holds another run, `-2`, `-3`, ... is added to its name, for all processes.

    Raises:
        UserError: another run works in a folder that was given.
    """

    @wraps(task)
    def claiming(cfg: DictConfig) -> Result:
        given = Path(cfg.paths.run if cfg.resume is None else cfg.resume).expanduser().absolute()
        ours = cfg.resume is None and launch.is_named_here(given)
        with _claimed(given, ours, resumed=cfg.resume is not None) as folder:
            if ours:
                _use(Path(launch.agreed("folder", str(folder))), cfg)
            return task(cfg)

    return claiming


@contextmanager
def _claimed(given: Path, ours: bool, resumed: bool) -> Iterator[Path]:
    """The folder, claimed by the first process of the run and by nobody else of it."""
    first = rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"
    if not first or (resumed and not (given / CONFIG_FILE).is_file()):  # no run's folder: resumed_config says so
        yield given
        return
    for number in itertools.count(1):
        folder = given if number == 1 else given.with_name(f"{given.name}-{number}")
        try:
            lock = _lock(folder)
        except BlockingIOError as error:
            if ours:
                continue
            raise UserError(f"{folder} is running ({error}): wait for it to end, or stop it.") from None
        if ours and (folder / CONFIG_FILE).is_file():
            _release(lock, folder)
            continue
        break
    try:
        yield folder
    finally:
        _release(lock, folder)


def _lock(folder: Path) -> IO[str] | None:
    """The locked file; None where no file can be written, which the checks of the config put into words.

    A lock of POSIX, not flock: forked loading processes do not hold it, so it is free as soon as its process is killed.

    Raises:
        BlockingIOError: another process holds it; the message is which.
    """
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError:
            return None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read()
                file.close()
                raise BlockingIOError(holder or "another process") from None
            return file  # a file system without locks
        if _is_at(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # its holder removed it between opening and locking


def _release(file: IO[str] | None, folder: Path) -> None:
    if file is None:
        return
    with file, suppress(OSError):
        if _is_at(folder / LOCK_FILE, file):  # else the folder was removed, and perhaps made again for another run
            (folder / LOCK_FILE).unlink()


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _use(folder: Path, cfg: DictConfig) -> None:
    cfg.paths.run = str(folder)
    if HydraConfig.initialized():  # the processes that Lightning starts are given the folder from here
        with read_write(HydraConfig.get()) as hydra:
            hydra.run.dir = str(folder)
