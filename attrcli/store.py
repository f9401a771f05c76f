"""The HDF5 files: schema, writing that survives a kill, resuming, reading.

A run in progress is `run.h5.part`. All its datasets are allocated when it is laid out (contiguous, strings of fixed length),
so a batch is written by `pwrite` at the datasets' offsets: data bytes change, HDF5 metadata never does. Arrays go first, the
status byte last; a row whose status is not `OK` does not count. `finish` repacks the rows into `run.h5` and renames it into place.
Every new file is made under another name, synced and renamed. This guards against a killed process at any moment; after a power
loss the rows written since the layout may be missing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from .errors import UsageError

SCHEMA = "attrcli/1"
UNLABELLED = 65535
MESSAGE_BYTES = 200
VERSION_KEYS = ("versions", "device", "threads", "batch_size")
VOLATILE = frozenset({"schema", "complete", "history", "forced", "argv", "inputs_root", "model", "model_path"})
"""Attributes that do not say what is computed: like those of `VERSION_KEYS`, they may differ when a run is resumed.

`VERSION_KEYS` move results within rounding; when rows made under other values are kept, `history` lists those values."""

Array = npt.NDArray[Any]
_FILL = {"label": UNLABELLED, "target": -1}
_LIBVER = ("earliest", "v110")  # the newest superblock marks a file that was killed while open as unusable
_BLOCK_BYTES = 1 << 24
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"


class Status(IntEnum):
    """What became of a row."""

    TODO = 0
    OK = 1
    ERROR = 2
    SKIPPED = 3


@dataclass(frozen=True)
class Layout:
    """The shape of one row: (C, H, W), (F,), (4, L) or any; `outputs` of any rank is stored flattened, K numbers a row."""

    attribution: tuple[int, ...]
    outputs: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str = "f4"

    def __post_init__(self) -> None:
        taken = {"sample", "output", *_columns_of_row((), 1, self.dtype, 1)}
        if len(self.dims) != len(self.attribution) or len(taken.union(self.dims)) != len(taken) + len(self.dims):
            raise ValueError(f"dims {self.dims} must be one new name for each axis of {self.attribution}")
        if 0 in (*self.attribution, *self.outputs) or self.dtype not in ("f4", "f8"):
            raise ValueError(f"{self}: empty rows cannot be stored, and numbers are f4 or f8")

    def columns(self, count: int, id_bytes: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of every dataset of a file with `count` rows."""
        rows = _columns_of_row(self.attribution, math.prod(self.outputs), self.dtype, id_bytes)
        return {name: ((count, *shape), dtype) for name, (shape, dtype) in rows.items()}


def _columns_of_row(
    attribution: tuple[int, ...], outputs: int, real: str, id_bytes: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    scalars = dict.fromkeys(("score", "baseline_score", "completeness_delta", "remainder"), ((), np.dtype(real)))
    return {
        "attribution": (attribution, np.dtype(real)),
        "prediction": ((outputs,), np.dtype(real)),
        "label": ((), np.dtype("u2")),
        "target": ((), np.dtype("i4")),
        **scalars,
        "sample_id": ((), h5py.string_dtype("utf-8", id_bytes)),
        "sample_sha256": ((), h5py.string_dtype("ascii", 64)),
        "status": ((), np.dtype("u1")),
        "message": ((), h5py.string_dtype("utf-8", MESSAGE_BYTES)),
    }


# Attributes ---------------------------------------------------------------------------------------------------------


def config_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that say what is computed: rows whose `config_of` differs never share a file."""
    return {key: value for key, value in _plain(attributes).items() if key not in VOLATILE and key not in VERSION_KEYS}


def _plain(value: Any) -> Any:
    """`value` as JSON returns it: numpy scalars and arrays, tuples and paths become plain Python."""

    def default(item: Any) -> Any:
        return item.tolist() if isinstance(item, np.generic | np.ndarray) else os.fspath(item)

    return json.loads(json.dumps(value, default=default))


def _encode(value: Any) -> Any:
    number = isinstance(value, bool | int | float) and abs(value) < 2**63
    if number or (isinstance(value, str) and value.isprintable() and not _is_json(value)):
        return value
    return json.dumps(value)


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return json.loads(value) if _is_json(value) else value
    return value.item() if isinstance(value, np.generic) else value


def _is_json(text: str) -> bool:
    return text.startswith(("{", "[", '"')) or text == "null" or text.lstrip("-").isdigit()


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        pairs = (_flat(item, f"{name}.{key}" if name else key) for key, item in value.items())
        return {key: text for part in pairs for key, text in part.items()}
    text = json.dumps(value, ensure_ascii=False)
    return {name: text if len(text) <= 60 else text[:57] + "..."} if name else {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase for each key (nested ones dotted) whose value differs."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key} is {before.get(key, 'absent')}, asked for {after.get(key, 'absent')}" for key in keys]


# Reading ------------------------------------------------------------------------------------------------------------


class RunFile:
    """A run file, finished or `.part`, opened for reading; datasets are read on use. Close it or use `with`.

    Raises: UsageError for a file that is missing, damaged or not a run file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{self.path}: no such file; a run file is what `attrcli explain --out` writes")
        try:
            self._file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            kind = "is damaged or cut short" if h5py.is_hdf5(self.path) else "is not an HDF5 file"
            raise UsageError(f"{self.path}: {kind} ({error})") from error
        try:
            self._read_small()
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            self.close()
            raise UsageError(f"{self.path}: the run file is damaged ({error})") from error
        except UsageError:
            self.close()
            raise

    def _read_small(self) -> None:
        schema = self._file.attrs.get("schema")
        if schema != SCHEMA:
            found = f"has schema {schema!r}" if schema else "is HDF5 without a schema attribute"
            raise UsageError(f"{self.path}: not a run file: it {found}, a run file has {SCHEMA!r}")
        self.attributes: dict[str, Any] = {key: _decode(value) for key, value in self._file.attrs.items()}
        self.complete = bool(self.attributes.get("complete", False))
        self.status: Array = self._file["status"][...]
        self.ids = [raw.decode("utf-8", "surrogateescape") for raw in self._file["sample_id"][...]]
        data, outputs = self._file["attribution"], self._file["prediction"].attrs["shape"]
        dims = tuple(dim.label for dim in data.dims)[1:]
        self.layout = Layout(data.shape[1:], tuple(json.loads(outputs)), dims, data.dtype.str[1:])
        self.names = list(self.layout.columns(1, 1))
        for name in self.names:
            if self._file[name].shape[0] != len(self.ids):
                raise ValueError(f"{name} has {self._file[name].shape[0]} rows, sample_id {len(self.ids)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> h5py.Dataset:
        return self._file[name]

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """Rows of one dataset in memory; text as `str`, and NaN in every real number of a row that is not ok."""
        values: Array = self._file[name][rows]
        if values.dtype.kind == "S":
            texts = [raw.decode("utf-8", "surrogateescape") for raw in values]
            return np.array(texts, dtype=f"<U{max(map(len, texts), default=0) or 1}")
        if values.dtype.kind == "f":
            values[self.status[rows] != Status.OK] = np.nan
        return values

    @property
    def messages(self) -> list[str]:
        """Why a row is not ok; '' where there is nothing to say."""
        return [str(text) for text in self.read("message")]

    def blocks(self) -> list[slice]:
        """The rows in order, cut so that one block of `attribution` takes about 16 MB."""
        return _blocks(len(self), math.prod(self.layout.attribution) * np.dtype(self.layout.dtype).itemsize)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _blocks(count: int, row_bytes: int) -> list[slice]:
    step = max(1, _BLOCK_BYTES // row_bytes)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


# Writing ------------------------------------------------------------------------------------------------------------


def _lock(path: Path) -> int:
    """Take `path` for this process until `_unlock` or its end. Raises: UsageError when another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            target = path.name.removesuffix(".lock")
            raise UsageError(f"another attrcli is writing {target}; wait for it, or choose another --out") from error
        except OSError:
            return descriptor  # a file system without locks
        # The former holder may have deleted the file between our open and our lock.
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)


def _unlock(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _no_space(path: Path, why: str, needed: int) -> UsageError:
    free = shutil.disk_usage(path.parent).free
    return UsageError(
        f"{path}: {why}: {_size(needed)} needed, {_size(free)} free; rows already written are kept; "
        "free some space and run the same command again, or choose another --out"
    )


@contextlib.contextmanager
def _disk_errors(path: Path, needed: int) -> Iterator[None]:
    """What the operating system refuses becomes one line for the user."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises either, with the number in the text only
        in_text = re.search(r"errno = (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(in_text[1]) if in_text else 0)
        if number in _NO_SPACE:
            raise _no_space(path, os.strerror(number).lower(), needed) from error
        if not number:
            raise
        raise UsageError(f"cannot write {path}: {os.strerror(number).lower()}; choose another --out") from error


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[Path]:
    """Yield `temporary` to be written; then sync it and rename it to `path`. After an error nothing is left of it."""
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class _Preallocated:
    """The datasets of a laid-out file, written by offset while the HDF5 library has it closed."""

    def __init__(self, path: Path, columns: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self._columns = columns
        with h5py.File(path, "r", locking=False) as file:
            self._offsets = {name: file[name].id.get_offset() for name in columns}
            for name, (shape, dtype) in columns.items():
                if file[name].shape != shape or file[name].dtype != dtype or self._offsets[name] is None:
                    raise UsageError(f"{path}: /{name} is not laid out as this run needs it; --force starts over")
        self._file = os.open(path, os.O_RDWR)

    def put(self, name: str, start: int, values: Array) -> None:
        shape, dtype = self._columns[name]
        data = memoryview(np.ascontiguousarray(values, dtype)).cast("B")
        position = self._offsets[name] + start * dtype.itemsize * math.prod(shape[1:])
        while data:
            written = os.pwrite(self._file, data, position)
            data, position = data[written:], position + written

    def close(self) -> None:
        os.close(self._file)
