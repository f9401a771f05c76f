"""Sequences as inputs of a model: their length and layout settled before a run, and what is computed of columns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attrcli import data, letters
from attrcli.errors import UsageError
from attrcli.methods._method import Attribution
from attrcli.preprocess import Preprocess

SIDECAR = (
    "the order of the letters cannot be guessed, and a wrong one gives a convincing, wrong answer. Write a sidecar, "
    "{sidecar}: under [input], kind = 'sequence', alphabet = 'ACGT' (the letters in the order of the channels), layout "
    "= 'NCL' or 'NLC'; to begin with one: attrcli inspect {model} --write-sidecar"
)
"""What to do about letters whose model has no sidecar."""


def settled(p: Preprocess, declared: tuple[int | None, ...] | None, length: int | None, path: Path) -> Preprocess:
    """With the size that `--length` asks for, else that of the sidecar, else that which the model file declares.

    `declared` is one sample of the input as the file has it. Raises UsageError where the two do not fit.
    """
    if p.kind != "sequence":
        if length is not None:
            raise UsageError(f"--length {length}: only for sequences, and the inputs are of kind {p.kind}")
        return p
    if length is not None:
        p = replace(p, size=(length,), lengths="fit")
    if declared is not None:
        p = _as_declared(p, declared, path)
    if p.lengths == "fit" and p.size is None:
        raise UsageError(
            f"{path}: lengths = 'fit' needs a length to fit to: size = [length] in the sidecar, or --length"
        )
    return p


def _as_declared(p: Preprocess, declared: tuple[int | None, ...], path: Path) -> Preprocess:
    """With the length that the file declares. Raises UsageError for a sidecar that says otherwise."""
    length = p.size[0] if p.size else None
    if length is None and len(declared) == p.sample_rank:
        given = declared[0 if p.layout == "NLC" else -1]
        length = given // len(p.alphabet) if p.flat and given else given
    wanted = replace(p, size=(length or 1,)).sample_shape or ()
    fits = len(wanted) == len(declared) and all(d in (None, w) for d, w in zip(declared, wanted, strict=True))
    if not fits:
        takes = "x".join("L" if each is None else str(each) for each in declared)
        raise UsageError(
            f"{path}: the model takes {takes}, and would be given {'x'.join(map(str, wanted))}: alphabet = "
            f"{p.alphabet!r}, layout = {p.layout!r}, flat = {str(p.flat).lower()}, length {length or 'free'}; "
            "correct the sidecar, or --length"
        )
    return p if length is None else replace(p, size=(length,))


def require_equal(p: Preprocess, records: Sequence[data.Record], length: int) -> None:
    """Raise UsageError for the first FASTA record of another length, where none is cropped or padded."""
    if p.kind != "sequence" or p.lengths == "fit":
        return
    for record in records:
        found = data.letter_count(record)
        if found not in (0, length):
            raise UsageError(
                f"{record.id!r} has {found} letters, the model takes {length}: --length {length} crops or pads all "
                "inputs around their middle; or leave this one out"
            )


def hypothetical(multipliers: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """What each letter would contribute in the place of the one there is: m_pc - sum_c' r_pc' m_pc', (N, A, L).

    At the letter that there is, it is what the position contributes. The multipliers are those of the actual input, so
    of other letters it is an estimate.

    Source: Shrikumar et al. 2017 (`deeplift.util.get_hypothetical_contribs_func_onehot`).
    """
    return multipliers - (baseline * multipliers).sum(1, keepdim=True)


def reverse_complement(columns: torch.Tensor, alphabet: str) -> torch.Tensor:
    """The other strand, of one-hot columns (N, A, L), of what belongs to each, or to each position (N, 1, L)."""
    turned = columns[:, letters.complement(alphabet)] if columns.shape[1] == len(alphabet) else columns
    return turned.flip(-1)


def joined(first: Attribution, second: Attribution, alphabet: str) -> Attribution:
    """The mean of a strand's attribution and of the other strand's, read on the first.

    It attributes the mean of the scores of both, to which it adds up where each adds up to its own. A standard error
    is the mean of the two: what it is at most, however they depend on each other.
    """

    def mean(name: str, turn: bool) -> torch.Tensor | None:
        one, other = getattr(first, name), getattr(second, name)
        if one is None or other is None:
            return None
        half: torch.Tensor = (one.double() + (reverse_complement(other, alphabet) if turn else other).double()) / 2
        return half

    notes = zip(first.note or (), second.note or (), strict=True)
    values = mean("values", True)
    assert values is not None
    return Attribution(
        values,
        baseline_score=mean("baseline_score", False),
        remainder=mean("remainder", False),
        note=tuple("; ".join(dict.fromkeys(filter(None, pair))) for pair in notes) if first.note else None,
        standard_error=mean("standard_error", True),
        hypothetical=mean("hypothetical", True),
    )


def require_strands(p: Preprocess, at: str | None) -> None:
    """Raise UsageError where inputs have no reverse complement."""
    if p.kind != "sequence":
        raise UsageError(
            f"--reverse-complement: only DNA and RNA have one, and the inputs are of kind {p.kind}; leave it out"
        )
    if at is not None:
        raise UsageError(f"--reverse-complement: the node {at} has no other strand; leave out that, or --at")
    letters.complement(p.alphabet)
