"""What the CAM family shares: a node's value and gradient on its grid, and the map that is made of them."""

from collections.abc import Callable

import torch

from attrcli.graph.rules import PLAIN, Ruled
from attrcli.methods._grid import Grid, located, upsampled
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target

Tensor = torch.Tensor
Weighing = Callable[[Tensor, Tensor], Tensor]
"""The map (N, *sizes), before its positive part is taken, of activations and gradients (N, K, *sizes), float64."""


def ruled(model: Model, inputs: Tensor, node: str, grid: str, method: str) -> tuple[Grid, Ruled]:
    """The grid at the node, and the graph from there on. Raises ModelError where there is no grid to read."""
    place = located(model, tuple(inputs.shape[1:]), node, grid, method)
    return place, model.ruled(inputs, lambda node, varying: PLAIN, method, at=place.node)


def attribute(model: Model, inputs: Tensor, target: Target, place: Grid, made: Ruled, weigh: Weighing) -> Attribution:
    """The positive part of a map, on the input's grid."""
    maps = []
    for rows in model.passes(len(inputs)):
        value, gradient, _ = model.gradient_at(inputs[rows], target.take(rows), made)
        cells = weigh(place.cut(value.double()), place.cut(gradient.double())).clamp_min(0)
        maps.append(upsampled(cells, tuple(inputs.shape[1:])))
    return Attribution(torch.cat(maps), note=(str(place),) * len(inputs))


def over_grid(tensor: Tensor) -> list[int]:
    """The dimensions of the positions."""
    return list(range(2, tensor.dim()))
