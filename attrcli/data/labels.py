"""Class labels of records: from folder names or a CSV file to the model's output indices."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from attrcli.data.containers import SUFFIXES
from attrcli.data.records import Collection, Record
from attrcli.data.tables import scanned
from attrcli.errors import AttrcliWarning, InputError, UsageError

UNKNOWN_LABEL = 65535


def class_labels(collection: Collection, labels: Sequence[str] | None) -> npt.NDArray[np.uint16]:
    """The index of each record's label, (N,); UNKNOWN_LABEL where it has none or it matches no name.

    A label is a name, exactly or apart from case and punctuation ('T-shirt_top' is 'T-shirt/top'), or the index. Files
    that lie in the root itself take its name, unless that is a number: a class folder may be given alone.
    """
    match, root = _matcher(labels), collection.root.name
    of_root = match(root) if not root.isdecimal() else UNKNOWN_LABEL
    return np.array(
        [of_root if _lies_in_root(record) else match(record.label) for record in collection.records], dtype=np.uint16
    )


def _lies_in_root(record: Record) -> bool:
    """Whether a file has no folder of its own below the root, and no column that would say its label."""
    return not record.label and record.path.name.lower().endswith((*SUFFIXES["image"], *SUFFIXES["sequence"]))


def labels_csv(path: Path, collection: Collection, labels: Sequence[str] | None) -> npt.NDArray[np.uint16]:
    """The label of each record, (N,), from a CSV file with the columns ``id`` and ``label`` (a name or an index).

    An id is a record's id or its file name if that is unique; records that are not listed get UNKNOWN_LABEL.

    Raises: UsageError for a file without these columns, labels that match nothing, and a list that names no record.
    """
    accepted = "accepted: a CSV file with the columns 'id' and 'label'"
    if not path.is_file():
        raise UsageError(f"--labels {path}: no such file; {accepted}")
    try:
        table = scanned(os.fspath(path))
    except (InputError, OSError) as error:
        raise UsageError(f"--labels {path}: {error}; {accepted}") from error
    if table.ids is None or table.labels is None:
        raise UsageError(f"--labels {path}: its columns are {', '.join(table.header)}; {accepted}")
    twice = sorted(name for name, count in Counter(table.ids).items() if count > 1)
    if twice:
        raise UsageError(f"--labels {path}: {twice[0]!r} is listed more than once; give each input one label")
    match = _matcher(labels)
    wrong = sorted({label for label in table.labels if match(label) == UNKNOWN_LABEL})
    if wrong:
        known = f"the names {', '.join(labels[:10])}{', ...' if labels[10:] else ''}, or " if labels else ""
        raise UsageError(f"--labels {path}: the labels {wrong[:10]} match nothing; accepted: {known}an index")
    given = dict(zip(table.ids, (match(label) for label in table.labels), strict=True))
    names = [PurePosixPath(record.id).name for record in collection.records]
    keys = [record.id if record.id in given else name for record, name in zip(collection.records, names, strict=True)]
    shared = sorted(key for key, count in Counter(keys).items() if key in given and count > 1)
    if shared:
        raise UsageError(
            f"--labels {path}: {shared[0]!r} is the name of several inputs; write the ids with their folders"
        )
    if not any(key in given for key in keys):
        raise UsageError(
            f"--labels {path}: no id is that of an input; an input's id is like {collection.records[0].id!r}"
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
