"""What an axis is made of: the batch, channels, the grid of the input; and how reshapes deal its factors out anew.

An axis is a product of factors, outermost first: `((0, 14), (1, 14))` are the 196 patches of an image, flattened;
`before` counts the tokens, such as a class token, that were put in front of them. What is not known is an axis UNKNOWN,
never a guess.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BATCH, CHANNEL, INPUT_CHANNEL, UNKNOWN = "batch", "channel", "input channel", "unknown"
Factor = tuple[Any, int]
"""What it is, a number for an axis of the grid, and its size."""


@dataclass(frozen=True)
class Axis:
    """An axis; its size is `before`, the product of its factors, and `after`."""

    factors: tuple[Factor, ...]
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """How long it is."""
        return self.before + math.prod(size for _, size in self.factors) + self.after

    @property
    def of_grid(self) -> bool:
        """Whether it is axes of the grid and nothing else, but for tokens beside them."""
        return bool(self.factors) and all(isinstance(kind, int) for kind, _ in self.factors)

    @property
    def kinds(self) -> set[Any]:
        """What it is made of."""
        return {kind for kind, _ in self.factors}


Axes = tuple[Axis, ...]


def plain(kind: Any, size: int) -> Axis:
    """An axis of one factor; of none where its size is 1, unless it is known to be the batch or channels."""
    return Axis(((kind, size),) if size != 1 or kind in (BATCH, CHANNEL, INPUT_CHANNEL) else ())


def better(first: Axis, second: Axis) -> Axis:
    """Of what two operands say of an axis, what says more."""
    return min(first, second, key=lambda axis: (UNKNOWN in axis.kinds, not axis.of_grid and len(axis.factors)))


def resized(axis: Axis, size: int) -> Axis:
    """An axis of windows over another."""
    if axis.size == size:
        return axis
    whole = len(axis.factors) == 1 and axis.of_grid and not axis.before and not axis.after
    return plain(axis.factors[0][0] if whole else UNKNOWN, size)


# -- reshapes --------------------------------------------------------------------------------------------------------


def reshaped(given: Axes, shape: Sequence[int]) -> Axes | None:
    """Factors dealt out anew; None where they do not go.

    One that is split keeps its outer part: rows of windows are still rows of the grid.
    """
    left = [factor for axis in given for factor in _atoms(axis) if factor[1] != 1]
    axes: list[Axis] = []
    for place, size in enumerate(shape):
        if size == 1:
            axes.append(given[0] if place == 0 and given[0].kinds == {BATCH} and given[0].size == 1 else Axis(()))
            continue
        taken = _taken(left, size)
        if taken is None:
            return None
        axes.append(_joined(taken))
    return tuple(axes)


def _atoms(axis: Axis) -> tuple[Factor, ...]:
    """The factors of an axis; one with tokens beside its own stays whole."""
    return ((axis, axis.size),) if axis.before or axis.after else axis.factors


def _taken(left: list[Factor], size: int) -> list[Factor] | None:
    """Take factors that make up a size, splitting the last one where it must be."""
    taken: list[Factor] = []
    while size > 1:
        if not left:
            return None
        kind, own = left[0]
        if size % own == 0:
            taken.append(left.pop(0))
            size //= own
        elif own % size == 0:
            outer, inner = _split(kind)
            taken.append((outer, size))
            left[0] = (inner, own // size)
            size = 1
        else:
            return None
    return taken


def _split(kind: Any) -> tuple[Any, Any]:
    if isinstance(kind, int):
        return kind, f"inside {kind}"
    return (kind, kind) if isinstance(kind, str) and kind != BATCH else (UNKNOWN, UNKNOWN)


def _joined(factors: Sequence[Factor]) -> Axis:
    """One axis of some factors; parts of one that was split become it again."""
    if len(factors) == 1 and isinstance(factors[0][0], Axis):
        return factors[0][0]
    made: list[Factor] = []
    for kind, size in factors:
        before = made[-1][0] if made else None
        if isinstance(kind, Axis):
            kind = UNKNOWN
        if before is not None and (kind == f"inside {before}" or (kind == before and isinstance(kind, str))):
            made[-1] = (before, made[-1][1] * size)
        else:
            made.append((kind, size))
    return Axis(tuple(made))
