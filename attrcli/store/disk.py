"""Files on disk: exclusive use, atomic replacement, pre-allocated datasets, and what the operating system refuses."""

import contextlib
import errno
import fcntl
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from ..errors import UsageError
from .layout import Array, Columns, chunks

LIBVER = ("earliest", "v110")  # a file with the newest superblock cannot be opened after a kill without a repair
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Lock:
    """Exclusive use of `path` until `release` or the end of the process.

    Raises: UsageError when another process has it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".lock")
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._file)
                raise UsageError(f"another attrcli is writing {path}; wait for it, or choose another --out") from error
            except OSError:  # a file system without locks
                return
            # Its former holder may have deleted the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                    return
            os.close(self._file)

    def release(self) -> None:
        """Let others have it."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


@contextlib.contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what the operating system refuses into one line for the user; `needed` bytes are for a run file's rows."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises either, often with the number in the text only
        in_text = re.search(r"errno = (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(in_text[1]) if in_text else 0)
        if not number:
            raise
        why = os.strerror(number).lower()
        if number not in _NO_SPACE or not needed:
            raise UsageError(f"cannot write {path}: {why}; choose another place") from error
        free = shutil.disk_usage(path.parent).free
        raise UsageError(
            f"{path}: {why}: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free; rows already written are kept; "
            "free some space and run the same command again, or choose another --out"
        ) from error


def require_place(path: Path) -> None:
    """Raise UsageError where no file of this name can be written, before what it shall hold is computed."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UsageError(f"cannot write {path}: it is a device or a pipe, not a file; give the name of a file")
    if path.is_dir() or not path.parent.is_dir():
        problem = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UsageError(f"cannot write {path}: {problem}; give the name of a file in an existing folder")
    with disk_errors(path):
        tempfile.TemporaryFile(dir=path.parent).close()


def require_folder(folder: Path) -> None:
    """Raise UsageError where there can be no folder of this name with files in it; none is made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with disk_errors(folder):
        tempfile.TemporaryFile(dir=there).close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to, then sync that file and rename it to `path`, or to what that links to.

    After an error nothing is left of it.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def preallocate(file: h5py.File, columns: Columns) -> None:
    """Create the datasets such that writing their rows later changes no HDF5 metadata."""
    for name, (shape, dtype) in columns.items():
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.CONTIGUOUS)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plan.set_obj_track_times(False)
        kind = h5py.h5t.py_create(dtype, logical=True)
        h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), plan)


def reserve(path: Path, size: int = 0) -> None:
    """Give the file, or its first `size` bytes if that is more, real disk blocks: HDF5 allocates sparsely.

    A full disk thus shows here as an `OSError`, not later inside the HDF5 library, which may then crash the process.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, max(size, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


class Rows:
    """The datasets of a pre-allocated file, written by offset while the HDF5 library has it closed."""

    def __init__(self, path: Path, columns: Columns) -> None:
        with h5py.File(path, "r", locking=False) as file:
            offsets = {name: file[name].id.get_offset() for name in columns}
        if None in offsets.values():
            raise UsageError(f"{path}: not laid out for writing; --force starts over")
        self._places = {name: (offsets[name], shape[1:], dtype) for name, (shape, dtype) in columns.items()}
        self._file = os.open(path, os.O_RDWR)

    def put(self, name: str, start: int, values: Array) -> None:
        """Write `values` as the rows from `start` on."""
        offset, row, dtype = self._places[name]
        data = memoryview(np.ascontiguousarray(values, dtype).reshape(-1).view("u1").data)
        position = offset + start * dtype.itemsize * math.prod(row)
        while data:
            written = os.pwrite(self._file, data, position)
            data, position = data[written:], position + written

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def size_of(columns: Columns) -> int:
    """Bytes that a file of these datasets takes at most, packed or not."""
    rows = max(shape[0] for shape, _ in columns.values())
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in columns.values()) + 512 * rows + (4 << 20)


@contextlib.contextmanager
def packed(path: Path, columns: Columns) -> Iterator[h5py.File]:
    """A new HDF5 file of compressed datasets, chunked so that one row can be read alone; its disk space is reserved."""
    with h5py.File(path, "w", libver=LIBVER, locking=False) as file:
        for name, (shape, dtype) in columns.items():
            packing = {
                "compression": "gzip",
                "compression_opts": 1,
                "shuffle": True,
            }  # level 4: 0.5 % less, 25 % slower
            file.create_dataset(name, shape, dtype, chunks=chunks(shape, dtype), **packing)
    reserve(path, size_of(columns))
    with h5py.File(path, "r+", libver=LIBVER, locking=False) as file:  # on closing, HDF5 cuts what it did not use
        yield file


def write_datasets(path: Path, columns: Columns, parts: Iterable[Mapping[str, Array]]) -> None:
    """Write an HDF5 file of packed datasets from `parts`, each with the next rows of every dataset."""
    with packed(path, columns) as file:
        start = 0
        for part in parts:
            count = len(next(iter(part.values())))
            for name, values in part.items():
                file[name][start : start + count] = values
            start += count
