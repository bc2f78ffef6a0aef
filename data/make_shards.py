"""Makes tar shards from image folders: `python -m data.make_shards root=/imagenet out=/imagenet_shards`.

root holds train/ and val/ with a folder of images per class, out gets train/*.tar, val/*.tar, an index beside them and
classes.txt; then `data.root=<out>` trains from it. Images are copied as they are. The training images are put into an
order drawn from the seed, so that every shard holds a mixture of the classes. A shard is written under a temporary
name, read back, and renamed; a run that was interrupted goes on with the shards that are missing.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.folder import Example, find_classes, find_images, some
from data.imagenet import CLASSES_FILE
from data.shards import PLAN_FILE, ShardIndex, index_path, scan_shard

OPTIONS = {
    "root": "folder with train/ and val/, each with one folder of images per class (required)",
    "out": "folder of the shards (required)",
    "images_per_shard": "images in a shard (1000)",
    "parts": "which parts, separated by commas (train,val)",
    "workers": "processes (one per CPU)",
    "seed": "of the order of the training images (0)",
}


@dataclass(frozen=True)
class Job:
    """One shard that is to be made."""

    path: Path
    examples: list[Example]
    first: int


def make_shards(
    root: Path,
    out: Path,
    *,
    parts: Sequence[str] = ("train", "val"),
    images_per_shard: int = 1000,
    workers: int | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Make what is missing; returns the number of images of each part.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: out holds shards of other images or of another order, or a shard does not hold what was put in.
        OSError: an image cannot be read, or the disk is full.
    """
    classes = find_classes(root / "train")
    label_of = {name: label for label, name in enumerate(classes)}
    jobs: dict[str, list[Job]] = {}
    for part in parts:
        found = find_classes(root / part)
        if unknown := sorted(set(found) - set(classes)):
            raise ValueError(f"{root / part} holds {len(unknown)} class folder(s) that train/ has not: {some(unknown)}")
        examples = find_images(root / part, found, label_of)
        if part == "train":
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
            examples = [examples[position] for position in order.tolist()]
        jobs[part] = plan(examples, out / part, images_per_shard)
        settle_plan(examples, root / part, out / part, images_per_shard)
    check_space([job for of_part in jobs.values() for job in of_part], out)
    write_all([job for of_part in jobs.values() for job in of_part], workers or os.cpu_count() or 1)
    out.mkdir(parents=True, exist_ok=True)
    (out / CLASSES_FILE).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return {part: finish(of_part, out, part) for part, of_part in jobs.items()}


def plan(examples: list[Example], folder: Path, images_per_shard: int) -> list[Job]:
    """Cuts the examples into shards of one size, the last one aside."""
    starts = range(0, len(examples), images_per_shard)
    digits = max(6, len(str(len(starts))))
    return [
        Job(folder / f"{number:0{digits}d}.tar", examples[first : first + images_per_shard], first)
        for number, first in enumerate(starts)
    ]


def settle_plan(examples: list[Example], source: Path, folder: Path, images_per_shard: int) -> None:
    """Write down what the shards will hold, or compare it with what was begun here before."""
    names = "\n".join(f"{os.path.relpath(path, source)} {label}" for path, label in examples)
    digest = hashlib.sha256(names.encode()).hexdigest()
    ours = {"images": len(examples), "images_per_shard": images_per_shard, "names_sha256": digest}
    file = folder / PLAN_FILE
    if file.exists():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ValueError(
                f"{folder} holds shards of other images, sizes or order ({theirs.get('images')} images, "
                f"{theirs.get('images_per_shard')} in a shard): give another out=, or delete the folder"
            )
    elif folder.is_dir() and any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds tar files that were not made by this command: give another out=")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def check_space(jobs: list[Job], out: Path) -> None:
    """An error now is better than one after hours.

    Raises:
        OSError: the images are larger than what the disk has free.
    """
    missing = [job for job in jobs if not job.path.exists()]
    needed = sum(os.path.getsize(example.path) + 3 * tarfile.BLOCKSIZE for job in missing for example in job.examples)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(f"the shards need {needed / 1e9:.1f} GB, but {out} has {free / 1e9:.1f} GB free")


def write_all(jobs: list[Job], workers: int) -> None:
    """Write the shards that are missing, in several processes, with a bar over the images."""
    todo = [job for job in jobs if not job.path.exists()]
    if done := len(jobs) - len(todo):
        print(f"{done} of {len(jobs)} shards are there already")
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, ProcessPoolExecutor(max(1, min(workers, len(todo)))) as pool:
        bar = progress.add_task("", total=sum(len(job.examples) for job in todo))
        pending: dict[Future[int], Job] = {pool.submit(write_shard, job): job for job in todo}
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    progress.advance(bar, future.result())
                    del pending[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_shard(job: Job) -> int:
    """Write one shard, read it back and give it its name; returns its number of images."""
    unfinished = job.path.with_name(f".{job.path.name}.{os.getpid()}.tmp")
    try:
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, example in enumerate(job.examples, job.first):
                with open(example.path, "rb") as file:
                    data = file.read()
                stem, extension = os.path.splitext(os.path.basename(example.path))
                # Dots would end the key; the original name stays readable in messages.
                key = f"{number:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"
                _add(archive, key + extension.lower(), data)
                _add(archive, f"{key}.cls", str(example.label).encode())
        members = scan_shard(unfinished)
        expected = [(os.path.getsize(example.path), example.label) for example in job.examples]
        if [(member.length, member.label) for member in members] != expected:
            raise ValueError(f"{job.path} does not hold what was put in: did the images change meanwhile?")
        os.replace(unfinished, job.path)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(job.examples)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no times or owners: the same images give the same bytes
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def finish(jobs: list[Job], out: Path, part: str) -> int:
    """Read all shards of a part back, compare the counts, write the index; returns the number of images."""
    folder = out / part
    extra = sorted({path.name for path in folder.glob("*.tar")} - {job.path.name for job in jobs})
    if extra:
        raise ValueError(f"{folder} holds {len(extra)} more tar file(s): {some(extra)}; remove them")
    members = [scan_shard(job.path) for job in jobs]
    for job, found in zip(jobs, members, strict=True):
        if len(found) != len(job.examples):
            raise ValueError(
                f"{job.path} holds {len(found)} images, not {len(job.examples)}: delete it and start again"
            )
    ShardIndex.of([job.path for job in jobs], members).save(index_path(folder, out, part))
    return sum(len(found) for found in members)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments to those of `make_shards`; argparse prints the mistakes."""
    listing = "\n".join(f"  {key + '=':18s} {text}" for key, text in OPTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m data.make_shards",
        description=__doc__,
        epilog=f"options:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("options", nargs="*", metavar="key=value")
    given: dict[str, Any] = {}
    for argument in parser.parse_args(arguments).options:
        key, equals, value = argument.partition("=")
        if not equals or not value or key not in OPTIONS:
            parser.error(f"{argument}: expected one of {', '.join(f'{key}=...' for key in OPTIONS)}")
        given[key] = value
    if missing := [f"{key}=..." for key in ("root", "out") if key not in given]:
        parser.error(f"{' '.join(missing)} must be given")
    for key, smallest in (("images_per_shard", 1), ("workers", 1), ("seed", 0)):
        if key in given:
            if not given[key].isdecimal() or int(given[key]) < smallest:
                parser.error(f"{key}={given[key]}: expected a whole number of at least {smallest}")
            given[key] = int(given[key])
    if "parts" in given:
        given["parts"] = tuple(given["parts"].split(","))
        if not set(given["parts"]) <= {"train", "val"}:
            parser.error(f"parts={','.join(given['parts'])}: there are train and val")
    return given | {key: Path(given[key]).expanduser() for key in ("root", "out")}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a mistake ends it with one sentence."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        counts = make_shards(**options)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on with the shards that are missing.")
    found = " and ".join(f"{count:,} for {part}" for part, count in counts.items())
    print(f"{found} images, verified, in {options['out']}. To train from them: data.root={options['out']}")


if __name__ == "__main__":
    main()
