"""Writing a run file so that a kill at any moment loses at most the batch in flight.

A run in progress is `run.h5.part`. All its datasets are allocated when it is laid out, contiguous, with
strings of fixed length, so a batch is written at their offsets: data bytes change, HDF5 metadata never does.
Arrays go first, the status byte last; a row counts only when its status is `OK`. `finish` packs the rows into
`run.h5`. Every new file is made under another name, synced and renamed. This guards against the end of the
process at any moment; a power loss may damage rows written since the layout.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .disk import LIBVER, Lock, Rows, disk_errors, packed, preallocate, replacing, require_place, reserve, size_of
from .layout import (
    MESSAGE_BYTES,
    SCHEMA,
    VERSION_KEYS,
    Array,
    Layout,
    Status,
    absent,
    blocks,
    config_of,
    differences,
    encode,
    part_of,
    plain,
)
from .reader import RunFile, is_run_file

_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable."


class RunWriter:
    """One run file being written, `open`ed with what `path` and its `.part` already hold for the same configuration.

    `status` (n,) says which rows are still to do, `resumed` counts the good rows found at the start, `added` and
    `removed` are the ids that the earlier file lacked and those that it had besides. Close it, or use `with`.
    """

    def __init__(
        self, path: Path, ids: Sequence[str], layout: Layout, attributes: Mapping[str, Any], lock: Lock
    ) -> None:
        self.path, self.part, self._lock = path, part_of(path), lock
        self.ids, self.layout, self.attributes = list(ids), layout, plain(attributes)
        names = [name.encode("utf-8", "surrogateescape") for name in ids]
        self._columns = layout.columns(len(ids), max(1, *map(len, names)))
        self._names = np.array(names)
        self._bytes = size_of(self._columns)
        self.status = np.full(len(ids), Status.TODO, "u1")
        self._sha256 = np.zeros(len(ids), "S64")
        self.resumed = 0
        self.added: list[str] = []
        self.removed: list[str] = []
        self._kept: list[tuple[Path, Array, Array]] = []  # a file, its rows, our rows
        self._lost: dict[str, Path] = {}  # ids of good rows that have no place here, and the file that has them
        self._history: list[Any] = []
        self._forced = self._in_place = self._untouched = False
        self._rows: Rows | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        ids: Sequence[str],
        layout: Layout,
        attributes: Mapping[str, Any],
        *,
        force: bool = False,
    ) -> "RunWriter":
        """Plan the run file `path` with one row for each of `ids`, writing nothing; `force` disregards earlier files.

        Raises: UsageError when the folder cannot be written, another process writes this file, what is there is not
        a run file, or (without `force`) is damaged, of another configuration, or has good rows of other inputs.
        """
        path = Path(path)
        if not ids or len(set(ids)) < len(ids):
            raise ValueError("a run file needs ids, each of them once")
        require_place(path)
        with disk_errors(path):
            _require_own(path, part_of(path))
            lock = Lock(path)
        try:
            writer = cls(path, ids, layout, attributes, lock)
            writer._forced = force
            if not force:
                writer._plan()
            return writer
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def peek(path: str | os.PathLike[str]) -> dict[str, Any] | None:
        """Attributes of what `open` would resume, so that its `batch_size` can be kept; None if nothing is readable."""
        with contextlib.suppress(UsageError):
            part = part_of(Path(path))
            with RunFile(part if part.exists() else path) as run:
                return run.attributes
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sha256(self, row: int) -> str:
        """Hash of the input that the row was computed from, '' where there is none."""
        return bytes(self._sha256[row]).decode()

    def _plan(self) -> None:
        """Decide which earlier rows are kept, and whether an earlier file can stay as it is."""
        with contextlib.ExitStack() as stack:
            earlier = list(self._earlier(stack))
            if not earlier:
                return
            first, last = earlier[0], earlier[-1]
            old, new = set(first.ids), set(self.ids)
            self.added = [name for name in self.ids if name not in old]
            self.removed = [name for name in first.ids if name not in new]
            self._forced = bool(first.attributes.get("forced"))
            self._lost = {
                name: run.path
                for run in earlier
                for row, name in enumerate(run.ids)
                if name not in new and run.status[row] == Status.OK
            }
            if first.path == self.part and first.ids == self.ids:
                self._in_place = _versions(first.attributes) == _versions(self.attributes)
                earlier = [first]
            elif last.path == self.path and last.ids == self.ids and (last.status == Status.OK).all():
                self._untouched = True
                earlier = [last]
            if not self._untouched:
                self._require_kept()
            for run in earlier:
                self._keep(run)
            self.resumed = int((self.status == Status.OK).sum())

    def _require_kept(self) -> None:
        """Raise UsageError where a new file would lack finished rows."""
        if self._lost:
            name, path = next(iter(self._lost.items()))
            raise UsageError(
                f"{path}: this would drop finished rows ({len(self._lost)}, such as {name!r}), since their inputs are "
                "not given this time; --limit leaves inputs out, too. Give them as well, choose another --out, or "
                "--force to start over without them"
            )

    def _earlier(self, stack: contextlib.ExitStack) -> Iterator[RunFile]:
        """The `.part` and the finished file, those that exist; the `.part` of a forced run hides the finished file."""
        asked = {**config_of(self.attributes), "layout": plain(asdict(self.layout))}
        for path in (self.part, self.path):
            if not path.exists():
                continue
            try:
                run = stack.enter_context(RunFile(path))
            except UsageError as error:
                raise UsageError(f"{error}. --force starts over, another --out leaves the file alone") from error
            found = {**config_of(run.attributes), "layout": plain(asdict(run.layout))}
            if found != asked and (differing := differences(found, asked)):
                raise UsageError(
                    f"{path} was made with another configuration: {'; '.join(differing)}. "
                    "Choose another --out, or --force to start over"
                )
            yield run
            if run.attributes.get("forced"):
                return

    def _keep(self, run: RunFile) -> None:
        """Count in the good rows of `run`, but for those that another file gave already."""
        place = {name: row for row, name in enumerate(run.ids)}
        theirs = np.array([place.get(name, -1) for name in self.ids])
        ours = np.flatnonzero((theirs >= 0) & (run.status[theirs] == Status.OK) & (self.status != Status.OK))
        if not ours.size:
            return
        self._kept.append((run.path, theirs[ours], ours))
        self.status[ours] = Status.OK
        self._sha256[ours] = run["sample_sha256"][...][theirs[ours]]
        for entry in (*run.attributes["history"], _versions(run.attributes)):
            if entry not in (*self._history, _versions(self.attributes)):
                self._history.append(entry)

    def prepare(self) -> None:
        """Lay out the `.part`, or open the one that can go on. The first `write` does it otherwise.

        Raises: UsageError when the disk has no room for the whole run, or finished rows would be lost.
        """
        if self._rows is not None:
            return
        self._require_kept()
        with disk_errors(self.part, self._bytes):
            if not self._in_place:
                with replacing(self.part) as temporary:
                    self._lay_out(temporary)
            self._rows = Rows(self.part, self._columns)
            self._rows.put("status", 0, self.status)  # errors of the earlier process are to do again

    def _lay_out(self, path: Path) -> None:
        with h5py.File(path, "w", libver=LIBVER, locking=False) as file:
            preallocate(file, self._columns)
            self._describe(file, {"complete": False, "forced": self._forced})
        reserve(path)
        rows = Rows(path, self._columns)
        try:
            rows.put("sample_id", 0, self._names)
            for name, (shape, dtype) in self._columns.items():
                if len(shape) == 1 and name != "sample_id":
                    rows.put(name, 0, np.full(shape, absent(name, dtype), dtype))
            for path, theirs, ours in self._kept:
                with RunFile(path) as run:
                    self._copy(run, theirs, ours, rows)
            rows.put("status", 0, self.status)
        finally:
            rows.close()

    def _copy(self, run: RunFile, theirs: Array, ours: Array, rows: Rows) -> None:
        """Copy rows, those that are neighbours in both files together."""
        limit = run.blocks()[0].stop
        breaks = np.flatnonzero((np.diff(theirs) != 1) | (np.diff(ours) != 1)) + 1
        for stretch in np.split(np.arange(len(ours)), breaks):
            for start in range(0, len(stretch), limit):
                piece = stretch[start : start + limit]
                source, row = int(theirs[piece[0]]), int(ours[piece[0]])
                for name in self._columns:
                    if name not in ("sample_id", "status"):
                        rows.put(name, row, run[name][source : source + len(piece)])

    def write(
        self,
        rows: slice,
        columns: Mapping[str, npt.ArrayLike],
        status: npt.ArrayLike = Status.OK,
        message: str | Sequence[str] = "",
    ) -> None:
        """Write one batch: `columns` by dataset name, one entry for each of `rows`; `sample_sha256` as text.

        Columns left out, and all real numbers of rows that are not ok, become NaN. `status` and `message` are one for
        all rows or one for each. Raises: UsageError when the disk refuses; the batch then does not count.
        """
        self.prepare()
        assert self._rows is not None
        start, stop, _ = rows.indices(len(self.ids))
        states = np.broadcast_to(np.asarray(status, "u1"), (stop - start,))
        texts = [message] * len(states) if isinstance(message, str) else message
        by_batch = [name for name in self._columns if name not in ("sample_id", "status", "message")]
        data = {name: self._block(name, columns.get(name), states) for name in by_batch}
        if unknown := set(columns) - set(data):
            raise ValueError(f"columns {sorted(unknown)} are not written by batch")
        data["message"] = self._block("message", [_cut(text) for text in texts], states)
        with disk_errors(self.part, self._bytes):
            if (self.status[start:stop] == Status.OK).any():  # at no moment may a row that counts be half new
                self.status[start:stop] = Status.TODO
                self._rows.put("status", start, self.status[start:stop])
            for name, values in data.items():
                self._rows.put(name, start, values)
            self._rows.put("status", start, states)
        self.status[start:stop] = states
        self._sha256[start:stop] = data["sample_sha256"]

    def _block(self, name: str, given: npt.ArrayLike | None, states: Array) -> Array:
        (_, *row), dtype = self._columns[name]
        if given is None:
            return np.full((len(states), *row), absent(name, dtype), dtype)
        values = np.asarray(given)
        if name == "prediction":
            values = values.reshape(len(values), -1)
        if values.shape != (len(states), *row):
            raise ValueError(f"{name} has shape {values.shape}, the rows need {(len(states), *row)}")
        bad = states != Status.OK
        values = values.astype(dtype, copy=bool(bad.any()))
        if dtype.kind == "f" and bad.any():
            values[bad] = np.nan
        return values

    def finish(self) -> bool:
        """Pack the rows into the finished file and close; False if that file was right already, it is then not touched.

        Raises: UsageError when the disk has no room for it; the `.part` stays. ValueError while rows are still to do.
        """
        if todo := int((self.status == Status.TODO).sum()):
            raise ValueError(f"{todo} rows are still to do")
        changed = self._rows is not None or not self._untouched
        if changed:
            self.prepare()
            with disk_errors(self.path, self._bytes), replacing(self.path) as temporary:
                self._pack(temporary)
            self.part.unlink()
        self.close()
        return changed

    def _pack(self, path: Path) -> None:
        with RunFile(self.part) as run, packed(path, self._columns) as file:
            for name, (shape, dtype) in self._columns.items():
                for piece in blocks(shape, dtype):
                    file[name][piece] = run[name][piece]
            self._describe(file, {"complete": True})
            _attach_scales(file)

    def _describe(self, file: h5py.File, more: Mapping[str, Any]) -> None:
        for key, value in {**self.attributes, "schema": SCHEMA, "history": self._history, **more}.items():
            file.attrs[key] = encode(value)
        file["prediction"].attrs["shape"] = json.dumps(self.layout.outputs)
        for name in self._columns:
            for axis, label in enumerate(self.layout.axes(name)):
                file[name].dims[axis].label = label

    def close(self) -> None:
        """Give the file free. An unfinished `.part` stays; the next `open` goes on with it."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        self._lock.release()


def _require_own(*paths: Path) -> None:
    """Raise UsageError for what is there and is neither a run file nor an empty one: nothing replaces it."""
    for path in paths:
        own = path.is_file() and (path.stat().st_size == 0 or is_run_file(path))
        if path.exists() and not own:
            raise UsageError(f"cannot write {path}: it is there already, and no run file; choose another --out")


def _versions(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: attributes.get(key) for key in VERSION_KEYS}


def _cut(text: str) -> bytes:
    """At most `MESSAGE_BYTES`; where that is not all, whole characters and an ellipsis."""
    data, dots = text.encode(errors="replace"), "…".encode()
    if len(data) <= MESSAGE_BYTES:
        return data
    return data[: MESSAGE_BYTES - len(dots)].decode(errors="ignore").encode() + dots


def _attach_scales(file: h5py.File) -> None:
    """Dimension scales without values, so that netCDF readers such as xarray find named dimensions."""
    for dataset in list(file.values()):
        for axis, dim in enumerate(dataset.dims):
            if dim.label not in file:
                size = dataset.shape[axis]
                file.create_dataset(dim.label, (size,), "f4").make_scale(f"{_NO_VARIABLE}{size:10d}")
            dim.attach_scale(file[dim.label])
