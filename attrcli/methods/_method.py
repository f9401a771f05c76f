"""What every method is: the protocol, the result, and what several of them share."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from attrcli.errors import UsageError
from attrcli.model import Model, Target


@dataclass(frozen=True)
class Attribution:
    """What a method returns for a batch of N.

    `values` is shaped like the inputs, float64 or the model's type. `baseline_score` (N,) is what completeness is
    measured against where that is not the score of the one baseline; `remainder` (N,) what a method knowingly leaves
    unattributed; `note` a short text per sample.
    """

    values: torch.Tensor
    baseline_score: torch.Tensor | None = None
    remainder: torch.Tensor | None = None
    note: tuple[str, ...] | None = None


class Method(Protocol):
    """A frozen dataclass whose fields are its options.

    `needs` says what the model must offer: gradient (an imported graph), baseline (a baseline per sample),
    rules (an op without one is refused by the method's `ruled(model, inputs)`). `axioms`
    are claims that the contract test checks: complete (sums to score(x) - score(x')), dummy (zero where the score
    does not depend on the element), linear (in the score), gradient (a vector-Jacobian product of the graph itself),
    batch_exact (a row does not depend on the others).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    axioms: ClassVar[frozenset[str]]

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Forward and backward passes per sample of this shape, for the dry run."""
        ...

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Explain a batch (N, ...). Sample i's result does not depend on sample j."""
        ...


def require_baseline(method: str, inputs: torch.Tensor, baseline: torch.Tensor | None) -> torch.Tensor:
    """The baseline, a row for each input. Raises UsageError when there is none, or when its shape is another."""
    if baseline is None:
        raise UsageError(f"{method} needs a baseline, shaped like the inputs: {tuple(inputs.shape)}")
    if baseline.shape != inputs.shape:
        raise UsageError(f"{method}: the baseline is {tuple(baseline.shape)}, the inputs are {tuple(inputs.shape)}")
    return baseline


def add_rows(total: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """total[rows] += values, summed in the accumulator's float64; `rows` is sorted."""
    unique, counts = torch.unique_consecutive(rows, return_counts=True)
    start = 0
    for row, count in zip(unique.tolist(), counts.tolist(), strict=True):
        total[row] += values[start : start + count].sum(0, dtype=total.dtype)
        start += count


def gradients(model: Model, inputs: torch.Tensor, target: Target) -> torch.Tensor:
    """The gradient of each row's score, for a batch of any length."""
    return torch.cat([model.gradient(inputs[rows], target.take(rows))[0] for rows in model.passes(len(inputs))])


def column(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape (N,) to (N, 1, ..., 1) so that it multiplies rows of `like`."""
    return vector.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
