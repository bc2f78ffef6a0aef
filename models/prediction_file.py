"""The file of predictions, a .json list or a .csv table: refused before the first image, not after the last."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from condconv.files import write_whole

SUFFIXES = (".csv", ".json")


def usable_path(name: str | Path | None) -> Path | None:
    """Where to write predictions, None for nowhere; the file's folder is made, the file not touched.

    Raises:
        ValueError: the name does not end with .csv or .json.
        OSError: no file can be made there.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: predictions are written as {' or '.join(SUFFIXES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):  # `write_whole` writes beside the file, too
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise OSError(f"cannot write predictions to {path}: {error.strerror}. Set out=...") from error
    return path


def write_json(path: Path, predictions: Iterable[dict[str, Any]]) -> None:
    """A list of plain values.

    Raises:
        OSError: the disk is full, ...; a file that was there is kept.
    """
    write_whole(path, [json.dumps(list(predictions), indent=1).encode()])


def write_csv(path: Path, head: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """A table.

    Raises:
        OSError: the disk is full, ...; a file that was there is kept.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(head)
    table.writerows(lines)
    write_whole(path, [text.getvalue().encode()])
