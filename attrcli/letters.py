"""Letters and one-hot columns: what a sequence of an alphabet is as numbers (A, L), and back.

A column is one position: 1 at its letter, one row for each letter of the alphabet, in its order. A letter outside the
alphabet, such as N, is `unknown`: every row 1/A (uniform), every row 0 (zero), or an error (refuse). Columns of zeros
at either end are padding.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from attrcli.errors import AttrcliWarning, InputError, UsageError

Array = npt.NDArray[Any]

_MANY = 0.1
UNKNOWN = ("uniform", "refuse", "zero")

_SMALL = np.arange(ord("a"), ord("z") + 1)
_PAIRS = ({"A": "T", "C": "G", "G": "C", "T": "A"}, {"A": "U", "C": "G", "G": "C", "U": "A"})
"""The complement of each letter, of DNA and of RNA."""


def one_hot(letters: Array, alphabet: str, unknown: str, lowercase: str) -> Array:
    """Letters (L,), one byte each, to columns (A, L), float32. `lowercase` is accept (as capitals) or refuse.

    Raises: InputError naming the first letter that is refused, and its position, counted from 0.
    """
    codes: Array = np.frombuffer(letters.tobytes(), np.uint8)
    small = np.isin(codes, _SMALL)
    if lowercase == "refuse" and small.any():
        raise InputError(f"{_first(codes, small)} is lower case, and the sidecar has lowercase = 'refuse'")
    capitals = np.where(small, codes - 32, codes)
    columns: Array = (capitals == np.frombuffer(alphabet.encode(), np.uint8)[:, None]).astype(np.float32)
    strange = np.asarray(columns.max(axis=0) == 0)
    if strange.any():
        if unknown == "refuse":
            raise InputError(
                f"{_first(codes, strange)} is not in the alphabet {alphabet}, and the sidecar has unknown = 'refuse'; "
                "accepted too: 'uniform', 'zero'"
            )
        _warn_of_others(capitals[strange], len(capitals), alphabet)
        columns[:, strange] = 1 / len(alphabet) if unknown == "uniform" else 0
    return columns


def _warn_of_others(strange: Array, count: int, alphabet: str) -> None:
    """Warn where many letters, other than N and X for any, are not in the alphabet: it is probably another one."""
    others = strange[~np.isin(strange, (ord("N"), ord("X")))]
    if len(others) > _MANY * count:
        warnings.warn(
            f"{len(others)} of {count} letters are not in the alphabet {alphabet}, {chr(others[0])!r} for one: the "
            "sequences, or the sidecar, are probably of another alphabet (RNA for DNA, say)",
            AttrcliWarning,
            stacklevel=2,
        )


def _first(codes: Array, wrong: Array) -> str:
    place = int(wrong.argmax())
    return f"the letter {chr(codes[place])!r} at position {place}"


def checked(columns: Array) -> Array:
    """Columns (A, L) that were stored as numbers, as float32. Raises InputError unless each sums to 1, or is all 0."""
    total = columns.sum(axis=0, dtype=np.float64)
    wrong = (columns < 0).any(axis=0) | ((np.abs(total - 1) > 1e-3) & (total != 0))
    if wrong.any():
        place = int(wrong.argmax())
        raise InputError(
            f"position {place} holds {columns[:, place].tolist()}; accepted: one-hot, or frequencies that sum to 1, or "
            "zeros; for other values write kind = 'array' in the sidecar"
        )
    made: Array = columns.astype(np.float32)
    return made


def text_of(columns: Array, alphabet: str) -> str:
    """The letters of columns (A, L): the one with more than half, else what stands for none."""
    none = stand_in(alphabet)
    best, share = columns.argmax(axis=0), columns.max(axis=0)
    return "".join(alphabet[row] if most > 0.5 else none for row, most in zip(best, share, strict=True))


def stand_in(alphabet: str) -> str:
    """What is written for a column that is no letter of the alphabet: N for DNA, X for proteins."""
    return next(letter for letter in "NX?" if letter not in alphabet)


def resized(columns: Array, length: int) -> Array:
    """The middle `length` columns, or padding around them; of an odd difference the larger part is on the right."""
    spare = length - columns.shape[1]
    left = abs(spare) // 2
    if spare <= 0:
        return columns[:, left : left + length]
    return np.pad(columns, ((0, 0), (left, spare - left)))


def inside(columns: Array) -> slice:
    """The positions between the paddings; none where all is padding."""
    places = np.flatnonzero(columns.any(axis=0))
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 0)


def is_dna(alphabet: str) -> bool:
    """Whether the letters are A, C, G and T, in any order."""
    return sorted(alphabet) == ["A", "C", "G", "T"]


def complement(alphabet: str) -> list[int]:
    """The row of each letter's complement. Raises UsageError for letters that are not those of DNA or RNA."""
    pairs = next((pairs for pairs in _PAIRS if sorted(alphabet) == sorted(pairs)), None)
    if pairs is None:
        raise UsageError(f"the alphabet {alphabet} has no complement; accepted: A, C, G and T, or U, in any order")
    return [alphabet.index(pairs[letter]) for letter in alphabet]
