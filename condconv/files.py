"""Files that are whole or not there, and checkpoints that carry their own checksum.

`torch.save` writes a zip archive. Its last field is an archive comment, which all readers skip: the SHA-256 of the file
as it was without the comment stands there, so that file and checksum are renamed into place together and a copied or
moved checkpoint keeps its checksum. `torch.load`, `zipfile` and memory mapping read such a file like any other.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

TEMPORARY = ".tmp"
LAST = Path("checkpoints") / "last.ckpt"
"""The newest checkpoint, in the folder of a run."""
_MARK = b"sha256:"
_SEAL_BYTES = len(_MARK) + 64
_CHUNK_BYTES = 1 << 24


def write_whole(path: str | Path, parts: Iterable[bytes | memoryview], keep: int = 1) -> None:
    """Write a file under a temporary name beside it, bring it to the disk, and rename it.

    Args:
        path: the file; whatever happens, it is either as it was before or complete.
        parts: its contents in order.
        keep: how many versions to keep: of 3, `last.ckpt` is the newest, then come `last-1.ckpt` and `last-2.ckpt`.

    Raises:
        OSError: the disk is full, the folder not writable, ...; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + TEMPORARY)
    try:
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        for index in range(keep - 1, 0, -1):
            _move_aside(version(path, index - 1), version(path, index))
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def version(path: Path, index: int) -> Path:
    """The name of an older version of a file: 0 is the file itself, 1 the one before it."""
    return path if index == 0 else path.with_name(f"{path.stem}-{index}{path.suffix}")


def versions(path: Path) -> list[Path]:
    """The existing versions of a file, newest first."""
    older = [found for found in path.parent.glob(f"{path.stem}-*{path.suffix}") if _index(path, found)]
    return [found for found in [path, *sorted(older, key=lambda each: _index(path, each))] if found.is_file()]


def _index(path: Path, other: Path) -> int:
    number = other.stem.removeprefix(path.stem + "-")
    return int(number) if number.isdigit() else 0


def _move_aside(newer: Path, older: Path) -> None:
    """Give `newer` the name `older` as well; the newest version must not be missing for a moment."""
    if not newer.exists():
        return
    beside = older.with_name(older.name + TEMPORARY)
    beside.unlink(missing_ok=True)
    try:
        os.link(newer, beside)
    except OSError:  # a file system without links
        shutil.copy2(newer, beside)
    os.replace(beside, older)
    beside.unlink(missing_ok=True)  # renaming onto another name of the same file leaves both


def _sync_folder(folder: Path) -> None:
    """The rename itself survives a power failure, where the file system can promise that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def save_sealed(state: Any, path: str | Path, keep: int = 1) -> None:
    """`torch.save` through `write_whole`, with the checksum inside.

    Raises:
        OSError: see `write_whole`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with buffer.getbuffer() as written:
        seal = _MARK + hashlib.sha256(written).hexdigest().encode()
        write_whole(path, [written[:-2], struct.pack("<H", len(seal)) + seal], keep)


def seal_holds(path: str | Path) -> bool | None:
    """Whether a file is as `save_sealed` wrote it; None if it carries no checksum (of others, or truncated)."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _SEAL_BYTES + 2:
            return None
        file.seek(size - _SEAL_BYTES)
        seal = file.read(_SEAL_BYTES)
        if not seal.startswith(_MARK):
            return None
        file.seek(0)
        digest, left = hashlib.sha256(), size - _SEAL_BYTES - 2
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            digest.update(chunk)
            left -= len(chunk)
        digest.update(b"\0\0")  # the length of the comment, before there was one
        return digest.hexdigest().encode() == seal[len(_MARK) :]


def newest_good(path: Path) -> Path | None:
    """The newest undamaged version of a checkpoint (`last.ckpt`, `last-1.ckpt`, ...), with a warning if it is older.

    None if there is none, or all are damaged.
    """
    found = next(filter(_is_good, versions(path)), None)
    if found is not None and found != path:
        why = "is damaged or truncated" if path.is_file() else "is missing"
        print(f"warning: {path} {why}; going back to {found}", file=sys.stderr)
    return found


def _is_good(path: Path) -> bool:
    """Whether the checksum matches; without one, whether it is a complete archive at all."""
    holds = seal_holds(path)
    return zipfile.is_zipfile(path) if holds is None else holds
