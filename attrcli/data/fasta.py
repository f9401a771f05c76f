"""FASTA files: where each record lies and its id; plain or gzip, the letters stay in the file until they are read."""

import gzip
import mmap
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from attrcli.data.containers import stamp_of

_HEADER = re.compile(rb">([^\r\n]*)(?:\r\n|\r|\n|\Z)")
_NEXT = re.compile(rb"(?<=[\r\n])" + _HEADER.pattern)
_SPACE = b" \t\r\n\v\f"
_FOREIGN = re.compile(rb"[^A-Za-z*-]")


class Fasta(NamedTuple):
    """A scanned file: its bytes, and id (the first word of the header), start and end of the letters of each record."""

    content: bytes | mmap.mmap
    records: list[tuple[str, int, int]]


def scanned(path: str) -> Fasta:
    """What is known of a file. Raises ValueError for one that does not begin with a header, or is damaged."""
    return _scanned(path, stamp_of(path))


@lru_cache(maxsize=2)
def _scanned(path: str, stamp: tuple[int, int]) -> Fasta:
    content = _content(path)
    start = re.match(rb"(?:\xef\xbb\xbf)?\s*", content)
    first = _HEADER.match(content, start.end() if start else 0)
    if first is None:
        raise ValueError("holds no FASTA record: the first line must be a header, '>' and the record's id")
    headers = [first, *_NEXT.finditer(content, max(first.end() - 1, first.start() + 1))]
    ends = [header.start() for header in headers[1:]] + [len(content)]
    return Fasta(
        content,
        [(_id(header[1], i), header.end(), end) for i, (header, end) in enumerate(zip(headers, ends, strict=True))],
    )


def _content(path: str) -> bytes | mmap.mmap:
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            try:
                with gzip.open(file) as unpacked:
                    return unpacked.read()
            except EOFError as error:
                raise ValueError("the gzip file is cut short") from error
        if not file.seek(0, 2):
            raise ValueError("the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _id(header: bytes, number: int) -> str:
    words = header.decode("utf-8", "backslashreplace").split()
    return words[0] if words else str(number)


def members(path: str) -> Iterator[tuple[str, int]]:
    """Id and place in the file of each record."""
    return ((name, place) for place, (name, _, _) in enumerate(scanned(path).records))


def count(path: str, place: int | None) -> int:
    """How many letters a record has; 0 for one that cannot be read."""
    try:
        return len(letters_of(path, place))
    except (ValueError, OSError):
        return 0


def letters_of(path: str, place: int | None) -> npt.NDArray[Any]:
    """The letters of a record as one byte each, (L,), lines joined.

    Raises ValueError for a record without letters, and for anything but letters, * and -.
    """
    records = scanned(path).records
    if place is None or place >= len(records):
        raise ValueError("the record is gone; the file changed during the run")
    _, start, end = records[place]
    text = scanned(path).content[start:end].translate(None, _SPACE)
    if not text:
        raise ValueError("the record holds no letters")
    if foreign := _FOREIGN.search(text):
        sign = foreign[0].decode("latin-1")
        raise ValueError(f"holds {sign!r} at position {foreign.start()}; accepted: letters, * and -")
    return np.frombuffer(text, "S1")
