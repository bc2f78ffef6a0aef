"""One run at a time in a folder: who is refused, who takes another name, and who is not asked."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from configs import claims, launch
from configs.claims import LOCK_FILE, in_own_folder
from configs.messages import UserError
from configs.resolvers import register_resolvers
from configs.runs import CONFIG_FILE

register_resolvers()
pytestmark = pytest.mark.forks
ROOT = Path(__file__).resolve().parents[2]


def config(folder: Path, resume: bool = False) -> DictConfig:
    return OmegaConf.create({"resume": str(folder) if resume else None, "paths": {"run": str(folder)}})


@in_own_folder
def folder_of(cfg: DictConfig) -> str:
    assert (Path(cfg.paths.run) / LOCK_FILE).is_file()
    return str(cfg.paths.run)


@contextmanager
def working_in(folder: Path, before: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Another process, which works in the folder meanwhile; its number."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    @in_own_folder
    def work(cfg: DictConfig) -> None:
        before()
        there.send("begun")
        there.poll(60)

    process = context.Process(target=work, args=(config(folder),))
    process.start()
    try:
        assert here.poll(60) and here.recv() == "begun"
        yield int(process.pid or 0)
    finally:
        here.send("end")
        process.join()


@pytest.fixture
def named_by_time(tmp_path: Path) -> Iterator[Path]:
    launch.begin()
    yield tmp_path / f"{launch.run_stem()}-net-e8-s1"
    launch.begin()


def test_a_name_that_is_taken_gets_a_number(named_by_time: Path) -> None:
    folder = named_by_time
    second, third = (folder.with_name(f"{folder.name}-{number}") for number in (2, 3))
    with working_in(folder):
        assert folder_of(config(folder)) == str(second)
        with working_in(second):
            assert folder_of(config(folder)) == str(third)
    assert folder_of(config(folder)) == str(folder), "nothing was left there"
    (folder / CONFIG_FILE).touch()
    assert folder_of(config(folder)) == str(second)
    assert not list(folder.parent.rglob(LOCK_FILE))


def test_the_name_is_that_of_all_processes(named_by_time: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that Lightning starts, which get Hydra's folder, and of torchrun's, which agree."""
    folder = named_by_time
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).touch()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[f"paths.run={folder}"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        found = in_own_folder(lambda cfg: HydraConfig.get().run.dir)(cfg)
        assert found == cfg.paths.run == f"{folder}-2"
    finally:
        HydraConfig.instance().cfg = None
    monkeypatch.setattr(launch, "agreed", lambda name, mine: f"{folder}-5")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert in_own_folder(lambda cfg: str(cfg.paths.run))(config(folder)) == f"{folder}-5"


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_was_given_is_refused_while_a_run_works_there(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CONFIG_FILE).touch()
    with working_in(tmp_path) as pid:
        message = rf"{tmp_path} is running \(process {pid} on {socket.gethostname()}\): wait for it"
        with pytest.raises(UserError, match=message):
            folder_of(config(tmp_path, resume))
        # The other processes of that run: of its own node, and the first of another one.
        with monkeypatch.context() as patch:
            patch.setattr(rank_zero_only, "rank", 1)
            assert folder_of(config(tmp_path, resume)) == str(tmp_path)
        with monkeypatch.context() as patch:
            patch.setenv("NODE_RANK", "1")
            assert folder_of(config(tmp_path, resume)) == str(tmp_path)
    assert folder_of(config(tmp_path, resume)) == str(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [CONFIG_FILE]


def test_a_killed_run_is_free_at_once(tmp_path: Path) -> None:
    """Though its loading processes live on for some seconds."""
    until, end = os.pipe()

    def fork() -> None:
        if os.fork() == 0:
            os.close(end)
            os.read(until, 1)  # until the test closes the other end
            os._exit(0)
        os.close(end)

    with working_in(tmp_path, before=fork) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / LOCK_FILE).is_file()
        assert folder_of(config(tmp_path)) == str(tmp_path)
    os.close(end)


def test_a_folder_that_was_removed_may_be_used_again(tmp_path: Path) -> None:
    """As a sweep does with an unfinished job; the run that was there leaves the next one's lock alone."""
    folder = tmp_path / "run"
    with working_in(folder):
        shutil.rmtree(folder)
        lock = claims._lock(folder)
    assert lock is not None and (folder / LOCK_FILE).is_file()
    claims._release(lock, folder)
    assert not (folder / LOCK_FILE).exists()


def test_without_locks_everything_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "lockf", fails)
    assert folder_of(config(tmp_path)) == str(tmp_path)
    (tmp_path / "file").touch()  # a folder that cannot be made: the checks of the config say so
    found = in_own_folder(lambda cfg: str(cfg.paths.run))(config(tmp_path / "file" / "run"))
    assert found == str(tmp_path / "file" / "run")


def test_what_is_no_run_gets_no_lock(tmp_path: Path) -> None:
    assert in_own_folder(lambda cfg: list(tmp_path.iterdir()))(config(tmp_path, resume=True)) == []
