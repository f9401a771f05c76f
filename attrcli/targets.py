"""`--target` and `--score`: from what the user wrote to the scalar that is explained for each sample."""

import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from attrcli.errors import AttrcliWarning, UsageError
from attrcli.score import Head, Score, Target

_FORMS = "predicted, label, an index, a label name, A-B, C@sum, C@mask or i,j,k"


@dataclass(frozen=True)
class Wanted:
    """A target as written, read: `index` of the class, `minus` of the class subtracted, positions for higher ranks."""

    text: str
    kind: Literal["predicted", "label", "index", "position", "sum", "mask"]
    index: int = 0
    minus: int | None = None
    position: tuple[int, ...] = ()


def parse(text: str, labels: Sequence[str] | None) -> Wanted:
    """Read a target. Raises UsageError, with a suggestion, for a name that is no label or that says two things."""
    names = list(labels or ())
    if text in names:
        return Wanted(text, "index", _class(text, names, text))
    if text == "predicted":
        return Wanted(text, "predicted")
    if text == "label":
        return Wanted(text, "label")
    cls, at, how = text.rpartition("@")
    if at:
        if how not in ("sum", "mask"):
            raise UsageError(f"--target {text}: after @ comes sum or mask")
        return Wanted(text, "sum" if how == "sum" else "mask", _class(cls, names, text))
    if "," in text:
        parts = [part.strip() for part in text.split(",")]
        if not all(map(_is_index, parts)):
            raise UsageError(f"--target {text}: a position is written i,j,k with whole numbers")
        return Wanted(text, "position", int(parts[0]), position=tuple(int(part) for part in parts[1:]))
    dashes = [place for place, character in enumerate(text) if character == "-"]
    pairs = [(text[:place], text[place + 1 :]) for place in dashes]
    pairs = [pair for pair in pairs if all(part in names or _is_index(part) for part in pair)]
    if len(pairs) > 1:
        readings = " or ".join(f"'{first}' less '{second}'" for first, second in pairs)
        raise UsageError(f"--target {text}: this says {readings}; use the indices of the classes")
    if pairs:
        first, second = (_class(part, names, text) for part in pairs[0])
        if first == second:
            raise UsageError(f"--target {text}: a class less itself is always zero; name two classes")
        return Wanted(text, "index", first, second)
    return Wanted(text, "index", _class(text, names, text))


def _is_index(text: str) -> bool:
    """Whether this is a whole number as people write it: no sign, no leading zero, no digits of other scripts."""
    return re.fullmatch("0|[1-9][0-9]{0,8}", text) is not None


def _class(text: str, names: list[str], whole: str) -> int:
    if names.count(text) > 1:
        places = ", ".join(str(index) for index, name in enumerate(names) if name == text)
        raise UsageError(f"--target {whole}: the label '{text}' stands for the classes {places}; use an index")
    if text in names:
        return names.index(text)
    if _is_index(text):
        return int(text)
    close = difflib.get_close_matches(text, names, 1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    known = (
        f"; labels: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "; no labels are known"
    )
    raise UsageError(f"--target {whole}: '{text}' is no label{hint}{known}; accepted: {_FORMS}")


def resolve(wanted: Wanted, score: Score, logits: torch.Tensor, head: Head, labels: torch.Tensor) -> Target:
    """The target of each row, from its logits (N, K, ...) and its label (N,).

    One sigmoid output has two classes: 1 is its logit, 0 the negative; `predicted` takes the likelier.
    Raises UsageError for an index out of range, and for a form that does not fit the rank of the output.
    """
    shape = tuple(logits.shape[1:])
    classes, positions = (shape[0] if shape else 1), shape[1:]
    one_number = not positions or max(positions) == 1
    if one_number != (wanted.kind in ("predicted", "label", "index")):
        _refuse_form(wanted, shape)
    binary = classes == 1 and head == "sigmoid"
    count = 2 if binary else classes
    index = _index(wanted, logits, binary, labels)
    minus = None if wanted.minus is None else torch.full_like(index, wanted.minus)
    for tensor in (index, minus):
        if tensor is not None and bool((tensor >= count).any()):
            raise UsageError(
                f"--target {wanted.text}: {int(tensor.max())} is out of range: the output has {count} classes, "
                f"0 to {count - 1}"
            )
    if binary:
        if minus is not None:
            raise UsageError(f"--target {wanted.text}: one sigmoid output has no contrast; its logit is one already")
        return Target(torch.zeros_like(index), score, sign=2.0 * index - 1)
    return Target(index, score, minus=minus, weight=_weight(wanted, logits, positions))


def classes_of(target: Target) -> torch.Tensor:
    """The class that each row explains, (N,): for one sigmoid output 0 or 1."""
    return target.index if target.sign is None else (target.sign > 0).long()


def _index(wanted: Wanted, logits: torch.Tensor, binary: bool, labels: torch.Tensor) -> torch.Tensor:
    if wanted.kind == "predicted":
        flat = logits.reshape(len(logits), -1)
        return (flat[:, 0] > 0).long() if binary else flat.argmax(1)
    if wanted.kind == "label":
        return labels.to(logits.device).long()
    return torch.full((len(logits),), wanted.index, device=logits.device)


def _weight(wanted: Wanted, logits: torch.Tensor, positions: tuple[int, ...]) -> torch.Tensor | None:
    """Which of the P positions count, (N, P)."""
    if wanted.kind == "position":
        where = torch.zeros(positions, device=logits.device, dtype=logits.dtype)
        if len(wanted.position) != len(positions) or any(
            p >= n for p, n in zip(wanted.position, positions, strict=True)
        ):
            size = "x".join(map(str, (logits.shape[1], *positions)))
            raise UsageError(f"--target {wanted.text}: not a position of an output of {size}")
        where[wanted.position] = 1
        return where.reshape(1, -1).expand(len(logits), -1)
    if wanted.kind == "mask":
        mask = logits.flatten(2).argmax(1) == wanted.index
        if empty := int((~mask.any(1)).sum()):
            warnings.warn(
                f"--target {wanted.text}: in {empty} of {len(mask)} inputs class {wanted.index} is the likeliest at no "
                "position: the mask is empty, and score and attribution are zero",
                AttrcliWarning,
                stacklevel=2,
            )
        return mask.to(logits.dtype)
    return None


def _refuse_form(wanted: Wanted, shape: tuple[int, ...]) -> None:
    size = "x".join(map(str, shape)) or "one number"
    if len(shape) > 1:
        raise UsageError(
            f"--target {wanted.text}: the output is {size} per sample, not one score per class; "
            f"choose C@sum, C@mask or a position {','.join('ijklm'[: len(shape)])}"
        )
    raise UsageError(
        f"--target {wanted.text}: the output is {size} per sample; choose predicted, label, an index or A-B"
    )
