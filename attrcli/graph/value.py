"""What a graph is built from: values with two concrete probes, and how far a number depends on the batch."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

TRIALS = (1, 2, 3, 4, 5, 8, 9, 16, 32, 50, 64, 100, 128, 1000)
"""Batch sizes at which arithmetic on sizes is tried: two probes may agree on a number that depends on the batch."""


_MOST_BITS = 63
"""Of whole numbers, as all three formats have them."""


@dataclass(frozen=True)
class View:
    """How a value was made from the tensor whose memory it shares."""

    parent: "Value"
    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None


@dataclass(eq=False, slots=True)
class Value:
    """A tensor, or a number that depends on the batch: two probes, a node, and whether the contents are data.

    `data` is true when the contents depend on an input, so that no number may be read from them at import. `trials`
    are a number's values at the batch sizes TRIALS, None when they cannot be told. A `view` holds its root's contents
    only while it has the root's `version`; a `stored` tensor is the file's own; `state` is
    its name where a write to it would be seen by the next call. A `doubt` is a number that the probes
    alone would take for a constant: the message with which any use of it in the graph is refused.
    """

    probes: tuple[Any, Any]
    node: fx.Node
    data: bool
    view: View | None = None
    version: int = 0
    stored: bool = False
    trials: tuple[Any, ...] | None = None
    state: str = ""
    doubt: str = ""

    @property
    def is_tensor(self) -> bool:
        """Whether this is a tensor, not a number."""
        return isinstance(self.probes[0], torch.Tensor)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        dtype: torch.dtype = self.probes[0].dtype
        return dtype

    @property
    def rank(self) -> int:
        """The tensor's number of dimensions."""
        return len(self.probes[0].shape)

    @property
    def root(self) -> "Value":
        """The value that owns the memory: the start of the chain of views."""
        value = self
        while value.view is not None:
            value = value.view.parent
        return value


def is_tensor(value: Any) -> bool:
    """Whether a front end's value is a tensor."""
    return isinstance(value, Value) and value.is_tensor


def tree_map(function: Callable[[Value], Any], tree: Any) -> Any:
    """Apply a function to every Value in nested lists, tuples and dicts."""
    if isinstance(tree, Value):
        return function(tree)
    if isinstance(tree, list):
        return [tree_map(function, item) for item in tree]
    if isinstance(tree, tuple):
        return tuple(tree_map(function, item) for item in tree)
    if isinstance(tree, dict):
        return {key: tree_map(function, item) for key, item in tree.items()}
    return tree


def leaves(tree: Any) -> list[Value]:
    """Every Value in nested lists, tuples and dicts."""
    found: list[Value] = []
    tree_map(found.append, tree)
    return found


def probe(tree: Any, index: int) -> Any:
    """The tree at one of the two probes."""
    return tree_map(lambda value: value.probes[index], tree)


def same(first: Any, second: Any) -> bool:
    """Whether two Python values are equal and of one type."""
    return type(first) is type(second) and bool(first == second)


def beyond(value: Any) -> bool:
    """Whether this is a whole number, or a list with one, that torch takes for a symbol: those below -(1 << 62)."""
    numbers = value if isinstance(value, list) else [value]
    return any(isinstance(number, int) and number < -(1 << 62) for number in numbers)


def computed(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a function of numbers gives. Raises OverflowError for a whole number that no file can hold, before it is."""
    if function in (operator.pow, operator.lshift) and all(isinstance(number, int) for number in args):
        base, times = args
        if abs(times) * (base.bit_length() if function is operator.pow else 1) > _MOST_BITS:
            raise OverflowError
    result = function(*args)
    if isinstance(result, int) and result.bit_length() > _MOST_BITS:
        raise OverflowError
    return result


def tried(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, ...] | None:
    """What a function of numbers gives at the batch sizes TRIALS; None when that cannot be told."""
    trials = [value.trials for value in leaves(args)]
    if any(trial is None for trial in trials):
        return None
    try:
        return tuple(
            computed(function, tree_map(lambda value, k=index: value.trials[k], args))  # type: ignore[misc]
            for index in range(len(TRIALS))
        )
    except (ArithmeticError, ValueError):
        return None


def extrapolated(sizes: tuple[int, int], batches: Sequence[int]) -> tuple[int, ...] | None:
    """A tensor's size at the batch sizes TRIALS, from two: a N + b with whole a, else None."""
    slope, rest = divmod(sizes[1] - sizes[0], batches[1] - batches[0])
    trials = tuple(sizes[0] + slope * (batch - batches[0]) for batch in TRIALS)
    return None if rest or min(trials) < 0 else trials
