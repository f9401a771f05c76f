"""Inputs: files, directories, globs and lists to records with ids, and one record to numbers.

What holds for every input:

- An id is the path relative to the folder that all arguments share, with ``/``; a record inside a file adds ``#key``,
  ``#row``, ``#key[row]`` or the value of a table's ``id`` column. Bytes that are not UTF-8 show as ``\\udcXX``.
- Records are sorted by path, then by their place in the file, whatever the order of the arguments.
- Listing never fails for one bad file: it becomes a record, and ``read`` says what is wrong with it.
"""

import csv
import glob
import hashlib
import io
import os
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from attrcli.errors import AttrcliWarning, InputError, NoInputsError, UsageError

UNKNOWN_LABEL = 65535
SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    "array": (".npy", ".npz", ".h5", ".hdf5"),
    "table": (".csv", ".npy", ".npz", ".h5", ".hdf5"),
}

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
_MAGIC = {b"\x93NUM": "npy", b"PK\x03\x04": "npz", b"\x89HDF": "h5"}
_UPRIGHT = {  # value of the EXIF orientation tag -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow warns of is of no use here (metadata) or is an error at twice the size (too many pixels). Process-wide,
# since a filter around each decoding would not be safe in a reader thread.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Record:
    """One input: ``key`` and ``row`` say where it lies in a file of several; ``label`` is its class name, or ''.

    The label is a table's ``label`` cell, else the folder that holds the file when that lies below the root.
    """

    id: str
    path: Path
    label: str = ""
    key: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Collection:
    """All records of a run, and the absolute folder that their ids are relative to."""

    records: tuple[Record, ...]
    root: Path


@dataclass(frozen=True)
class Raw:
    """The numbers of one record; ``size`` is an image's (width, height) after EXIF rotation, else None.

    The hash covers an image file's bytes, a table row's line and the header, or an array's dtype, shape and bytes.
    """

    values: npt.NDArray[Any]
    sha256: str
    size: tuple[int, int] | None


class _Found(NamedTuple):
    path: str
    base: str
    argument: str


class _Table(NamedTuple):
    header: tuple[str, ...]
    header_bytes: bytes
    spans: list[tuple[int, int]]
    ids: list[str] | None
    labels: list[str] | None


def collect(
    inputs: Sequence[str],
    kind: str,
    *,
    stdin: TextIO | None = None,
    columns: Sequence[str] | None = None,
    sample_rank: int | None = None,
) -> Collection:
    """List the records of files, directories, globs, ``@list.txt`` and ``-`` (names on stdin), without reading them.

    A directory gives the files below it whose suffix fits the kind, hidden ones left out; an explicit name is always
    tried. Each argument must match something; a name in a list that does not exist is a record that fails on ``read``.
    ``sample_rank`` is the rank of one sample of kind array: a file with one axis more holds several. ``columns`` are
    checked against each table. Names in a list are relative to the working directory, never globs, and separated by
    newlines, or by NUL if there is one.

    Raises: NoInputsError if an argument matches nothing; UsageError for a table without the columns and for two
    records with one id.
    """
    found: list[_Found] = []
    for argument in inputs:
        matches = list(_expand(argument, kind, stdin))
        if not matches:
            raise NoInputsError(_nothing(argument, kind))
        found += matches
    if not found:
        raise NoInputsError("no input was given; name files, directories, globs, @list.txt or - for names on stdin")
    root = os.path.commonpath([match.base for match in found])
    rank = {"table": 1}.get(kind, sample_rank)
    records: dict[str, tuple[Record, str]] = {}
    for match in found:
        for record in _records(match.path, root, kind, columns, rank):
            if record.id in records:
                _refuse_twins(record, match.argument, *records[record.id])
            records[record.id] = (record, match.argument)
    if not records:
        raise NoInputsError(f"no input: {found[0].path!r} holds no records")
    ordered = sorted((record for record, _ in records.values()), key=_place)
    return Collection(tuple(ordered), Path(root))


def guess_kind(inputs: Sequence[str]) -> str:
    """The kind of inputs whose model has no sidecar: 'array' or 'table' where the suffixes say so, else 'image'."""
    for argument in inputs:
        names = [argument]
        if os.path.isdir(argument):
            names = [name for _, _, files in os.walk(argument) for name in sorted(files)]
        suffixes = {os.path.splitext(name)[1].lower() for name in names}
        if suffixes & set(SUFFIXES["image"]):
            return "image"
        for kind, of_kind in (("table", (".csv",)), ("array", SUFFIXES["array"])):
            if suffixes & set(of_kind):
                return kind
    return "image"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a folder. Raises UsageError if unreadable."""
    hashed = hashlib.sha256()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    try:
        for file in files:
            if path.is_dir():
                hashed.update(os.fsencode(file.relative_to(path)) + b"\0")
            with file.open("rb") as opened:
                hashed.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    return hashed.hexdigest()


def _place(record: Record) -> tuple[str, str, int]:
    return os.fspath(record.path), record.key or "", -1 if record.row is None else record.row


def _refuse_twins(record: Record, argument: str, other: Record, other_argument: str) -> None:
    if record.path != other.path:
        what = f"{str(other.path)!r} and {str(record.path)!r}"
    elif argument != other_argument:
        what = f"{str(record.path)!r} is given twice, by {other_argument!r} and by {argument!r}"
    else:
        what = f"both in {str(record.path)!r}, or the file is listed twice"
    raise UsageError(f"two inputs have the id {record.id!r}: {what}; ids must be unique, leave one out")


def _expand(argument: str, kind: str, stdin: TextIO | None) -> Iterator[_Found]:
    names: Iterable[str]
    if argument == "-":
        stream = stdin or sys.stdin
        names = _names(stream.buffer.read() if hasattr(stream, "buffer") else os.fsencode(stream.read()))
    elif argument.startswith("@"):
        try:
            names = _names(Path(argument[1:]).read_bytes())
        except OSError as error:
            raise UsageError(f"the list {argument[1:]!r} cannot be read: {error.strerror}") from error
    elif os.path.lexists(argument):
        names = [argument]
    elif glob.has_magic(argument):
        yield from _globbed(argument, kind)
        return
    else:
        raise NoInputsError(f"no such file or directory: {argument!r}")
    for name in names:
        path = os.path.abspath(name)
        if os.path.isdir(path):
            yield from (_Found(file, path, argument) for file in _walk(path, kind))
        else:
            yield _Found(path, os.path.dirname(path), argument)


def _names(data: bytes) -> list[str]:
    lines = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line.strip()]


def _globbed(pattern: str, kind: str) -> Iterator[_Found]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = os.path.abspath(os.path.join(".", *parts[:fixed]))
    files: set[str] = set()
    for match in map(os.path.abspath, glob.glob(pattern, recursive=True)):
        files.update(_walk(match, kind) if os.path.isdir(match) else [match])
    yield from (_Found(file, base, pattern) for file in sorted(files))


def _walk(folder: str, kind: str) -> Iterator[str]:
    """Files below ``folder`` whose suffix fits; follows links, except into a folder that holds the link."""

    def unreadable(error: OSError) -> None:
        raise UsageError(f"the directory {error.filename!r} cannot be read: {error.strerror}")

    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(here) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not real.startswith(os.path.realpath(os.path.join(here, name)) + os.sep)
        ]
        for name in files:
            if name.lower().endswith(SUFFIXES[kind]) and not name.startswith("."):
                yield os.path.join(here, name)


def _nothing(argument: str, kind: str) -> str:
    wanted = f"looked for {kind} files ({' '.join(SUFFIXES[kind])})"
    if not os.path.isdir(argument):
        return f"no input matched {argument!r}; {wanted}"
    others = sorted(name for _, _, files in os.walk(argument) for name in files)
    holds = f"it holds {len(others)} other files, such as {others[0]!r}" if others else "it holds no files at all"
    return f"no input in the directory {argument!r}: {wanted}; {holds}"


def _records(path: str, root: str, kind: str, columns: Sequence[str] | None, rank: int | None) -> Iterator[Record]:
    """The records of one file, in file order; a file that cannot be listed is one record."""
    name = os.path.relpath(path, root).replace(os.sep, "/").encode("utf-8", "backslashreplace").decode()
    folder = PurePosixPath(name).parent.name
    container = _container(path, kind)
    members: list[tuple[str | None, tuple[int, ...]]] = []
    try:
        if container == "csv":
            yield from _table_records(path, name, columns)
            return
        if container != "image":
            members = _members(path, container)
    except UsageError:
        raise
    except Exception:  # read() meets it again, and reports it for this input alone
        pass
    if not members:
        yield Record(name, Path(path), folder)
    for key, shape in members:
        stem = f"{name}#{key}" if key else name
        if not _several(shape, kind, rank):
            yield Record(stem, Path(path), folder, key)
            continue
        for row in range(shape[0]):
            yield Record(f"{stem}[{row}]" if key else f"{stem}#{row}", Path(path), folder, key, row)


def _table_records(path: str, name: str, columns: Sequence[str] | None) -> Iterator[Record]:
    table = _table(path, columns)
    folder = PurePosixPath(name).parent.name
    for row in range(len(table.spans)):
        key = table.ids[row] if table.ids else None
        label = table.labels[row] if table.labels else folder
        yield Record(f"{name}#{row if key is None else key}", Path(path), label, key, row)


def _several(shape: tuple[int, ...], kind: str, rank: int | None) -> bool:
    """Whether the first axis counts samples; for pixels only (n, H, W, 1 or 3) leaves no doubt."""
    if kind == "image":
        return len(shape) == 4 and shape[-1] in (1, 3)
    return rank is not None and len(shape) == rank + 1


def _container(path: str, kind: str) -> str:
    """What kind of file this is, by content except for image suffixes and tables, which Pillow and csv judge."""
    suffix = os.path.splitext(path)[1].lower()
    if kind == "image" and suffix in SUFFIXES["image"]:
        return "image"
    known = None
    if os.path.isfile(path) and os.access(path, os.R_OK):
        with open(path, "rb") as file:
            known = _MAGIC.get(file.read(4))
    by_suffix = {".npy": "npy", ".npz": "npz", ".h5": "h5", ".hdf5": "h5"}
    return known or by_suffix.get(suffix, "csv" if kind == "table" else "image")


def _members(path: str, container: str) -> list[tuple[str | None, tuple[int, ...]]]:
    """Key and shape of each array in a file, read from the headers alone."""
    if container == "npy":
        return [(None, np.lib.format.open_memmap(path, mode="r").shape)]
    if container == "npz":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = [(name.removesuffix(".npy"), _npy_shape(archive, name)) for name in names]
    else:
        with h5py.File(path, "r") as file:
            found = [(key, _dataset(file, key).shape) for key in file if not _is_group(file, key)]
    if not found:
        raise ValueError("holds no array at its root")
    return list(found)


def _npy_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return header(member)[0]


def _is_group(file: h5py.File, key: str) -> bool:
    return isinstance(file.get(key, getlink=True), h5py.HardLink) and file.get(key, getclass=True) is h5py.Group


def _dataset(file: h5py.File, key: str) -> h5py.Dataset:
    """A dataset whose data lies in this file: an untrusted file must not point at others."""
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise ValueError(f"{key!r} is a link; copy the data into this file")
    dataset = file[key]
    if dataset.shape is None or dataset.external or dataset.is_virtual:
        raise ValueError(f"dataset {key!r} holds no data in this file; copy the data into it")
    return dataset


@lru_cache(maxsize=2)
def _scanned_table(path: str, stamp: tuple[int, int]) -> _Table:
    """Where each row of a CSV file starts and ends, and its id and label cells; the numbers stay on disk."""
    spans: list[tuple[int, int]] = []
    cells: list[list[str]] = []
    place = 0
    with open(path, "rb") as file:

        def lines() -> Iterator[str]:
            nonlocal place
            for line in file:
                place += len(line)
                yield line.decode("utf-8", "surrogateescape").removeprefix("\ufeff" if place == len(line) else "")

        reader = csv.reader(lines())
        try:
            header = tuple(name.strip() for name in next(reader, []))
            start = place
            wanted = [header.index(name) if name in header else None for name in ("id", "label")]
            for row in reader:
                if row:
                    spans.append((start, place))
                    cells.append([row[at].strip() if at is not None and at < len(row) else "" for at in wanted])
                start = place
        except csv.Error as error:
            raise UsageError(f"{path!r}: line {reader.line_num} is not CSV: {error}") from error
        file.seek(0)
        header_bytes = file.read(spans[0][0] if spans else -1)
    ids, labels = ([cell[i] for cell in cells] if wanted[i] is not None else None for i in (0, 1))
    return _Table(header, header_bytes, spans, ids, labels)


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _table(path: str, columns: Sequence[str] | None) -> _Table:
    """The scanned table, its header checked; an ``id`` or ``label`` column that is a feature is only that."""
    table = _scanned_table(path, _stamp(path))
    if not table.header:
        raise UsageError(f"{path!r}: no header row; the first line must name the columns")
    for name in _features(table, columns):
        if (count := table.header.count(name)) != 1:
            problem = "has no column" if count == 0 else f"has {count} columns"
            raise UsageError(f"{path!r}: {problem} {name!r}; its columns: {', '.join(table.header)}")
    used = columns or ()
    return table._replace(ids=None if "id" in used else table.ids, labels=None if "label" in used else table.labels)


def _features(table: _Table, columns: Sequence[str] | None) -> list[str]:
    return list(columns) if columns else [name for name in table.header if name not in ("id", "label")]


def read(record: Record, kind: str, *, channels: str = "RGB", columns: Sequence[str] | None = None) -> Raw:
    """The numbers of one record: an image (H, W, C) in 0..255, an array as stored, a table row (F,) as float64.

    Image values are uint8, or float32 from a 16-bit grey file. An array file given as an image holds uint8 pixels,
    (H, W) or (H, W, 1 or 3 as RGB).

    Raises: InputError, whatever is wrong with the file.
    """
    path = os.fspath(record.path)
    try:
        if not os.path.isfile(path):
            raise ValueError("no such file" if not os.path.lexists(path) else "not a regular file")
        container = _container(path, kind)
        if container == "image" and kind == "image":
            data = record.path.read_bytes()
            values = decode_image(data, channels)
            return Raw(values, hashlib.sha256(data).hexdigest(), (values.shape[1], values.shape[0]))
        if container == "csv":
            return _table_row(path, record, columns)
        if container == "image":
            raise ValueError(f"is not an array file; accepted: {' '.join(SUFFIXES[kind])}")
        return _array(path, container, record, kind, channels)
    except Exception as error:
        raise InputError(f"{record.id!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that can be read; accepted: {', '.join(_FORMATS)}"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return str(error)  # with its size and the limit
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError | OSError | InputError | UsageError):
        return str(error)
    return f"damaged or not readable ({type(error).__name__}: {error})"


def _table_row(path: str, record: Record, columns: Sequence[str] | None) -> Raw:
    table = _table(path, columns)
    if record.row is None or record.row >= len(table.spans):
        raise ValueError("the row is gone; the file changed during the run")
    start, end = table.spans[record.row]
    with open(path, "rb") as file:
        file.seek(start)
        line = file.read(end - start)
    cells = next(row for row in csv.reader(io.StringIO(line.decode("utf-8", "surrogateescape"))) if row)
    if len(cells) != len(table.header):
        raise ValueError(f"the row has {len(cells)} cells, the header {len(table.header)}")
    values = np.empty(len(names := _features(table, columns)))
    for i, name in enumerate(names):
        cell = cells[table.header.index(name)]
        try:
            values[i] = float(cell)
        except ValueError as error:
            raise ValueError(f"column {name!r} holds {cell!r}, which is not a number") from error
    return Raw(_finite(values), hashlib.sha256(table.header_bytes + line).hexdigest(), None)


def _array(path: str, container: str, record: Record, kind: str, channels: str) -> Raw:
    if container == "npy":
        stored: Any = np.lib.format.open_memmap(path, mode="r")
        values = np.array(stored if record.row is None else stored[record.row])
    elif record.key is None:
        _members(path, container)
        raise ValueError("the file changed during the run")
    elif container == "npz":
        stored = _npz_member(path, _stamp(path), record.key)
        values = np.array(stored if record.row is None else stored[record.row])
    else:
        values = _h5_values(path, record.key, record.row)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"holds {values.dtype}; accepted: real numbers")
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")).reshape(values.shape)
    hashed = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode())
    hashed.update(values.data)
    digest = hashed.hexdigest()
    if kind != "image":
        return Raw(_finite(values), digest, None)
    pixels = _pixels(values, channels)
    return Raw(pixels, digest, (pixels.shape[1], pixels.shape[0]))


@lru_cache(maxsize=1)
def _npz_member(path: str, stamp: tuple[int, int], key: str) -> npt.NDArray[Any]:
    """One array of an archive, which cannot be read by rows; kept for the rows that follow."""
    with np.load(path, allow_pickle=False) as archive:
        values: npt.NDArray[Any] = archive[key]
        return values


def _h5_values(path: str, key: str, row: int | None) -> npt.NDArray[Any]:
    """A dataset or one row of it, read with the rows that share its chunks."""
    with h5py.File(path, "r") as file:
        dataset = _dataset(file, key)
        rows = dataset.chunks[0] if dataset.chunks else 1
        if row is None or rows == 1 or rows * dataset.nbytes > len(dataset) * 2**26:  # 64 MiB of rows
            return np.asarray(dataset[() if row is None else row])
    first = row - row % rows
    return np.array(_h5_block(path, _stamp(path), key, first, first + rows)[row - first])


@lru_cache(maxsize=1)
def _h5_block(path: str, stamp: tuple[int, int], key: str, first: int, last: int) -> npt.NDArray[Any]:
    with h5py.File(path, "r") as file:
        return np.asarray(_dataset(file, key)[first:last])


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"holds {np.count_nonzero(~np.isfinite(values))} values that are NaN or infinite")
    return values


def _pixels(values: npt.NDArray[Any], channels: str) -> npt.NDArray[Any]:
    shape = values.shape
    if values.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))) or 0 in shape:
        raise ValueError(
            f"holds {values.dtype} of shape {shape}; accepted as pixels: uint8 of shape (H, W), (H, W, 1 or 3), or "
            "several as (N, H, W, 1 or 3); for the model's own input values set kind = 'array' in the sidecar"
        )
    return to_channels(Image.fromarray(values[..., 0] if shape[2:] == (1,) else values), channels)


def decode_image(source: bytes | Path, channels: str) -> npt.NDArray[Any]:
    """Decode the first frame of a PNG, JPEG, BMP, GIF, TIFF or WebP to (H, W, C) in 0..255, upright as EXIF says.

    Raises: whatever Pillow raises for a damaged file; ``read`` turns it into an InputError.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.load()
        try:
            turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
        except Exception:  # damaged EXIF data says nothing about the orientation
            turn = None
        return to_channels(image if turn is None else image.transpose(turn), channels)


def to_channels(image: Image.Image, channels: str) -> npt.NDArray[Any]:
    """Pixels of any Pillow mode as (H, W, C) in 0..255, C = 3 for RGB and BGR, 1 for L.

    16-bit grey is divided by 257 into float32, not cut to 8 bits; a palette gives its colours; alpha is dropped without
    blending, as training pipelines do; CMYK is converted without an ICC profile; L is the luma of ITU-R 601.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"holds pixels of mode {image.mode}, whose range is not known; save 8 or 16 unsigned bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / np.float32(257)
        if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose white is 0, which Pillow leaves so in 16 bits
            grey = 255 - grey
        return np.repeat(grey[:, :, None], 1 if channels == "L" else 3, axis=2)
    image.info.pop("transparency", None)  # else Pillow warns, or blends it into the conversion
    if image.mode in ("La", "RGBa", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if channels == "L":
        return np.asarray(image.convert("L"))[:, :, None]
    colours = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(colours[:, :, ::-1]) if channels == "BGR" else colours


def class_labels(collection: Collection, labels: Sequence[str] | None) -> npt.NDArray[np.uint16]:
    """The index of each record's label, (N,); UNKNOWN_LABEL where it has none or it matches no name.

    A label is a name, exactly or apart from case and punctuation ('T-shirt_top' is 'T-shirt/top'), or the index.
    """
    match = _matcher(labels)
    return np.array([match(record.label) for record in collection.records], dtype=np.uint16)


def labels_csv(path: Path, collection: Collection, labels: Sequence[str] | None) -> npt.NDArray[np.uint16]:
    """The label of each record, (N,), from a CSV file with the columns ``id`` and ``label`` (a name or an index).

    An id is a record's id or its file name if that is unique; records that are not listed get UNKNOWN_LABEL.

    Raises: UsageError for a file without these columns, labels that match nothing, and a list that names no record.
    """
    table = _table(os.fspath(path), ()) if path.is_file() else None
    if table is None or table.ids is None or table.labels is None:
        raise UsageError(f"{str(path)!r}: accepted for labels: a CSV file with the columns 'id' and 'label'")
    match = _matcher(labels)
    wrong = sorted({label for label in table.labels if match(label) == UNKNOWN_LABEL})
    if wrong:
        accepted = f"the names {', '.join(labels[:10])}{', ...' if labels[10:] else ''}, or" if labels else ""
        raise UsageError(f"{str(path)!r}: labels {wrong[:10]} match nothing; accepted: {accepted} an index")
    given = dict(zip(table.ids, (match(label) for label in table.labels), strict=True))
    names = [PurePosixPath(record.id).name for record in collection.records]
    keys = [record.id if record.id in given else name for record, name in zip(collection.records, names, strict=True)]
    shared = sorted(key for key, count in Counter(keys).items() if key in given and count > 1)
    if shared:
        raise UsageError(
            f"{str(path)!r}: {shared[0]!r} is the name of several inputs; write the ids with their folders"
        )
    if not any(key in given for key in keys):
        raise UsageError(
            f"{str(path)!r}: no id is that of an input; an input's id is like {collection.records[0].id!r}"
        )
    return np.array([given.get(key, UNKNOWN_LABEL) for key in keys], dtype=np.uint16)


def _matcher(labels: Sequence[str] | None) -> Callable[[str], int]:
    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", " ", name).strip().casefold()

    def indices(key: Callable[[str], str]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, name in enumerate(labels or ()):
            found.setdefault(key(name), []).append(i)
        return found

    exact, loose = indices(str), indices(plain)

    @cache
    def match(label: str) -> int:
        found = exact.get(label) or (loose.get(plain(label)) if plain(label) else None) or []
        if len(found) > 1:
            warnings.warn(f"the label {label!r} fits the outputs {found}; use an index", AttrcliWarning, stacklevel=2)
        if found:
            return found[0] if len(found) == 1 else UNKNOWN_LABEL
        index = int(label) if re.fullmatch(r"0|[1-9][0-9]{0,4}", label) else UNKNOWN_LABEL
        return index if index < (UNKNOWN_LABEL if labels is None else len(labels)) else UNKNOWN_LABEL

    return match


def escape(id: str) -> str:
    """A file name for an id, one to one: ``/`` as ``+``, ``#`` as ``=``, other unsafe bytes as ``%XX``.

    A name over 200 bytes is cut and ends in ``~`` and 64 bits of the id's SHA-256.
    """
    data = id.encode("utf-8", "surrogatepass")
    safe = {ord(c): c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"}
    table = safe | {ord("/"): "+", ord("#"): "="}
    name = "".join(table.get(byte, f"%{byte:02X}") for byte in data)
    if name.startswith((".", "-")):  # not hidden, not an option
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > 200:
        name = f"{name[:180]}~{hashlib.sha256(data).hexdigest()[:16]}"
    return name or "%"
