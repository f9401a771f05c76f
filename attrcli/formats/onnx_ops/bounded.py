"""A builder that looks at the size of what an op makes from constants before it makes it."""

import math
from typing import Any

import torch

from attrcli.formats.onnx_ops.base import LARGEST
from attrcli.graph.build import Builder, leaves
from attrcli.graph.value import tree_map

_MOST_WORK = 1 << 38
"""Most multiplications of one product of constants."""


class BoundedBuilder(Builder):
    """Runs every op on constants on the meta device first, which costs microseconds, and refuses absurd results."""

    def _run(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        values = leaves((args, kwargs))
        if all(value.is_tensor and not value.probes[0].is_meta for value in values):
            self._check_cost(op, args, kwargs)
        return super()._run(op, args, kwargs)

    def _check_cost(self, op: Any, args: Any, kwargs: Any) -> None:
        sizes = [value.probes[0].numel() for value in leaves((args, kwargs))]
        if not sizes and any(argument.name == "device" for argument in op._schema.arguments):
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
        if len(sizes) > 1 and math.isqrt(sizes[0] * sizes[1] * count) > _MOST_WORK:
            self.refuse("a product of constants that is too large to compute at import")

    def _meta_of(self, value: Any) -> Any:
        return self._on_meta(value.probes[0])
