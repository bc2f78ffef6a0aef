"""The part of finished runs that a report reads, small enough for git: `python -m reports.collect runs=... out=...`.

`config.yaml`, `result.json` and `metrics.csv` of every finished run are copied, as are `sweep.json` files, under their
folders: absolute paths are reduced to what they end in, curves to one line for each epoch. Nothing in `out` is deleted,
so runs of several machines and days add up, and the jobs of their sweeps: one that is no longer planned has to be taken
out of `sweep.json` by hand. Of a run that is there already the one that ended last is kept.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from reports.configs import shortened
from reports.metrics import SPEED
from reports.runs import CONFIG, FINISHED, METRICS, RESULT, SWEEP, ReportError, find_folders, read_run

HELP = """Copy what a report needs of finished runs into a folder that git can hold.

  python -m reports.collect runs=outputs/evidence/reduced out=docs/results/cifar10/runs
  python report.py runs=docs/results/cifar10/runs
  python -m reports.collect analysis=outputs/.../analysis out=docs/results/cifar10/analysis

  runs=      folder of the runs, with any folders between
  out=       where they go, under the same names; what is there stays, unless the same run ended later
  analysis=  instead of runs=: the folder of a routing analysis; its Markdown, pictures in fewer colours, small tables;
             not its contact sheets: images of a data set belong to their owners
"""
SHEETS = "top_images_"
SHEET_SECTION = re.compile(rf"^## (?:(?!^## ).)*?!\[[^]]*\]\({SHEETS}[^)]*\)\n+", re.MULTILINE | re.DOTALL)
"""The contact sheets of a routing analysis: how their files begin, and a section of its Markdown that shows one."""
# Of these columns only the last value is kept: there are many, for each layer.
ONCE = ("routing/",)
# Said elsewhere: in result.json and config.yaml.
NEVER = ("model/", "lr-")
DIGITS = 5
PAGE = "index.md"
COLORS = 48
SMALL_TABLE = 20_000


def collect(root: Path, out: Path) -> tuple[list[str], list[str]]:
    """Copy the finished runs below `root`; returns the names of those copied, and of those that are not finished.

    Raises:
        ReportError: there is no such folder, or `out` lies in it.
    """
    given, root, out = root, root.expanduser().absolute(), out.expanduser().absolute()
    roots = (root, given)
    if out == root or root in out.parents:
        raise ReportError(f"out={out} lies in runs={root}: the copies would be found as runs.")
    copied, unfinished = [], []
    for folder in find_folders([root]):
        run, name = read_run(folder), str(folder.relative_to(root))
        if run.status != FINISHED or not (folder / METRICS).is_file():
            unfinished.append(name)
            continue
        there = read_run(out / name) if (out / name / RESULT).is_file() else None
        if there is not None and there.ended >= run.ended:
            continue
        (out / name).mkdir(parents=True, exist_ok=True)
        config = yaml.safe_dump(portable_config(run.config, roots), sort_keys=False, allow_unicode=True)
        (out / name / METRICS).write_text(thinned(folder / METRICS), encoding="utf-8")
        (out / name / CONFIG).write_text(config, encoding="utf-8")
        _write_json(out / name / RESULT, portable(run.result, roots))  # last: it says that the rest is there
        copied.append(name)
    for path in sorted(root.rglob(SWEEP)):
        if (out / path.relative_to(root).parent).is_dir():
            content = portable(json.loads(path.read_text(encoding="utf-8")), roots)
            target = out / path.relative_to(root)
            before = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
            _write_json(target, {**content, "jobs": {**before.get("jobs", {}), **content["jobs"]}})
    return copied, unfinished


def collect_analysis(folder: Path, out: Path) -> list[Path]:
    """Copy a routing analysis: its Markdown, its PNGs with few colours, its small tables; returns the files.

    Contact sheets stay behind, with their sections: they show images of the data set, which are not ours to publish.

    Raises:
        ReportError: there is none in the folder.
    """
    page = folder.expanduser() / PAGE
    if not page.is_file():
        raise ReportError(f"analysis={folder}: there is no {PAGE}; python eval.py ckpt=... analysis=routing writes it.")
    from PIL import Image  # imported here: runs need none of it

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(page.parent.glob("*.png")):
        if path.name.startswith(SHEETS):
            continue
        with Image.open(path) as image:
            image.convert("RGB").quantize(COLORS).save(out / path.name, optimize=True)
        written.append(out / path.name)
    for path in sorted(page.parent.glob("*.csv")):
        if path.name != METRICS and path.stat().st_size <= SMALL_TABLE:  # with metrics.csv it would be taken for a run
            written.append(Path(shutil.copyfile(path, out / path.name)))
    there = {path.name for path in written}
    text = SHEET_SECTION.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"\[([^]]+\.csv)\]\(([^)]+)\)(, )?", lambda m: m[0] if m[2] in there else "", text)
    (out / PAGE).write_text(shortened(text), encoding="utf-8")
    return [out / PAGE, *written]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def portable(value: Any, roots: Sequence[Path]) -> Any:
    """The value without this machine's paths: those below a root become relative, others end in their last part."""
    if isinstance(value, dict):
        return {key: portable(item, roots) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, roots) for item in value]
    if not isinstance(value, str):
        return value
    for root in roots:
        value = value.replace(f"{root}/", "")
    return shortened(value)


def portable_config(config: dict[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """The same of a config; its data set is known by the last part of its folder, wherever that lies."""
    found: dict[str, Any] = portable(config, roots)
    data = found.get("data")
    if isinstance(data, dict) and isinstance(data.get("root"), str):
        data["root"] = PurePath(data["root"]).name
    return found


def thinned(metrics: Path) -> str:
    """`metrics.csv` with one line for each epoch: means of what was logged while training, else the last values."""
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs: dict[str, list[dict[str, str]]] = {}
    last: dict[str, str] = {}
    waiting: list[dict[str, str]] = []
    for row in rows:
        waiting.append({key: value for key, value in row.items() if value and not key.startswith(ONCE + NEVER)})
        last |= {key: value for key, value in row.items() if value and key.startswith(ONCE)}
        if row.get("epoch"):  # lines before it, without an epoch of their own, belong to it
            epochs.setdefault(row["epoch"], []).extend(waiting)
            waiting = []
    lines = [dict(_values(of_epoch)) for of_epoch in epochs.values()]
    if lines:
        lines[-1] |= _values([last])
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _values(rows: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Of one epoch's lines: each column's value."""
    for column in dict.fromkeys(key for row in rows for key in row):
        found = [row[column] for row in rows if row.get(column)]
        if not found:
            continue
        if column in ("step", "epoch"):
            yield column, found[-1]
            continue
        numbers = [float(text) for text in found]
        if column == SPEED:
            value = statistics.median(numbers)
        elif column.startswith("train/"):
            value = statistics.fmean(numbers)
        else:
            value = numbers[-1]
        yield column, f"{value:.{DIGITS}g}"


def main() -> None:
    """The command."""
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if set(given) not in ({"runs", "out"}, {"analysis", "out"}) or not all(given.values()):
        print(HELP, end="")
        sys.exit(0 if {"-h", "--help"} & set(given) else 2)
    try:
        if "analysis" in given:
            files = collect_analysis(Path(given["analysis"]), Path(given["out"]))
            size = sum(path.stat().st_size for path in files) / 1000
            print(f"copied {len(files)} files, {size:.0f} kB, to {given['out']}")
            return
        copied, unfinished = collect(Path(given["runs"]), Path(given["out"]))
    except (ReportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"copied {len(copied)} finished runs to {given['out']}; {len(unfinished)} are not finished")


if __name__ == "__main__":
    main()
