"""Arguments to records: files, directories, globs and lists, sorted, each with its id and label; no data is read."""

import codecs
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TextIO

from attrcli.data import fasta
from attrcli.data.containers import FASTA, SUFFIXES, container_of
from attrcli.data.containers import members as members_of
from attrcli.data.records import Collection, Record
from attrcli.data.tables import table_of
from attrcli.errors import NoInputsError, UsageError


class _Found(NamedTuple):
    path: str
    base: str
    argument: str


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
    """The kind of inputs whose model has no sidecar: 'array', 'table' or 'sequence' by the suffixes, else 'image'.

    Raises: UsageError for files of several of the former.
    """
    mentioned = [name for argument in inputs for name in _mentioned(argument)]
    found = {os.path.splitext(name.lower().removesuffix(".gz"))[1]: name for name in mentioned}
    of_kind = {"image": SUFFIXES["image"], "array": SUFFIXES["array"], "table": (".csv",), "sequence": FASTA}
    names = {kind: found[suffix] for kind, suffixes in of_kind.items() for suffix in suffixes if suffix in found}
    if "image" not in names and len(names) > 1:
        raise UsageError(
            f"the inputs are {', and '.join(f'{kind}s, such as {name!r}' for kind, name in names.items())}: give those "
            "of one kind, for example as 'FOLDER/*.npy', or write kind = \"array\" under [input] of a sidecar"
        )
    return "image" if "image" in names or not names else next(iter(names))


def _mentioned(argument: str) -> list[str]:
    """The names that an argument stands for, as far as they tell a kind."""
    if argument.startswith("@"):
        return _listed(argument[1:])
    if os.path.isdir(argument):
        return [name for _, _, files in os.walk(argument) for name in files if not name.startswith(".")]
    return [argument] if os.path.lexists(argument) else glob.glob(argument, recursive=True) or [argument]


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
        names = _listed(argument[1:])
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


def _listed(path: str) -> list[str]:
    try:
        return _names(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"the list {path!r} cannot be read: {error.strerror}") from error


def _names(data: bytes) -> list[str]:
    data = data.removeprefix(codecs.BOM_UTF8)
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
    container = container_of(path, kind)
    members: list[tuple[str | None, tuple[int, ...]]] = []
    try:
        if container == "csv":
            yield from _table_records(path, name, columns)
            return
        if container == "fasta":
            for record_id, row in fasta.members(path):
                yield Record(f"{name}#{record_id}", Path(path), folder, row=row)
            return
        if container != "image":
            members = members_of(path, container)
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
    table = table_of(path, columns)
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
