"""Images in tar shards (WebDataset's format): an index of where each one lies gives random access to plain tar files.

A shard is an uncompressed tar in which the members of an example share a key, the name up to the first dot of its last
part: `key.jpg` (or .png, .webp, ...) and `key.cls`, the label as a decimal number; other members are left alone. Such
files can be read by the `webdataset` package, and those that others made can be read here.
"""

import json
import os
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from rich.progress import track

from data.folder import EXTENSIONS, content, some

INDEX = "index.npz"
PLAN_FILE = "plan.json"
"""In which `data.make_shards` writes down what a folder will hold."""
INDEX_VERSION = 1
OPEN_FILES = 64
PARTS = {"train": ("train",), "val": ("val", "validation")}


class Member(NamedTuple):
    """Where an encoded image lies in its shard, and its label."""

    offset: int
    length: int
    label: int


def find_shards(root: Path, part: str) -> tuple[Path, list[Path]]:
    """The folder and the shards of a part ("train" or "val"); an empty list if there are none.

    They are `root/train/*.tar`, or `root/*train*.tar` as published sets often have them; for "val" also "validation".

    Raises:
        ValueError: the name of a shard is of both parts ("trainval").
    """
    for name in PARTS[part]:
        if shards := sorted((root / name).glob("*.tar")):
            return root / name, shards
    for name in PARTS[part]:
        if shards := sorted(root.glob(f"*{name}*.tar")):
            both = [shard.name for shard in shards if all(any(n in shard.name for n in PARTS[p]) for p in PARTS)]
            if both:
                raise ValueError(
                    f"{root}: {some(both)} would be both train and val: put the shards into train/ and val/"
                )
            return root, shards
    return root, []


def check_shards(root: Path, part: str) -> tuple[Path, list[Path]]:
    """As `find_shards`.

    Raises:
        FileNotFoundError: there are none; the message says what is there instead.
    """
    folder, shards = find_shards(root, part)
    if not shards:
        compressed = [*root.glob("**/*.tar.gz"), *root.glob("**/*.tgz")]
        hint = f"; {compressed[0].name} is compressed: unpack it with gunzip first" if compressed else ""
        there = content(root) if root.is_dir() else "nothing: it does not exist"
        raise FileNotFoundError(
            f"no tar shards for {part} in {root}: expected {part}/*.tar or *{part}*.tar (data.root, "
            f"data.format=shards); it holds {there}{hint}"
        )
    return folder, shards


def scan_shard(path: Path) -> list[Member]:
    """The images of a shard, in its order.

    Raises:
        ValueError: it is no whole tar file, or an image has no label.
    """
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                parent, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{parent}/{stem}"
                wanted = extension.lower() == "cls" or f".{extension.lower()}" in EXTENSIONS
                if member.islnk() and wanted:
                    raise ValueError(f"{path}: {member.name} is a hard link; make the tar with --hard-dereference")
                if not member.isfile() or not stem:
                    continue
                if extension.lower() == "cls":
                    file = archive.extractfile(member)
                    labels[key] = _label(file.read() if file else b"", member.name, path)
                elif f".{extension.lower()}" in EXTENSIONS:
                    if key in images:
                        raise ValueError(f"{path} holds two images with the key of {member.name}")
                    images[key] = (member.offset_data, member.size, member.name)
            _check_end(archive)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a whole tar file ({error}): it may be truncated, copy or make it again"
        ) from error
    unlabelled = [name for key, (_, _, name) in images.items() if key not in labels]
    if unlabelled:
        raise ValueError(
            f"{path} holds {len(unlabelled)} image(s) without a label: {some(unlabelled)}; expected beside each a "
            f"member of the same key that ends in .cls and holds the number of the class"
        )
    if unused := sorted(set(labels) - set(images)):
        kinds = " ".join(EXTENSIONS)
        warnings.warn(f"{path}: {len(unused)} label(s) without an image ({kinds}): {some(unused)}", stacklevel=2)
    return [Member(offset, length, labels[key]) for key, (offset, length, _) in images.items()]


def _check_end(archive: tarfile.TarFile) -> None:
    """After the last member only zeros follow. tarfile takes a damaged or missing header for the end, in silence.

    Raises:
        tarfile.ReadError: something else follows, or nothing at all.
    """
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    rest = file.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark")
    while rest:
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {archive.offset} is damaged")
        rest = file.read(1 << 20)


def _label(data: bytes, name: str, path: Path) -> int:
    try:
        label = int(data)
    except ValueError:
        label = -1
    if label < 0:
        raise ValueError(f"{path}: {name} holds {data[:20]!r}, expected the number of a class, 0 or more")
    return label


class ShardIndex(NamedTuple):
    """All images of a part: arrays over the images, in the order of shards and members, and the shards themselves."""

    shards: list[Path]
    sizes: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    @staticmethod
    def of(shards: Sequence[Path], members: Sequence[list[Member]]) -> "ShardIndex":
        together = [member for of_shard in members for member in of_shard]
        table = np.array(together, dtype=np.int64).reshape(-1, len(Member._fields))
        sizes = np.array([path.stat().st_size for path in shards], dtype=np.int64)
        counts = np.array([len(of_shard) for of_shard in members], dtype=np.int64)
        return ShardIndex(list(shards), sizes, counts, *(np.ascontiguousarray(column) for column in table.T))

    def save(self, path: Path) -> None:
        """Write the file; a reader never sees half of it."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        arrays = {name: getattr(self, name) for name in ("sizes", "counts", "offsets", "lengths", "labels")}
        names = np.array([shard.name for shard in self.shards])
        try:
            with unfinished.open("wb") as file:
                np.savez(file, version=np.array(INDEX_VERSION), shards=names, **arrays)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def index_path(folder: Path, root: Path, part: str) -> Path:
    """Beside the shards; where all parts lie in one folder, with the part in its name."""
    return folder / INDEX if folder != root else folder / f"{part}.{INDEX}"


def open_index(root: Path, part: str) -> ShardIndex:
    """The index of a part, read from its file, or made (with a progress bar) and written if there is none.

    Raises:
        FileNotFoundError: there are no shards, or one that the index lists is missing.
        ValueError: a shard is broken, or index and shards are not of each other.
    """
    folder, shards = check_shards(root, part)
    path = index_path(folder, root, part)
    if path.exists():
        return _load_index(path, shards)
    index = ShardIndex.of(shards, scan_shards(shards, f"index of {folder}"))
    if not len(index.labels):
        raise FileNotFoundError(f"the {len(shards)} tar file(s) for {part} in {folder} hold no images")
    _check_finished(folder, len(index.labels))
    try:
        index.save(path)
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error.strerror}): every start reads all shards again", stacklevel=2)
    return index


def _check_finished(folder: Path, num_images: int) -> None:
    """Shards that `data.make_shards` has not finished must not pass for the whole set."""
    plan = folder / PLAN_FILE
    planned = json.loads(plan.read_text(encoding="utf-8"))["images"] if plan.exists() else num_images
    if planned != num_images:
        raise ValueError(
            f"{folder} holds {num_images} of the {planned} images that data.make_shards was to put there: run it again "
            f"to finish, or delete {plan} to use what is there"
        )


def scan_shards(shards: Sequence[Path], what: str) -> list[list[Member]]:
    """`scan_shard` of each, in several processes where there are many."""
    if len(shards) < 8:
        return [scan_shard(shard) for shard in shards]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(track(pool.map(scan_shard, shards, chunksize=4), description=what, total=len(shards)))


def _load_index(path: Path, shards: list[Path]) -> ShardIndex:
    remedy = f"copy the shards again, or delete {path} to use what is there"
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        version = int(stored.pop("version"))
        names = [str(name) for name in stored.pop("shards")]
        fields = [stored[name] for name in ("sizes", "counts", "offsets", "lengths", "labels")]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{path} is not an index of shards, or a broken one: delete it, it will be made again"
        ) from error
    if version != INDEX_VERSION:
        raise ValueError(f"{path} has version {version}, this code reads {INDEX_VERSION}: delete it")
    there = {shard.name: shard for shard in shards}
    if missing := sorted(set(names) - set(there)):
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} shards are missing in {path.parent}: {some(missing)}; {remedy}"
        )
    if unknown := sorted(set(there) - set(names)):
        raise ValueError(f"{path} does not know {len(unknown)} of the shards beside it: {some(unknown)}; {remedy}")
    index = ShardIndex([there[name] for name in names], *fields)
    changed = [
        f"{shard.name} ({shard.stat().st_size:,} bytes, not {size:,})"
        for shard, size in zip(index.shards, index.sizes.tolist(), strict=True)
        if shard.stat().st_size != size
    ]
    if changed:
        raise ValueError(
            f"{len(changed)} shard(s) in {path.parent} are truncated or changed: {some(changed)}; {remedy}"
        )
    return index


class ShardSource:
    """Images of tar shards, as a source of `data.stored.StoredImages`; reads each from its place in the shard.

    Args:
        index: of the shards.
        folder: named in messages.
        kept: positions of the images that are used, ascending; None for all.
    """

    def __init__(self, index: ShardIndex, folder: Path, kept: np.ndarray | None = None) -> None:
        self.folder = folder
        self.shards = index.shards
        shard_of = np.repeat(np.arange(len(index.shards)), index.counts)
        kept = np.arange(len(index.labels)) if kept is None else kept
        self._shard_of, self.labels = shard_of[kept], index.labels[kept]
        self._offsets, self._lengths = index.offsets[kept], index.lengths[kept]
        self.blocks: list[int] = np.bincount(self._shard_of, minlength=len(self.shards)).tolist()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, position: int) -> bytes:
        length = int(self._lengths[position])
        data = os.pread(self._file(int(self._shard_of[position])), length, int(self._offsets[position]))
        if len(data) < length:
            raise OSError("the shard ends within this image")
        return data

    def label(self, position: int) -> int:
        return int(self.labels[position])

    def name(self, position: int) -> str:
        """Shard and member; the member's name is read from the header before it."""
        path = self.shards[int(self._shard_of[position])]
        try:
            with path.open("rb") as file:
                file.seek(int(self._offsets[position]) - tarfile.BLOCKSIZE)
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace")
        except (OSError, tarfile.TarError):
            return f"{path}, image at byte {self._offsets[position]}"
        return f"{path}:{header.name}"

    def _file(self, shard: int) -> int:
        """A descriptor; the least recently used one is closed when there are many."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors are of this process

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
