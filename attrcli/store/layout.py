"""What a run file holds: row status, datasets, attributes and which of them identify the run."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

SCHEMA = "attrcli/1"
UNLABELLED = 65535
MESSAGE_BYTES = 200

VERSION_KEYS = ("versions", "device", "threads", "batch_size")
"""Attributes that move results within rounding: they may differ on resuming; `history` then lists the earlier ones."""
VOLATILE = frozenset({"schema", "complete", "history", "forced", "argv", "inputs_root", "model", "model_path"})
"""Attributes that do not touch the numbers: the resuming process sets them anew. All others identify the run."""

EXTRAS = ("hypothetical", "standard_error")
"""Datasets shaped like `attribution` that only some methods and kinds of input have."""

Array = npt.NDArray[Any]
Columns = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape, rows first, and type of every dataset by its name."""


class Status(IntEnum):
    """What became of a row."""

    TODO = 0
    OK = 1
    ERROR = 2
    SKIPPED = 3


@dataclass(frozen=True)
class Layout:
    """Shapes of one row: `attribution` (C, H, W), (F,), (4, L) or any; `outputs` of any rank, stored flat (K,).

    `extras` are the datasets of `EXTRAS` that there are.
    """

    attribution: tuple[int, ...]
    outputs: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str = "f4"
    extras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {*self.columns(1, 1), "sample", "output", *self.dims}
        if len(self.dims) != len(self.attribution) or len(names) != 14 + len((*self.dims, *self.extras)):
            raise ValueError(f"dims {self.dims} must be one new name for each axis of {self.attribution}")
        if 0 in (*self.attribution, *self.outputs) or self.dtype not in ("f4", "f8"):
            raise ValueError(f"{self}: an empty row cannot be stored, and numbers are f4 or f8")

    def columns(self, count: int, id_bytes: int) -> Columns:
        """The datasets of a file with `count` rows whose longest id takes `id_bytes`."""
        real = np.dtype(self.dtype)
        rows: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "attribution": (self.attribution, real),
            "prediction": ((math.prod(self.outputs),), real),
            "label": ((), np.dtype("u2")),
            "target": ((), np.dtype("i4")),
            "score": ((), real),
            "baseline_score": ((), real),
            "completeness_delta": ((), real),
            "remainder": ((), real),
            "sample_id": ((), h5py.string_dtype("utf-8", id_bytes)),
            "sample_sha256": ((), h5py.string_dtype("ascii", 64)),
            "status": ((), np.dtype("u1")),
            "message": ((), h5py.string_dtype("utf-8", MESSAGE_BYTES)),
        }
        rows |= dict.fromkeys(self.extras, (self.attribution, real))
        return {name: ((count, *shape), dtype) for name, (shape, dtype) in rows.items()}

    def axes(self, name: str) -> tuple[str, ...]:
        """Dimension names of dataset `name`."""
        axes = {"attribution": self.dims, "prediction": ("output",)} | dict.fromkeys(self.extras, self.dims)
        return ("sample", *axes.get(name, ()))


def part_of(path: Path) -> Path:
    """Where the run file `path` is written until it is finished."""
    return Path(f"{path}.part")


def absent(name: str, dtype: np.dtype[Any]) -> Any:
    """What stands for 'no value' in dataset `name`."""
    return {"label": UNLABELLED, "target": -1}.get(name, {"f": np.nan, "S": b""}.get(dtype.kind, 0))


def blocks(shape: tuple[int, ...], dtype: np.dtype[Any], limit: int = 1 << 24) -> list[slice]:
    """All rows in order, in pieces of at most `limit` bytes, at least one row each."""
    step = max(1, limit // (math.prod(shape[1:]) * dtype.itemsize))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def chunks(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """One row; several together where that would be less than 1 KB."""
    row = math.prod(shape[1:]) * dtype.itemsize
    return (1 if row >= 1024 else min(shape[0], 16384 // row), *shape[1:])


def config_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that say what is computed: rows whose `config_of` differs never share a file."""
    return {key: value for key, value in plain(attributes).items() if key not in VOLATILE and key not in VERSION_KEYS}


def plain(value: Any) -> Any:
    """`value` as JSON returns it: numpy scalars and arrays, tuples and paths become plain Python."""

    def default(item: Any) -> Any:
        return item.tolist() if isinstance(item, np.generic | np.ndarray) else os.fspath(item)

    return json.loads(json.dumps(value, default=default))


def encode(value: Any) -> Any:
    """An HDF5 attribute: numbers and plain text as they are, everything else as JSON text."""
    if isinstance(value, float | bool) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, str) and value.isprintable() and not _looks_like_json(value):
        return value
    return json.dumps(value)


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, str):
        return json.loads(value) if _looks_like_json(value) else value
    return value.item() if isinstance(value, np.generic) else value


def _looks_like_json(text: str) -> bool:
    return re.fullmatch(r'[\[{"].*|null|-?[0-9]+', text, re.DOTALL) is not None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase for each key, nested ones dotted, whose value differs."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key} is {_short(before.get(key))}, asked for {_short(after.get(key))}" for key in keys]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {name: json.dumps(value, ensure_ascii=False, sort_keys=True)}
    parts = (_flat(item, f"{name}.{key}" if name else key) for key, item in value.items())
    return {key: text for part in parts for key, text in part.items()}


def _short(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"
