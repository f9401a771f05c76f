"""Reading a run file."""

import json
import os
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .layout import EXTRAS, SCHEMA, Array, Layout, Status, blocks, decode, part_of


def is_run_file(path: Path) -> bool:
    """Whether a file is a run file, even a damaged one, told by content; other HDF5 files (Keras) are not.

    So is the name of one of which only the `.part` is there: opening it tells.
    """
    path = path if path.exists() else part_of(path)
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            if file.read(8) != b"\x89HDF\r\n\x1a\n":
                return False
    except OSError:  # whoever reads it next says why
        return False
    try:
        with h5py.File(path, "r", locking=False) as opened:
            return str(opened.attrs.get("schema", "")).startswith("attrcli/")
    except (OSError, RuntimeError):  # h5py raises either
        return True


class RunFile:
    """A run file, finished or `.part`, open for reading; datasets are read on use. Close it, or use `with`.

    Raises: UsageError for a file that is missing, damaged or not a run file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            part, hint = part_of(self.path), "a run file is what `attrcli explain --out` writes"
            if part.is_file():
                hint = f"its run is not finished: see {part} for what there is, or run the same explain command again"
            raise UsageError(f"{self.path}: no such file; {hint}")
        try:
            self._file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            kind = "is damaged or cut short" if h5py.is_hdf5(self.path) else "cannot be read as HDF5"
            raise UsageError(f"{self.path}: {kind} ({error})") from error
        try:
            self._read_small()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | KeyError | ValueError | RuntimeError | AttributeError | TypeError):
                raise UsageError(f"{self.path}: the run file is damaged ({error})") from error
            raise

    def _read_small(self) -> None:
        schema = self._file.attrs.get("schema")
        if schema != SCHEMA:
            raise UsageError(f"{self.path}: not a run file: its attribute 'schema' is {schema!r}, not {SCHEMA!r}")
        self.attributes: dict[str, Any] = {key: decode(value) for key, value in self._file.attrs.items()}
        self.complete = bool(self.attributes["complete"])
        self.status: Array = self._file["status"][...]
        self.ids = [raw.decode("utf-8", "surrogateescape") for raw in self._file["sample_id"][...]]
        data, outputs = self._file["attribution"], json.loads(self._file["prediction"].attrs["shape"])
        dims = tuple(dim.label for dim in data.dims)[1:]
        extras = tuple(name for name in EXTRAS if name in self._file)
        self.layout = Layout(data.shape[1:], tuple(outputs), dims, data.dtype.str[1:], extras)
        for name, (shape, dtype) in self.columns.items():
            if self._file[name].shape != shape or self._file[name].dtype != dtype:
                raise ValueError(f"/{name} is {self._file[name].dtype} {self._file[name].shape}, not {dtype} {shape}")

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of every dataset by its name."""
        return dict(self.layout.columns(len(self), self._file["sample_id"].dtype.itemsize))

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> h5py.Dataset:
        """The dataset as stored. In a `.part`, rows still to do hold anything; `read` hides that."""
        return self._file[name]

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """Rows of one dataset in memory; text as `str`, and NaN for every real number of a row that is not ok."""
        values: Array = self._file[name][rows]
        if values.dtype.kind == "S":
            return np.array([raw.decode("utf-8", "surrogateescape") for raw in values], dtype=np.str_)
        if values.dtype.kind == "f":
            values[self.status[rows] != Status.OK] = np.nan
        return values

    @property
    def messages(self) -> list[str]:
        """What was noted about each row, mostly why it is not ok; else ''."""
        return [str(text) for text in self.read("message")]

    def blocks(self) -> list[slice]:
        """All rows in order, cut so that a block of `attribution` takes about 16 MB."""
        return blocks(*self.columns["attribution"])

    def gaps(self) -> npt.NDArray[np.float64]:
        """|completeness gap| / sum of |attribution| of every row, float64 (n,); NaN where there is none.

        An attribution of all zeros has a gap of 0 where the scores do not differ either, and inf where they do.
        """
        found = np.full(len(self), np.nan)
        for rows in self.blocks():
            delta = np.abs(self.read("completeness_delta", rows).astype(np.float64))
            if not np.isfinite(delta).any():
                continue
            values = self.read("attribution", rows)
            total = np.abs(values).reshape(len(values), -1).sum(1, dtype=np.float64)
            found[rows] = np.divide(delta, total, out=np.where(delta == 0, 0.0, np.inf), where=total > 0)
            found[rows][~np.isfinite(delta)] = np.nan
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()
