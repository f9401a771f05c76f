"""CSV tables: where each row lies, its id and label; the numbers stay on disk until a row is read."""

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from attrcli.data.containers import container_of, stamp_of
from attrcli.data.records import Record
from attrcli.errors import InputError, UsageError


class Table(NamedTuple):
    """What is known of a table: its header, where each row starts and ends, and the id and label cells."""

    header: tuple[str, ...]
    header_bytes: bytes
    spans: list[tuple[int, int]]
    ids: list[str] | None
    labels: list[str] | None


@lru_cache(maxsize=2)
def _scanned(path: str, stamp: tuple[int, int]) -> Table:
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
            raise InputError(f"line {reader.line_num} is not CSV: {error}") from error
        file.seek(0)
        header_bytes = file.read(spans[0][0] if spans else -1)
    ids, labels = ([cell[i] for cell in cells] if wanted[i] is not None else None for i in (0, 1))
    return Table(header, header_bytes, spans, ids, labels)


def scanned(path: str) -> Table:
    """What is known of a table. Raises InputError for a damaged or empty file."""
    table = _scanned(path, stamp_of(path))
    if not table.header:
        raise InputError("no header row; the first line must name the columns")
    return table


def table_of(path: str, columns: Sequence[str] | None) -> Table:
    """The scanned table, its header checked; an ``id`` or ``label`` column that is a feature is only that.

    Raises: InputError for a damaged file, UsageError for one without the columns or without a header.
    """
    table = scanned(path)
    if not columns and all(_is_number(name) for name in table.header):
        raise UsageError(
            f"{path!r}: its first line is numbers ({', '.join(table.header[:5])}), where the names of the columns are "
            "due; add them as a first line. If these are the names, list them in a sidecar: [input] columns = [...]"
        )
    for name in _features(table, columns):
        if (count := table.header.count(name)) != 1:
            problem = "has no column" if count == 0 else f"has {count} columns"
            raise UsageError(f"{path!r}: {problem} {name!r}; its columns: {', '.join(table.header)}")
    used = columns or ()
    return table._replace(ids=None if "id" in used else table.ids, labels=None if "label" in used else table.labels)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def first_header(records: Iterable[Record]) -> tuple[str, tuple[str, ...]] | None:
    """Path and feature columns of the first CSV table among the files of some records that can be read."""
    for path in dict.fromkeys(os.fspath(record.path) for record in records):
        if os.path.isfile(path) and container_of(path, "table") == "csv":
            with suppress(InputError, OSError):  # read() says why, for this input alone
                return path, tuple(_features(table_of(path, None), None))
    return None


def _features(table: Table, columns: Sequence[str] | None) -> list[str]:
    return list(columns) if columns else [name for name in table.header if name not in ("id", "label")]


def row_values(path: str, row: int | None, columns: Sequence[str] | None) -> tuple[npt.NDArray[Any], str]:
    """The numbers of one row, (F,), and the SHA-256 of the header and the row's line."""
    table = table_of(path, columns)
    if row is None or row >= len(table.spans):
        raise ValueError("the row is gone; the file changed during the run")
    start, end = table.spans[row]
    with open(path, "rb") as file:
        file.seek(start)
        line = file.read(end - start)
    cells = next(filter(None, csv.reader(io.StringIO(line.decode("utf-8", "surrogateescape")))))
    if len(cells) != len(table.header):
        raise ValueError(f"the row has {len(cells)} cells, the header {len(table.header)}")
    values = np.empty(len(names := _features(table, columns)))
    for i, name in enumerate(names):
        cell = cells[table.header.index(name)]
        try:
            values[i] = float(cell)
        except ValueError as error:
            raise ValueError(f"column {name!r} holds {cell!r}, which is not a number") from error
    return values, hashlib.sha256(table.header_bytes + line).hexdigest()
