"""The box that a first layer's input lies in: the range of the model's input, brought through what comes before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attrcli.errors import UnsupportedOp, UsageError
from attrcli.graph.check import attribute
from attrcli.graph.rules import Step, place_of
from attrcli.model import Model

Tensor = torch.Tensor


@dataclass(frozen=True)
class Box:
    """`(node) -> (step) -> (low, high)`, the bounds of a layer's input, of one row.

    Raises UsageError for a model whose input has no known bounds.
    """

    model: Model
    shape: tuple[int, ...]
    composite: str

    def __call__(self, node: fx.Node) -> Callable[[Step], tuple[Tensor, Tensor]]:
        """The bounds of what a layer is given; computed when they are first needed, and kept."""
        model = self.model
        if model.bounds is None:
            raise UsageError(
                f"{model.path}: lrp with composite={self.composite} needs the lowest and the highest value of the "
                "input, which only images tell (raw 0 and 255, preprocessed); choose composite=epsilon_gamma or "
                "epsilon_plus_flat, or in Python set model.bounds = (lowest, highest)"
            )
        rows = model.engine(self.shape).batch or 1
        ends = [end.to(model.device, model.dtype).expand(rows, *self.shape) for end in model.bounds]
        kept: list[tuple[Tensor, Tensor]] = []

        def bounds(step: Step) -> tuple[Tensor, Tensor]:
            if not kept:
                source: Any = next(arg for arg in node.all_input_nodes if arg in step.varying)
                one, other = (_value(model, source, end) for end in ends)
                kept.append((torch.minimum(one, other)[:1], torch.maximum(one, other)[:1]))
            return kept[0]

        return bounds


def _value(model: Model, node: fx.Node, inputs: Tensor) -> Tensor:
    """What a node of the graph is at these inputs."""
    module: Any = node.graph.owning_module
    names = iter(module.meta["inputs"])
    named = model.arguments(inputs)
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for each in node.graph.nodes:
            if each.op == "placeholder":
                known[each] = named[next(names)]
            elif each.op == "get_attr":
                known[each] = attribute(module, str(each.target))
            else:
                args, kwargs = fx.map_arg((each.args, each.kwargs), known.__getitem__)
                known[each] = each.target(*args, **kwargs)
            if each is node:
                break
    value: Tensor = known[node]
    if value.shape[:1] != inputs.shape[:1]:
        raise UnsupportedOp(
            f"{place_of(node)}: it mixes the batch with another dimension, which z-box has no bounds for"
        )
    return value
