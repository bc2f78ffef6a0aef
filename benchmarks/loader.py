"""Images per second of the training loader, by format and decoder, against a plain torchvision loader; decoders alone.

    python -m benchmarks.loader
    python -m benchmarks.loader --workers 8 --batch-size 128
    python -m benchmarks.loader --photos /imagenet/val --fresh --output outputs     # JPEGs of yours, not generated ones

The plain loader is what most training scripts have: ImageFolder, RandomResizedCrop(224) with its bilinear default, a
flip, ToTensor, Normalize, DataLoader. Ours crops the same way, but resizes by the costlier bicubic filter, and leaves
the normalisation to the device. Gates: our evaluation crop is timm's pixel by pixel, all decoders give equal batches.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.photos import photo, photo_folders
from benchmarks.report import Report, Row, add_common_options, origin_mark, output_folder
from benchmarks.timing import time_in_turns
from data.decoding import DECODERS, choose_decoder
from data.imagenet import ImageFolderDataModule
from data.make_shards import make_shards

PLAIN = "torchvision, plain"
TARGET = 1.5
SIZE = 224


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """A function of each decoder that is installed: JPEG -> uint8 `[H, W, 3]`, named with its version."""
    found: dict[str, Callable[[bytes], Any]] = {
        "pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "torchvision": _torchvision,
    }
    for package, make in {
        "simplejpeg": lambda module: module.decode_jpeg,
        "opencv-python-headless": lambda module: partial(_opencv, module),
        "imagecodecs": lambda module: module.jpeg8_decode,
        "kornia_rs": lambda module: module.ImageDecoder().decode,
    }.items():
        try:
            found[package] = make(__import__({"opencv-python-headless": "cv2"}.get(package, package)))
        except (ImportError, AttributeError):
            continue
    return {f"{package} {metadata.version(package)}": function for package, function in found.items()}


def _torchvision(data: bytes) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _opencv(module: Any, data: bytes) -> np.ndarray:
    decoded: np.ndarray = module.imdecode(np.frombuffer(data, np.uint8), module.IMREAD_COLOR_RGB)
    return decoded


def measure_decoders(photos: list[bytes], budget_s: float) -> Row:
    """Milliseconds of each decoder for one photo, whether its pixels are Pillow's, what it makes of half a file."""
    functions = decoders()
    expected = [next(iter(functions.values()))(data).astype(int) for data in photos]
    differences = {
        name: max(int(np.abs(decode(data) - pixels).max()) for data, pixels in zip(photos, expected, strict=True))
        for name, decode in functions.items()
    }
    halves = {name: _truncated(decode, photos[0]) for name, decode in functions.items()}

    def all_of_them(decode: Callable[[bytes], object]) -> None:
        for data in photos:
            decode(data)

    times, notes = time_in_turns({n: partial(all_of_them, f) for n, f in functions.items()}, "cpu", budget_s)
    rates = {
        name: {k: v / len(photos) if k != "rounds" else v for k, v in t.as_json().items()} for name, t in times.items()
    }
    return {"kind": "decoders", "times": rates, "differences": differences, "truncated": halves, "notes": notes}


def _truncated(decode: Callable[[bytes], object], data: bytes) -> str:
    try:
        return "error" if decode(data[: len(data) // 2]) is None else "half an image"
    except Exception:  # each library has its own
        return "error"


def plain_loader(root: Path, batch_size: int, workers: int) -> DataLoader[Any]:
    """The loader of most training scripts."""
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    crop = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    dataset = ImageFolder(root / "train", transforms.Compose(crop))
    return DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )


def our_module(root: Path, batch_size: int, workers: int, decoder: str) -> ImageFolderDataModule:
    """Our loader's data module with its defaults."""
    return ImageFolderDataModule(root, batch_size_per_device=batch_size, num_workers=workers, decoder=decoder)


def check(folders: Path, shards: Path) -> None:
    """The gates.

    Raises:
        RuntimeError: a loader gives something else.
    """
    ours = {decoder: our_module(folders, 4, 0, decoder) for decoder in installed()}
    theirs = create_transform(SIZE, interpolation="bicubic", crop_pct=0.875, normalize=False, use_prefetcher=False)
    for module in ours.values():
        module.setup()
    first = next(iter(ours.values()))
    assert first.val_set is not None
    for position in range(min(4, len(first.val_set))):
        expected = theirs(Image.open(first.val_set.source.name(position)).convert("RGB"))
        for decoder, module in ours.items():
            if not torch.equal(module.val_set[position][0], expected):
                raise RuntimeError(f"the evaluation crop decoded by {decoder} is not timm's")
    batches = [next(iter(module.train_dataloader()))[0] for module in ours.values()]
    batches += [next(iter(our_module(shards, 4, 0, decoder).train_dataloader()))[0] for decoder in ours]
    for one, other in zip(batches[:: len(ours)], batches[len(ours) - 1 :: len(ours)], strict=True):
        if not torch.equal(one, other):
            raise RuntimeError("the decoders give different training batches")


def installed() -> list[str]:
    """Our decoders that are installed here."""
    return [name for name in DECODERS if name != "simplejpeg" or choose_decoder() == "simplejpeg"]


def measure_loaders(folders: Path, shards: Path, workers: int, batch_size: int, budget_s: float) -> Row:
    """Images per second of every loader over whole epochs, in turns; workers live on between the epochs."""
    loaders: dict[str, Any] = {PLAIN: plain_loader(folders, batch_size, workers)}
    for form, root in (("folders", folders), ("shards", shards)):
        for decoder in installed():
            loaders[f"{form}, {decoder}"] = our_module(root, batch_size, workers, decoder).train_dataloader()
    counted: dict[str, int] = {}
    cpu_s: dict[str, list[float]] = {name: [] for name in loaders}

    def epoch(name: str) -> None:
        start = time.process_time()
        counted[name] = sum(len(images) for images, _ in loaders[name])
        cpu_s[name].append(time.process_time() - start)

    times, notes = time_in_turns({name: partial(epoch, name) for name in loaders}, "cpu", budget_s)
    rates = {name: 1e3 * counted[name] / timing.median_ms for name, timing in times.items()}
    over = {name: timing.as_json() for name, timing in times.items()}
    row: Row = {"kind": "loaders", "workers": workers, "images_per_second": rates, "times": over, "notes": notes}
    if workers == 0:  # the CPU time of the process itself: other processes disturb it less than the clock
        row["cpu_ms"] = {name: 1e3 * statistics.median(cpu_s[name][1:]) / counted[name] for name in rates}
    return row


def render(rows: list[Row]) -> str:
    """A table of decoders, and one of loaders for each number of workers."""
    lines = [""]
    for row in rows:
        if "error" in row:
            lines += [f"{row['id']}: {row['error']}", ""]
        elif row["kind"] == "decoders":
            lines += _decoder_table(row, origin_mark(rows, row))
        else:
            lines += _loader_table(row, origin_mark(rows, row))
    return "\n".join(lines)


def _decoder_table(row: Row, mark: str) -> list[str]:
    lines = [
        f"Decoders, one thread, to RGB{mark} ({row['data']}):",
        "",
        "| decoder | ms for one photo | largest difference to Pillow | half a file |",
    ]
    lines.append("|---|---:|---:|---|")
    for name, timing in sorted(row["times"].items(), key=lambda item: item[1]["median_ms"]):
        lines.append(f"| {name} | {timing['median_ms']:.2f} | {row['differences'][name]} | {row['truncated'][name]} |")
    return [*lines, ""]


def _loader_table(row: Row, mark: str) -> list[str]:
    workers, rates = row["workers"], row["images_per_second"]
    one_core = workers == 0
    where = "in the process itself, one core" if one_core else f"{workers} worker process{'es' if workers > 1 else ''}"
    last = "CPU ms per image | over plain by CPU time" if one_core else "per worker"
    lines = [f"Loader, {where}{mark} ({row['data']}):", "", f"| loader | images/s | over plain | {last} |"]
    lines.append("|---|---:|---:|---:|" + "---:|" * one_core)
    for name, rate in rates.items():
        ends = f"{rate / max(workers, 1):.0f}"
        if one_core:
            cpu = row["cpu_ms"]
            ends = f"{cpu[name]:.2f} | {cpu[PLAIN] / cpu[name]:.2f}"
        lines.append(f"| {name} | {rate:.0f} | {rate / rates[PLAIN]:.2f} | {ends} |")
    if one_core:
        best = max(rate / rates[PLAIN] for rate in rates.values())
        verdict = "met" if best >= TARGET else "missed"
        lines += ["", f"At least {TARGET} times the plain loader per core: {verdict} ({best:.2f})."]
    return [*lines, ""]


def line(row: Row) -> str:
    """One line for the terminal."""
    if row.get("error"):
        return str(row["error"])
    if row["kind"] == "decoders":
        return ", ".join(f"{name} {timing['median_ms']:.2f} ms" for name, timing in row["times"].items())
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in row["images_per_second"].items())
    return f"{row['workers']} workers, images/s: {rates}"


@contextmanager
def photos_on_disk(photos: list[bytes], copies: int) -> Iterator[tuple[Path, Path]]:
    """Folders and shards that hold the same photos."""
    with TemporaryDirectory() as place:
        folders, shards = Path(place) / "folders", Path(place) / "shards"
        photo_folders(folders, photos, copies)
        make_shards(folders, shards, images_per_shard=100, workers=1)
        yield folders, shards


def read_photos(folder: Path | None, count: int) -> list[bytes]:
    """Files of a folder, or generated ones."""
    if folder is None:
        return [photo(number) for number in range(count)]
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if len(files) < 8:
        sys.exit(f"--photos {folder}: at least 8 JPEGs are needed, there are {len(files)}")
    return [path.read_bytes() for path in files]


def described(photos: list[bytes], folder: Path | None) -> str:
    """What a table says of its photos."""
    what = f"{len(photos)} JPEGs of {folder.name}/" if folder else f"{len(photos)} generated JPEGs of 500 x 375"
    return f"{what}, {sum(map(len, photos)) / len(photos) / 1e3:.0f} kB on average"


def main(arguments: list[str] | None = None) -> None:
    """Measures on the CPU, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder with JPEGs of yours instead of generated ones")
    parser.add_argument("--workers", type=int, nargs="+", help="worker processes (0, and one for each core)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timing of each table")
    add_common_options(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    workers = args.workers or [0, os.cpu_count() or 1]
    seconds = 1.0 if args.quick else args.seconds
    photos = read_photos(args.photos, 8 if args.quick else 64)
    copies = 1 if args.quick else 4
    batch_size = min(args.batch_size, len(photos) // 2)
    report = Report("loader", "cpu", output_folder(args), render, args.fresh)
    with photos_on_disk(photos, copies) as (folders, shards):
        check(folders, shards)
        alike = "decoders give equal batches" if len(installed()) > 1 else "of decoders there is one alone"
        print(f"gates passed: evaluation crops are timm's, {alike}")

        def loaders(count: int) -> Row:
            return {
                **measure_loaders(folders, shards, count, batch_size, seconds),
                "data": described(photos, args.photos),
            }

        def decoding() -> Row:
            few = photos[:8]
            return {**measure_decoders(few, seconds / 3), "data": described(few, args.photos)}

        cases: list[tuple[str, Callable[[], Row]]] = [("decoders", decoding)]
        cases += [(f"loaders-{count}", partial(loaders, count)) for count in workers]
        report.run(cases, line)


if __name__ == "__main__":
    main()
