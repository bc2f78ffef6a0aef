"""Runs in W&B's offline folders: config, summary, history and end, read without a server.

The file `run-<id>.wandb` is a log in LevelDB's format (a header of 7 bytes, blocks of 32 KiB, records of type full,
first, middle, last) of protobuf messages. wandb 0.31 has no reader of its own in Python any more, so the log is taken
apart here and the messages by wandb's own classes.
"""

from __future__ import annotations

import json
import statistics
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.metrics import SPEED, summarize
from reports.runs import FINISHED, RESULT, Run, parts_of_wandb_run

HEADER = struct.Struct("<4sHB")
RECORD = struct.Struct("<IHB")  # CRC of type and data, length, type
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STEP_KEYS = ("trainer/global_step", "_step")


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, up to where it is cut or broken.

    Raises:
        ValueError: it is not a log of W&B, or one of its records fails its checksum.
    """
    if len(content) < HEADER.size or HEADER.unpack_from(content)[0] != b":W&B":
        raise ValueError("not a file of W&B")
    position, parts = HEADER.size, b""
    while position + RECORD.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < RECORD.size:  # a header never crosses blocks: the rest is padding
            position += left
            continue
        checksum, length, kind = RECORD.unpack_from(content, position)
        data = content[position + RECORD.size : position + RECORD.size + length]
        if kind == 0 and length == 0:
            position += left
            continue
        if len(data) < length:
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"wrong checksum at byte {position}")
        position += RECORD.size + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts


def read_wandb(folder: Path) -> Run:
    """The run of an offline folder (`offline-run-<time>-<id>/`), with what earlier folders of its id hold."""
    run = Run(folder)
    beside = folder.parent.parent
    if (beside / RESULT).is_file():  # the folder of a run of train.py: its plain files say more
        from reports.runs import read_run

        return read_run(beside)
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError:
        run.status = "unreadable"
        run.problems.append("W&B's files need the package wandb (pip install wandb), or give the run's own folder")
        return run
    history: list[dict[str, float]] = []
    summary: dict[str, Any] = {}
    exit_code: int | None = None
    for path in (path for part in parts_of_wandb_run(folder) for path in sorted(part.glob("*.wandb"))):
        exit_code = None  # the last part says how it ended
        try:
            for data in log_records(path.read_bytes()):
                record = Record()
                record.ParseFromString(data)
                exit_code = _take(record, run, history, summary, exit_code)
        except Exception as error:  # protobuf's DecodeError has no common base with the others
            run.problems.append(f"{path.name} is damaged ({error})")
    run.curves, last = summarize(history)
    run.status = "unreadable" if not run.config else "incomplete" if exit_code is None else FINISHED
    if exit_code:
        run.status, run.result["error"] = "failed", f"W&B recorded exit code {exit_code}"
    elif run.status == "incomplete":
        run.result["error"] = "not finished: W&B recorded no end"
    _fill_result(run, {**last, **_numbers(summary)}, history)
    return run


def _take(record: Any, run: Run, history: list[dict[str, float]], summary: dict[str, Any], code: int | None) -> Any:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.result["name"] = record.run.display_name or record.run.run_id
        run.result["started"] = record.run.start_time.ToDatetime().isoformat(timespec="seconds")
        _nest(run.config, record.run.config.update)
    elif kind == "config":
        _nest(run.config, record.config.update)
    elif kind == "history":
        line = _numbers(_flat(record.history.item))
        step = next((line[key] for key in STEP_KEYS if key in line), float(len(history)))
        history.append({"step": step, **line})
    elif kind == "summary":
        summary.update(_flat(record.summary.update))
    elif kind == "exit":
        return int(record.exit.exit_code)
    return code


def _items(items: Any) -> Iterator[tuple[list[str], Any]]:
    for item in items:
        try:
            yield list(item.nested_key) or [item.key], json.loads(item.value_json)
        except ValueError:
            continue


def _flat(items: Any) -> dict[str, Any]:
    return {"/".join(keys): value for keys, value in _items(items)}


def _nest(config: dict[str, Any], items: Any) -> None:
    for keys, value in _items(items):
        if keys[0].startswith("_wandb"):
            continue
        node = config
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value


def _numbers(mapping: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in mapping.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _fill_result(run: Run, last: dict[str, float], history: list[dict[str, float]]) -> None:
    """The keys of result.json, as far as W&B knows them: a training of ours wrote them into the summary at its end."""
    run.result["figures"] = {k: v for k, v in last.items() if k.split("/")[0] in ("train", "val", "val_ema", "test")}
    run.result["model"] = {k.removeprefix("model/"): v for k, v in last.items() if k.startswith("model/")}
    run.result |= {k.removeprefix("result/"): v for k, v in last.items() if k.startswith("result/")}
    # W&B's own clock starts anew in every part of a run that was resumed.
    run.result.setdefault("seconds", last.get("_runtime", last.get("_wandb/runtime")))
    speeds = [line[SPEED] for line in history if SPEED in line]
    if speeds:
        run.result.setdefault("images_per_second", statistics.median(speeds))
    epochs = [line["epoch"] for line in history if "epoch" in line and any(k.startswith("train/") for k in line)]
    run.result["epochs"] = max(epochs) + 1 if epochs else None
