"""One record to numbers, with a hash of what was read; whatever is wrong with it is one InputError."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from attrcli.data import fasta
from attrcli.data.containers import SUFFIXES, container_of, values_of
from attrcli.data.images import FORMATS, decode_and_note, pixels
from attrcli.data.records import Record
from attrcli.data.tables import row_values
from attrcli.errors import InputError, UsageError


@dataclass(frozen=True)
class Raw:
    """The numbers of one record, or its letters; ``size`` is an image's (width, height) after EXIF rotation, else None.

    ``notes`` say what of an image the numbers leave out or hold otherwise.
    The hash covers an image file's bytes, a table row's line and the header, a record's letters, or an array's dtype,
    shape and bytes.
    """

    values: npt.NDArray[Any]
    sha256: str
    size: tuple[int, int] | None
    notes: tuple[str, ...] = ()


def read(record: Record, kind: str, *, channels: str = "RGB", columns: Sequence[str] | None = None) -> Raw:
    """One record: an image (H, W, C) in 0..255, an array as stored, a table row (F,) as float64, letters (L,) as S1.

    Image values are uint8, or float32 from a 16-bit grey file. An array file given as an image holds uint8 pixels,
    (H, W) or (H, W, 1 or 3 as RGB).

    Raises: InputError, whatever is wrong with the file.
    """
    path = os.fspath(record.path)
    try:
        if not os.path.isfile(path):
            raise ValueError("no such file" if not os.path.lexists(path) else "not a regular file")
        container = container_of(path, kind)
        if container == "image" and kind == "image":
            data = record.path.read_bytes()
            values, notes = decode_and_note(data, channels)
            return Raw(values, hashlib.sha256(data).hexdigest(), (values.shape[1], values.shape[0]), notes)
        if container == "csv":
            values, digest = row_values(path, record.row, columns)
            return Raw(_finite(values), digest, None)
        if container == "fasta":
            letters = fasta.letters_of(path, record.row)
            return Raw(letters, hashlib.sha256(letters.tobytes()).hexdigest(), None)
        if container == "image":
            raise ValueError(f"is not an array file; accepted: {' '.join(SUFFIXES[kind])}")
        return _array(path, container, record, kind, channels)
    except Exception as error:
        raise InputError(f"{record.id!r}: {_reason(error)}") from error


def letter_count(record: Record) -> int:
    """How many letters a FASTA record has; 0 for anything else, and for what cannot be read."""
    path = os.fspath(record.path)
    if not os.path.isfile(path) or container_of(path, "sequence") != "fasta":
        return 0
    return fasta.count(path, record.row)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that can be read; accepted: {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return str(error)  # with its size and the limit
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError | OSError | InputError | UsageError):
        return str(error)
    return f"damaged or not readable ({type(error).__name__}: {error})"


def _array(path: str, container: str, record: Record, kind: str, channels: str) -> Raw:
    values = values_of(path, container, record.key, record.row)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"holds {values.dtype}; accepted: real numbers")
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")).reshape(values.shape)
    hashed = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode())
    hashed.update(values.data)
    digest = hashed.hexdigest()
    if kind != "image":
        return Raw(_finite(values), digest, None)
    shown, notes = pixels(values, channels)
    return Raw(shown, digest, (shown.shape[1], shown.shape[0]), notes)


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"holds {np.count_nonzero(~np.isfinite(values))} values that are NaN or infinite")
    return values


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a folder. Raises UsageError if unreadable."""
    try:
        if not path.is_dir():
            return _digest(path).hex()
        hashed = hashlib.sha256()
        for file in sorted(each for each in path.rglob("*") if each.is_file()):
            hashed.update(os.fsencode(file.relative_to(path)) + b"\0" + _digest(file))
        return hashed.hexdigest()
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
