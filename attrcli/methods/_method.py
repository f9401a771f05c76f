"""What every method is: the protocol, the result, and what several of them share."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch

from attrcli.errors import UsageError
from attrcli.graph.rules import Ruled
from attrcli.model import Model, Target


@dataclass(frozen=True)
class Attribution:
    """What a method returns for a batch of N.

    `values` is shaped like the inputs, float64 or the model's type. `baseline_score` (N,) is what completeness is
    measured against where that is not the score of the baseline; `remainder` (N,) what a method knowingly leaves
    unattributed; `note` a short text per sample. Shaped like the values: `multipliers`, which times the difference from
    the baseline make them, and `standard_error` of values that are a mean over what was drawn. `hypothetical`, what
    each letter of a one-hot sequence would contribute, is made of the multipliers by whoever runs the method.
    """

    values: torch.Tensor
    baseline_score: torch.Tensor | None = None
    remainder: torch.Tensor | None = None
    note: tuple[str, ...] | None = None
    multipliers: torch.Tensor | None = None
    standard_error: torch.Tensor | None = None
    hypothetical: torch.Tensor | None = None


class Method(Protocol):
    """A frozen dataclass whose fields are its options.

    `needs` says what the method must be given: gradient (an imported graph), baseline (a baseline per sample; the
    result for a set of them is the mean over the set), baselines (the whole set at once, (N, R, ...)), rules (its own
    for the ops of the graph), node (a node of the graph, its option `node`); the last two are Ruling.
    `gives` says what stands beside the values or is special about them: multipliers, standard_error, positions (one
    value for each position of the input, (N, 1, H, W) for images, and not for each element).
    `axioms` are claims that the contract test checks: complete (sums to score(x) - score(x')), conservative (sums, with
    the remainder, to score(x)), dummy (zero where the score does not depend on the element), linear (in the score),
    gradient (a vector-Jacobian product of the graph itself), batch_exact (a row does not depend on the others).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    gives: ClassVar[frozenset[str]]
    axioms: ClassVar[frozenset[str]]

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Forward and backward passes per sample of this shape and baseline, for the dry run."""
        ...

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Explain a batch (N, ...). Sample i's result does not depend on sample j."""
        ...


@runtime_checkable
class Ruling(Protocol):
    """A method that runs the graph under rules of its own, from a node of its own: not every graph will do."""

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph ready for it. Raises UnsupportedOp for an op without a rule, ModelError for lack of a node."""
        ...


def shape_of(method: Method, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one sample's attribution, for an input of this shape."""
    return (1, *shape[1:]) if "positions" in method.gives else shape


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
