"""Files that are whole or not there: interrupted writes, full disks, damaged and truncated checkpoints."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from condconv.files import newest_good, save_sealed, seal_holds, versions, write_whole


def state(value: int) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((1000,), float(value))}, "step": value}


def test_a_sealed_file_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    save_sealed(state(3), path)
    assert seal_holds(path) is True
    loaded = torch.load(path, weights_only=True)
    assert loaded["step"] == 3 and torch.equal(loaded["state_dict"]["weight"], state(3)["state_dict"]["weight"])
    assert torch.load(path, weights_only=True, mmap=True)["step"] == 3
    assert zipfile.ZipFile(path).comment.startswith(b"sha256:") and zipfile.ZipFile(path).testzip() is None
    moved = path.rename(tmp_path / "elsewhere.ckpt")  # the checksum travels with it
    assert seal_holds(moved) is True
    assert [each.name for each in path.parent.iterdir()] == []


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_sealed(state(3), path)
    whole = path.read_bytes()
    for position in (0, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert seal_holds(path) is False, position
    for length in (0, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert seal_holds(path) is not True, length
    torch.save(state(3), path)  # of another program
    assert seal_holds(path) is None


def test_older_versions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in range(5):
        save_sealed(state(step), path, keep=3)
    assert [found.name for found in versions(path)] == ["last.ckpt", "last-1.ckpt", "last-2.ckpt"]
    assert [torch.load(found, weights_only=True)["step"] for found in versions(path)] == [4, 3, 2]
    assert all(seal_holds(found) for found in versions(path))
    assert len(list(tmp_path.iterdir())) == 3


def test_going_back_to_an_older_version_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, older, oldest = (tmp_path / name for name in ("last.ckpt", "last-1.ckpt", "last-2.ckpt"))
    for step in range(3):
        save_sealed(state(step), path, keep=3)
    assert newest_good(path) == path and capsys.readouterr().err == ""
    path.write_bytes(b"cut")
    older.write_bytes(b"cut")
    assert newest_good(path) == oldest
    assert capsys.readouterr().err == f"warning: {path} is damaged or truncated; going back to {oldest}\n"
    path.unlink()
    assert newest_good(path) == oldest
    assert capsys.readouterr().err == f"warning: {path} is missing; going back to {oldest}\n"
    oldest.write_bytes(b"cut")
    assert newest_good(path) is None and capsys.readouterr().err == ""


def test_nothing_changes_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    for step in (1, 2):
        save_sealed(state(step), path, keep=2)

    class FullDisk:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> FullDisk:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, part: bytes) -> int:
            self.file.write(part[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(builtins, "open", lambda *args, original=open, **options: FullDisk(original(*args, **options)))
    with pytest.raises(OSError, match="No space left"):
        save_sealed(state(3), path, keep=2)
    monkeypatch.undo()
    assert [torch.load(found, weights_only=True)["step"] for found in versions(path)] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_at_any_moment_leaves_a_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each rename in turn, and without any clean-up, as by SIGKILL."""

    class Killed(BaseException):
        pass

    for moment in (1, 2, 3):
        path = tmp_path / str(moment) / "last.ckpt"
        for step in (1, 2, 3):
            save_sealed(state(step), path, keep=3)
        calls = 0

        def replace(source: Any, target: Any, moment: int = moment, original: Any = os.replace) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Killed
            original(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            patched.setattr(Path, "unlink", lambda *args, **options: None)
            with pytest.raises(Killed):
                save_sealed(state(4), path, keep=3)
        assert torch.load(path, weights_only=True)["step"] == 3
        assert all(seal_holds(found) for found in versions(path))
        save_sealed(state(5), path, keep=3)  # what was left lying about is in nobody's way
        assert [torch.load(found, weights_only=True)["step"] for found in versions(path)][:2] == [5, 3]
        assert not list(path.parent.glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    path = small_disk / "last.ckpt"
    write_whole(path, [b"x" * 30000])
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, [b"y" * 50000], keep=2)
    assert path.read_bytes() == b"x" * 30000 and [each.name for each in small_disk.iterdir()] == ["last.ckpt"]
