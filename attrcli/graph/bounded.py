"""A builder that looks at the size of what an op makes from constants before it makes it."""

import math
from typing import Any

import torch

from attrcli.graph.build import Builder, leaves
from attrcli.graph.value import tree_map

LARGEST = 1 << 28
"""Most elements that an op may make from constants alone: more than any honest file needs."""

_MOST_WORK = 1 << 38
"""Most multiplications of all products of constants."""


class BoundedBuilder(Builder):
    """Runs every op on constants on the meta device first, which costs microseconds, and refuses absurd results.

    All results together may have LARGEST elements beside 16 for each element that the file stores.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, advice: str = "") -> None:
        super().__init__(dtype, advice)
        self._elements, self._work = 0, 0

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
