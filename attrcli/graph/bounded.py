"""A builder that looks at the size of what an op makes from constants before it makes it, and at how long it builds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from attrcli.errors import TooLarge
from attrcli.graph.build import Builder, leaves
from attrcli.graph.value import tree_map

LARGEST = 1 << 28
"""Most elements that an op may make from constants alone: more than any honest file needs."""

_MOST_WORK = 1 << 38
"""Most multiplications of all products of constants."""

MOST_STEPS = 400_000
"""Most steps of an import: a node of the file evaluated and a round of a loop are one, a node of the graph ten more.

That is some 30,000 nodes of a graph and some seconds; large models have a tenth of them.
"""

_NODE_STEPS = 10


class BoundedBuilder(Builder):
    """Runs every op on constants on the meta device first, which costs microseconds, and refuses absurd results.

    All results together may have LARGEST elements beside 16 for each element that the file stores.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, advice: str = "") -> None:
        super().__init__(dtype, advice)
        self._elements, self._work, self._steps = 0, 0, 0
        self._loops: list[str] = []

    def add(self, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """Add a node, counted."""
        self.step(_NODE_STEPS)
        return super().add(target, args, kwargs)

    def step(self, count: int = 1) -> None:
        """Count a node of the file that is evaluated, or a round of a loop. Raises TooLarge beyond MOST_STEPS."""
        self._steps += count
        if self._steps > MOST_STEPS:
            where = ", ".join(f"in the loop at {place}" for place in self._loops[::-1])
            what = f"the model unrolls to more than {MOST_STEPS} steps, the most that attrcli takes"
            raise TooLarge(f"{what} ({where})" if where else what)

    @contextmanager
    def loop(self) -> Iterator[None]:
        """What is built meanwhile belongs to the loop at the present place of the file."""
        self._loops.append(self.where)
        yield
        self._loops.pop()

    def _run(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        values = leaves((args, kwargs))
        if all(value.is_tensor and not value.probes[0].is_meta for value in values):
            self._check_cost(op, args, kwargs)
        return super()._run(op, args, kwargs)

    def _check_cost(self, op: Any, args: Any, kwargs: Any) -> None:
        operands = [self._meta_of(value) for value in leaves((args, kwargs))]
        if not operands and any(argument.name == "device" for argument in op._schema.arguments):
            kwargs = {**kwargs, "device": "meta"}
        with torch.no_grad():
            try:
                made = op(*tree_map(self._meta_of, args), **tree_map(self._meta_of, kwargs))
            except NotImplementedError:  # a shape that depends on the data, which is at most as large
                return
        results = [item for item in (made if isinstance(made, list | tuple) else [made]) if torch.is_tensor(item)]
        count = sum(item.numel() for item in results)
        if count > LARGEST:
            self.refuse(f"a tensor of {count} elements made from constants")
        shared = {operand.untyped_storage()._cdata for operand in operands}
        self._elements += sum(item.numel() for item in results if item.untyped_storage()._cdata not in shared)
        most = LARGEST + 16 * sum(tensor.numel() for tensor, _ in self._stored.values())
        if self._elements > most:
            self.refuse(f"more than {most} elements made from constants")
        if len(operands) > 1:
            self._work += math.isqrt(operands[0].numel() * operands[1].numel() * count)
        if self._work > _MOST_WORK:
            self.refuse("products of constants that are too large to compute at import")

    def _meta_of(self, value: Any) -> Any:
        return self._on_meta(value.probes[0])
