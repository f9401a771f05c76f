"""How far rounding ties move the outputs of a graph that rounds, such as a quantised model's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

NEAR = 1e-3
"""Distance from a tie, in steps, within which the order of a float32 sum may decide how a value is rounded."""

DRAWS = 8
"""Runs that are tried; each lets a tie fall to its other side with a probability near 1/2."""


class _Moved(fx.Interpreter):
    """Runs a graph with each value moved by up to `NEAR` before it is rounded."""

    def __init__(self, graph: fx.GraphModule, generator: torch.Generator) -> None:
        super().__init__(graph)
        self.generator = generator

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.round.default:
            x = args[0]
            noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
            args = (x + NEAR * (2 * noise - 1),)
        return super().call_function(target, args, kwargs)


def spread(graph: fx.GraphModule, run: Callable[[Callable[..., Any]], torch.Tensor], own: torch.Tensor) -> float:
    """The largest difference from the outputs `own` in runs whose ties fall otherwise; 0 for a graph without rounding.

    `run` gives the outputs when a function takes the graph's place. Cost: `DRAWS` forward passes.
    """
    if not any(node.target is aten.round.default for node in graph.graph.nodes):
        return 0.0
    generator = torch.Generator(own.device).manual_seed(0)
    return max(float((run(_Moved(graph, generator).run) - own).abs().max()) for _ in range(DRAWS))
