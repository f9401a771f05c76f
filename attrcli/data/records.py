"""What a record is, and the file name that its id gives."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


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
